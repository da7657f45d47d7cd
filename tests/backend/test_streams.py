"""Memory that is kept from step to step, and the streams that use it. That a GPU does so: optim/test_gpu_devices.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from a8multi.backend import streams


def test_a_stream_that_changes_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall: memory of one stream that another one still reads is handed out again when it is freed."""
    recorded: list[tuple[str, int]] = []
    now = [0]

    class Kept:
        def __init__(self, name: str) -> None:
            self._name = name

        def record_stream(self, stream: int) -> None:
            recorded.append((self._name, stream))

    monkeypatch.setattr(streams, "current", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    followed, kept = streams.Followed(), [Kept("a"), Kept("b")]
    for now[0] in (7, 7, 9, 9, 7):
        followed.use(torch.device("cuda", 0), kept)  # type: ignore[arg-type]
    assert recorded == [("a", 9), ("b", 9), ("a", 7), ("b", 7)]


def test_the_current_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", made.append)
    for index in (1, None):
        with streams.on(torch.device("cuda", index) if index is not None else torch.device("cuda")):
            pass
    assert made == []
    streams.on(torch.device("cuda", 0))
    assert made == [torch.device("cuda", 0)]


def test_what_is_not_a_cuda_device_is_never_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("CUDA was asked"))
    for device in ("cpu", "cpu:0", "meta"):
        with streams.on(torch.device(device)):
            pass


def test_a_capture_on_any_of_the_devices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    current, captured = [0], 1

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == captured)
    cpu, first, second = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    assert not streams.is_captured([first])
    assert not streams.is_captured([cpu, first])
    assert streams.is_captured([first, second])
    assert streams.is_captured([second])
    assert current == [0]

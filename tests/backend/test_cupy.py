"""What the cupy backend asks CuPy to compile. A GPU runs it: see the `backend` fixture; here CuPy only takes notes."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_sources import entry_files, kernels_of

from a8multi.backend import cupy as cupy_backend
from a8multi.errors import BackendUnavailable
from a8multi.loader import flatten, geometry


def test_every_kernel_that_is_asked_for_is_in_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {flatten(entry) for entry in entry_files()}
    asked = []

    class RawModule:
        def __init__(self, code: str, options: tuple[str, ...], **_: Any) -> None:
            assert code in texts
            assert {"-fmad=false", "-ftz=true", "-prec-div=true", "-prec-sqrt=true"} <= set(options)
            self._code = code

        def get_function(self, name: str) -> str:
            assert name in kernels_of(self._code)
            asked.append(name)
            return name

    module = ModuleType("cupy")
    module.RawModule = RawModule  # type: ignore[attr-defined]
    module.cuda = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(cupy_backend, "require_cuda", lambda: None)
    backend = cupy_backend.CupyBackend()
    for name in cupy_backend._FILES:
        backend._kernel(name)
    assert len(asked) == len(cupy_backend._FILES) > 0

    launched: list[Any] = []
    monkeypatch.setattr(backend, "_on", lambda device: nullcontext())
    monkeypatch.setattr(backend, "_kernel", lambda name: lambda grid, block, values: launched.append((name, *values)))
    backend._upload(torch.device("cuda", 0), bytes(range(1, 13)), 4096)
    ((name, words, to, count),) = launched
    assert (name, to, count) == ("upload", 4096, 3)
    assert words.size == 1  # CuPy takes an array of one element for a value, others it refuses
    assert words.tobytes() == bytes(range(1, 13)) + bytes(geometry()["A8_UPLOAD_BYTES"] - 12)

    def refuse(**_: Any) -> None:
        raise RuntimeError("nvrtc: error: no such option")

    module.__version__ = "99.0"  # type: ignore[attr-defined]
    module.RawModule = refuse  # type: ignore[attr-defined]
    with pytest.raises(BackendUnavailable, match=r"99\.0 cannot compile cuda/kernels/adam\.cuh: nvrtc: error.*=torch"):
        cupy_backend.CupyBackend()._kernel("adam")

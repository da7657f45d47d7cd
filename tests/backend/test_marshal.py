"""What is copied to a device, and when. The device is main memory here: only the copies' contents and sizes matter."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

import a8multi
from a8multi.backend import marshal
from a8multi.loader import geometry
from a8multi.plan import Live, StepPlan
from a8multi.plan.schedule import SCHEDULE
from a8multi.plan.step_plan import HYPER


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy."""
    sizes: list[int] = []

    def pinned(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(marshal, "_pinned", pinned)
    monkeypatch.setattr(marshal, "_staging", marshal._Staging())
    return sizes


def _plan() -> tuple[StepPlan, Any]:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((65, 300), (40000,), (3,))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = a8multi.Adafactor8bit(params)
    optimizer.step()
    (work,) = optimizer._roster.works.values()
    work.plan.grads = [param.grad for param in params]
    return work.plan, params


def _assert_there(
    tables: Any, plan: StepPlan, hypers: np.ndarray, live: Live | None = None, upload: marshal.Upload | None = None
) -> None:
    """Each table's bytes are where its address says."""
    batch, first = tables.batch(plan, hypers, live, upload)
    addresses = [batch.hypers, batch.tensors, batch.chunks, batch.tiles]
    expected = [hypers, plan.tensors, plan.chunks, plan.tiles]
    if live is None:
        assert first is None, "no schedules"
    else:
        addresses, expected = [first, *addresses], [live.records, *expected]
    for address, table in zip(addresses, expected, strict=True):
        at = address - tables._memory.data_ptr()
        assert tables._memory[at : at + table.nbytes].numpy().tobytes() == table.tobytes()
    counts = batch.hyper_count, batch.tensor_count, batch.chunk_count, batch.tile_count
    assert counts == tuple(map(len, (hypers, plan.tensors, plan.chunks, plan.tiles)))


def test_only_what_changed_is_copied(copied: list[int]) -> None:
    plan, params = _plan()
    hypers = np.zeros(2, HYPER)
    tables = marshal._DeviceTables()
    _assert_there(tables, plan, hypers)
    whole = copied.pop()
    assert whole >= sum(t.nbytes for t in (hypers, plan.tensors, plan.chunks, plan.tiles))

    _assert_there(tables, plan, hypers)
    assert copied == []

    hypers["lr"] = 0.5
    _assert_there(tables, plan, hypers)
    assert copied == [hypers.nbytes]

    plan.grads = [torch.ones_like(param) for param in params]
    plan.address()
    hypers["lr"] = 0.25
    _assert_there(tables, plan, hypers)
    assert plan.tensors.nbytes < copied[1] < whole
    assert len(copied) == 2

    # More rows of hyper-parameters than there is room for.
    _assert_there(tables, plan, np.zeros(20, HYPER))
    assert copied[2] > whole


def test_a_plan_without_tiles_has_no_address_for_them(copied: list[int]) -> None:
    param = torch.nn.Parameter(torch.zeros(10))
    param.grad = torch.ones(10)
    optimizer = a8multi.AdamW8bit([param])
    optimizer.step()
    (work,) = optimizer._roster.works.values()
    work.plan.grads = [param.grad]
    batch, _ = marshal._DeviceTables().batch(work.plan, np.zeros(1, HYPER))
    assert batch.tiles is None
    assert len(copied) == 1


def test_few_rows_of_hypers_go_with_a_launch(copied: list[int]) -> None:
    plan, params = _plan()
    uploaded: list[int] = []

    def upload(data: bytes, to: int) -> None:
        uploaded.append(len(data))
        ctypes.memmove(to, data, len(data))

    tables = marshal._DeviceTables()
    hypers = np.zeros(geometry()["A8_UPLOAD_BYTES"] // HYPER.itemsize, HYPER)
    _assert_there(tables, plan, hypers, upload=upload)
    assert (len(copied), uploaded) == (1, []), "the first time all is copied"
    for hypers["lr"] in (0.5, 0.5, 0.25):
        _assert_there(tables, plan, hypers, upload=upload)
    assert (len(copied), uploaded) == (1, [hypers.nbytes] * 2)

    plan.grads = [torch.ones_like(param) for param in params]
    plan.address()
    hypers["lr"] = 0.125
    _assert_there(tables, plan, hypers, upload=upload)
    assert (len(copied), len(uploaded)) == (2, 2), "with other gradients all that changed is one copy"

    more = np.zeros(len(hypers) + 1, HYPER)
    for more["lr"] in (0.5, 0.25):
        _assert_there(tables, plan, more, upload=upload)
    assert (len(copied), len(uploaded)) == (4, 2), "more than an upload takes"


def test_what_is_derived_on_the_device_is_copied_with_its_schedules(copied: list[int]) -> None:
    plan, _ = _plan()
    tables, hypers = marshal._DeviceTables(), np.zeros(1, HYPER)
    for skip in (0, 64):
        live = Live(np.zeros(1, SCHEDULE), [], [], [])
        live.records["skip"] = skip
        _assert_there(tables, plan, hypers, live, upload=lambda data, to: pytest.fail("only for hypers alone"))
    whole, staged, changed = copied
    assert changed < whole <= staged // 2


def test_the_flag_is_looked_at_every_time(copied: list[int]) -> None:
    plan, _ = _plan()
    tables, hypers = marshal._DeviceTables(), np.zeros(1, HYPER)
    for plan.skip in (None, torch.ones(()), torch.zeros(()), None):
        batch, _ = tables.batch(plan, hypers)
        assert batch.skip == (None if plan.skip is None else plan.skip.data_ptr())
    assert len(copied) == 1


def test_a_failed_copy_is_made_up_for(copied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = _plan()
    tables, hypers = marshal._DeviceTables(), np.zeros(2, HYPER)
    _assert_there(tables, plan, hypers)

    def fail(size: int) -> None:
        raise MemoryError(size)

    with monkeypatch.context() as patch:
        patch.setattr(marshal, "_pinned", fail)
        with pytest.raises(MemoryError):
            tables.batch(plan, np.zeros(20, HYPER))
    _assert_there(tables, plan, hypers)

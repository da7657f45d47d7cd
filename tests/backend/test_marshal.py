"""What is copied to a device, and when. The device is main memory here: only the copies' contents and sizes matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import a8multi
from a8multi.backend import marshal
from a8multi.plan import StepPlan
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


def _updated(tables: Any, plan: StepPlan, hypers: np.ndarray) -> Any:
    return tables.updated(plan, [np.empty(0, SCHEDULE), hypers, plan.tensors, plan.chunks, plan.tiles])


def _assert_there(tables: Any, plan: StepPlan, hypers: np.ndarray) -> None:
    """Each table's bytes are where its address says."""
    addresses = _updated(tables, plan, hypers)
    assert addresses[0] is None, "no schedules"
    for address, table in zip(addresses[1:], (hypers, plan.tensors, plan.chunks, plan.tiles), strict=True):
        at = address - tables._memory.data_ptr()
        assert tables._memory[at : at + table.nbytes].numpy().tobytes() == table.tobytes()


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
    assert _updated(marshal._DeviceTables(), work.plan, np.zeros(1, HYPER))[4] is None
    assert len(copied) == 1

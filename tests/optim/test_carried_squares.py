"""Sums of p^2 that a step leaves for the next: trusted only while nobody else wrote the parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.helpers import differences, gradients, parameters, run, snapshot

import a8multi
from a8multi.loader.structs import TensorFlag

SHAPES = ((65, 300), (16385,), (40, 70), (1,))
KNOWN = int(TensorFlag.SQUARES_KNOWN)


def _make(params: Any, **options: Any) -> Any:
    return a8multi.Adafactor8bit([{"params": params[:2]}, {"params": params[2:]}], lr=1e-2, **options)


def _flags(optimizer: Any) -> list[int]:
    """What the kernels of the last step were told, 1 for each parameter whose sums were known."""
    (work,) = optimizer._roster.works.values()
    return [int(flag) for flag in work.plan.tensors["flags"]]


# --- What the host knows. On the CPU library, whose plan tells. ---


@pytest.fixture
def stepped() -> Any:
    """Two steps, so that the second knew every sum."""
    with a8multi.use_backend("cpu"):
        params = parameters(SHAPES)
        optimizer = _make(params)
        run(optimizer, params, range(1))
        assert _flags(optimizer) == [0, 0, 0, 0]
        run(optimizer, params, range(1, 2))
        assert _flags(optimizer) == [KNOWN] * 4
        yield optimizer, params


def _next(optimizer: Any, params: Any) -> list[int]:
    """The flags of one more step; those of the step after it are all set again."""
    run(optimizer, params, range(2, 3))
    flags = _flags(optimizer)
    run(optimizer, params, range(3, 4))
    assert _flags(optimizer) == [KNOWN] * 4
    return flags


def test_a_parameter_written_through_autograd(stepped: Any) -> None:
    optimizer, params = stepped
    with torch.no_grad():
        params[1].clamp_(-1, 1)
    assert _next(optimizer, params) == [KNOWN, 0, KNOWN, KNOWN]


def test_a_parameter_whose_memory_was_exchanged(stepped: Any) -> None:
    optimizer, params = stepped
    params[2].data = params[2].data.clone()
    assert _next(optimizer, params) == [KNOWN, KNOWN, 0, KNOWN]


def test_a_step_of_another_optimizer(stepped: Any) -> None:
    optimizer, params = stepped
    run(a8multi.AdamW8bit(params[:1]), params[:1], range(1))
    assert _next(optimizer, params) == [0, KNOWN, KNOWN, KNOWN]


def test_a_step_on_a_backend_that_leaves_no_sums(stepped: Any) -> None:
    optimizer, params = stepped
    with a8multi.use_backend("torch"):
        run(optimizer, params, range(1))
    assert _next(optimizer, params) == [0, 0, 0, 0]


def test_a_group_that_did_not_ask_for_the_sums(stepped: Any) -> None:
    optimizer, params = stepped
    optimizer.param_groups[1]["scale_parameter"] = False
    run(optimizer, params, range(1))
    optimizer.param_groups[1]["scale_parameter"] = True
    assert _next(optimizer, params) == [KNOWN, KNOWN, 0, 0]


@pytest.mark.parametrize("how", ["a state loaded", "a gradient missing", "a step that failed"])
def test_another_plan_knows_nothing(stepped: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = stepped
    if how == "a state loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "a gradient missing":
        params[3].grad = None
        optimizer.step()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd.graph, "increment_version", _interrupted)
            with pytest.raises(RuntimeError, match="interrupted"):
                optimizer.step()
    assert _next(optimizer, params) == [0, 0, 0, 0]


def _interrupted(_: Any) -> None:
    raise RuntimeError("interrupted")


def test_adam_asks_for_no_sums() -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(3))
    assert _flags(optimizer) == [0, 0, 0, 0]


# --- What the kernels make of it. ---


def _written(params: Any) -> None:
    with torch.no_grad():
        params[0].mul_(3.0)


def _written_behind_autograd(params: Any) -> None:
    """Counts as no write: the kernels have to notice by themselves."""
    for param in params:
        version = param._version
        param.data.copy_(param.data * 3.0)
        assert param._version == version


def _exchanged(params: Any) -> None:
    params[1].data = params[1].data * 3.0


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"factored": False, "min_8bit_size": 0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [None, _written, _written_behind_autograd, _exchanged])
def test_same_bits_as_an_optimizer_that_knows_nothing(
    backend: Any, change: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Beside one that is built anew from the saved state before every step."""
    params, twins = (parameters(SHAPES, dtype, backend.device) for _ in range(2))
    optimizer, fresh = _make(params, **options), _make(twins, **options)
    for step in range(4):
        if change is not None and step > 0:
            for each in (params, twins):
                change(each)
        run(optimizer, params, range(step, step + 1))
        saved = copy.deepcopy(fresh.state_dict())
        fresh = _make(twins, **options)
        fresh.load_state_dict(saved)
        run(fresh, twins, range(step, step + 1))
        assert not differences(snapshot(optimizer, params), snapshot(fresh, twins)), f"step {step}"


def test_the_scale_follows_the_parameter() -> None:
    """The oracle for the above: the step is in proportion to RMS(p), also where it was written behind autograd."""
    param = torch.nn.Parameter(torch.full((64, 64), 2.0))
    optimizer = a8multi.Adafactor8bit([param], lr=1e-3, d=0, relative_step=False, beta2=0.0)
    ways = []
    for value in (2.0, 2.0, 20.0):
        param.data.fill_(value)
        (param.grad,) = gradients([param], 0)
        optimizer.step()
        ways.append((param.detach() - value).norm())
    assert float(ways[1] / ways[0]) == pytest.approx(1.0, rel=1e-3)
    assert float(ways[2] / ways[0]) == pytest.approx(10.0, rel=1e-3)

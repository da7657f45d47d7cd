"""A run saved under one backend or device goes on under another: every optimizer, mid projection gap too."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim import test_apollo, test_state_dict
from optim.helpers import differences, parameters, run, snapshot

import a8multi

# Sums over a tensor are of another order in torch, and what rounds them goes through the state.
SUMMING = ("factored", "nf4", "full int8", "unquantised", "lamb", "lars", "limiter", "full limiter",
           "came", "came nf4 limiter", "came of adafactor8bit")  # fmt: skip
EXACT = {name: make for name, make in test_state_dict.MAKES.items() if name not in SUMMING}
CLOSE = {name: (test_state_dict.MAKES[name], test_state_dict.SHAPES) for name in SUMMING}
APOLLO: dict[str, tuple[Callable[..., Any], Any]] = {
    name: (make, test_apollo.SHAPES)
    for name, make in {
        **{f"apollo {name}": make for name, make in test_apollo.MAKES.items()},
        "apollo mini": lambda params: a8multi.APOLLO8bit(
            params, rank=1, scale_type="tensor", scale=128.0, update_proj_gap=test_apollo.GAP
        ),
    }.items()
}
# Of the way that a parameter goes in the steps after the change, where sums or products are torch's.
BOUND = 1e-4
BEFORE, AFTER = range(4), range(4, 9)
# Of the gradients after the change, five times those before it: limiters act at once, on the norm that was saved.
LARGER = 5e-2
orders = pytest.mark.parametrize("order", [("cpu", "torch"), ("torch", "cpu")], ids="-".join)
gpus = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cupy")], indirect=True
)


def _moved(optimizer: Any, params: Any, make: Callable[..., Any], device: str = "cpu") -> tuple[Any, Any]:
    """A new optimizer with copies of the parameters, and with the state as a file brings it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]
    other = make(copies)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, copies


def _on_two_backends(make: Any, shapes: Any, dtype: torch.dtype, order: tuple[str, str]) -> tuple[Any, Any, Any]:
    """The run that stayed and the one that changed, each as (optimizer, parameters); and where they parted."""
    params = parameters(shapes, dtype)
    optimizer = make(params)
    with a8multi.use_backend(order[0]):
        run(optimizer, params, BEFORE)
        other, twins = _moved(optimizer, params, make)
        parted = [p.detach().clone() for p in params]
        run(optimizer, params, AFTER, scale=LARGER)
    with a8multi.use_backend(order[1]):
        run(other, twins, AFTER, scale=LARGER)
    return (optimizer, params), (other, twins), parted


def _assert_close(params: Any, twins: Any, parted: Any) -> None:
    for i, (p, q, old) in enumerate(zip(params, twins, parted, strict=True)):
        way = float((p.detach() - old).norm())
        assert way > 0, f"parameter {i} did not move"
        assert float((p.detach() - q.detach()).norm()) <= BOUND * way, f"parameter {i}"


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT.keys())
def test_the_bits_of_one_backend(make: Any, dtype: torch.dtype, order: tuple[str, str]) -> None:
    (optimizer, params), (other, twins), _ = _on_two_backends(make, test_state_dict.SHAPES, dtype, order)
    assert not differences(snapshot(other, twins), snapshot(optimizer, params))


@orders
@pytest.mark.parametrize(("make", "shapes"), [*CLOSE.values(), *APOLLO.values()], ids=[*CLOSE, *APOLLO])
def test_within_rounding_of_one_backend(make: Any, shapes: Any, order: tuple[str, str]) -> None:
    (_, params), (_, twins), parted = _on_two_backends(make, shapes, torch.float32, order)
    _assert_close(params, twins, parted)


def _to_the_gpu_and_back(make: Any, shapes: Any, dtype: torch.dtype, device: str) -> tuple[Any, Any, Any]:
    """As ``_on_two_backends``, of a run that stayed on the CPU and one whose middle was on the device."""
    start = parameters(shapes, dtype)
    params, twins = ([torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(2))
    optimizer, other = make(params), make(twins)
    with a8multi.use_backend("cpu"):
        run(optimizer, params, BEFORE)
        run(other, twins, BEFORE)
        run(optimizer, params, AFTER, scale=LARGER)
    other, twins = _moved(other, twins, make, device)
    run(other, twins, AFTER[:3], scale=LARGER)
    other, twins = _moved(other, twins, make)
    with a8multi.use_backend("cpu"):
        run(other, twins, AFTER[3:], scale=LARGER)
    return (optimizer, params), (other, twins), [p.detach() for p in start]


@gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", test_state_dict.MAKES.values(), ids=test_state_dict.MAKES.keys())
def test_the_bits_of_never_having_moved(make: Any, dtype: torch.dtype, backend: BackendCase) -> None:
    shapes = test_state_dict.SHAPES
    (optimizer, params), (other, twins), _ = _to_the_gpu_and_back(make, shapes, dtype, backend.device)
    assert not differences(snapshot(other, twins), snapshot(optimizer, params))


@gpus
@pytest.mark.parametrize(("make", "shapes"), APOLLO.values(), ids=APOLLO.keys())
def test_within_rounding_of_never_having_moved(make: Any, shapes: Any, backend: BackendCase) -> None:
    (_, params), (_, twins), start = _to_the_gpu_and_back(make, shapes, torch.float32, backend.device)
    _assert_close(params, twins, start)

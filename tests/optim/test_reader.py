"""The native reader sees what Python sees, and says so when a tensor or a value is another one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.helpers import apply, gradients, parameters, run
from torch import Tensor

import a8multi
from a8multi.optim import reader
from a8multi.optim.reader import TensorReader, UnreadableError, check_values

pytestmark = pytest.mark.skipif(isinstance(reader._find(), str), reason=f"no reader: {reader._find()}")

SHAPES = ((64, 64), (4097,), (1,), (0, 3), (), (2, 3, 4, 5))


def _params() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    params.append(torch.nn.Parameter(torch.randn(6, 8).t().bfloat16()))
    params.append(torch.nn.Parameter(torch.randn(100)[7:40]))
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _found(params: list[Any]) -> list[list[int]]:
    return [[param.data_ptr() for param in params], [param.grad.data_ptr() for param in params]]


def test_addresses_and_gradients() -> None:
    params = _params()
    read = TensorReader(params)
    assert read.addresses.tolist() == _found(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        grads = read.grads(params)
        assert all(grad is param.grad for grad, param in zip(grads, params, strict=True))
        assert read.addresses.tolist() == _found(params)
    params[1].data = torch.randn(4097)
    read.grads(params)
    assert read.addresses.tolist() == _found(params)


def _missing(params: Any) -> None:
    params[1].grad = None


def _sparse(params: Any) -> None:
    params[1].grad = torch.zeros(4097).to_sparse()


def _strides(params: Any) -> None:
    params[0].data = params[0].data.t()


def _gradient_strides(params: Any) -> None:
    params[0].grad = params[0].grad.t()


def _cast(params: Any) -> None:
    params[0].grad, params[0].data = None, params[0].data.half()
    params[0].grad = torch.zeros_like(params[0])


def _dimensions(params: Any) -> None:
    """More facts than there is room for."""
    params[-1].grad, params[-1].data = None, torch.zeros(1, 1, 1, 33, 1, 1)
    params[-1].grad = torch.zeros_like(params[-1])


def _size(params: Any) -> None:
    params[1].grad, params[1].data = None, torch.zeros(4098)
    params[1].grad = torch.zeros(4098)


@pytest.mark.parametrize("change", [_missing, _sparse, _strides, _gradient_strides, _cast, _dimensions, _size])
def test_a_difference_is_unreadable(change: Callable[[Any], None]) -> None:
    params = _params()
    read = TensorReader(params)
    change(params)
    with pytest.raises(UnreadableError):
        read.grads(params)


def test_a_list_that_is_too_short_is_unreadable() -> None:
    params = _params()
    read = TensorReader(params)
    kept = list(params)
    for _ in range(3):
        params.pop()
        read.grads(kept)
        with pytest.raises(UnreadableError):
            reader._call(*_call_arguments(read, params, len(kept)))


def _call_arguments(read: Any, params: list[Any], count: int) -> tuple[Any, ...]:
    facts = read._facts_at, len(read._facts)
    grads: list[Any] = [None] * count
    return read._library, "a8_read_tensors", read._python, params, grads, count, *facts, read._addresses_at, False


def test_references_are_counted() -> None:
    params = _params()
    read = TensorReader(params)
    gc.collect()  # what other tests have left holds thousands of None
    before, nones = [sys.getrefcount(param) for param in params], sys.getrefcount(None)
    for _ in range(1000):
        read.grads(params)
    states = [{"a": params[0], "b": 3}, {}, {"c": params[1]}]
    for _ in range(1000):
        check_values(states, [params[0], 3, params[1]])
    gc.collect()
    del states
    assert [sys.getrefcount(param) for param in params] == before
    assert abs(sys.getrefcount(None) - nones) < 500, "of 8000 that were put into lists and replaced"


def test_values_are_compared_by_identity() -> None:
    big, tensor = 10**9, torch.zeros(1)
    dicts: list[dict[str, Any]] = [{"step": big, "x": tensor}, {}, {"y": None}]
    check_values(dicts, [big, tensor, None])
    for values in (
        [big, torch.zeros(1), None],
        [int("1000000000"), tensor, None],
        [big, tensor],
        [big, tensor, None, 1],
    ):
        with pytest.raises(UnreadableError):
            check_values(dicts, values)


class _Odd(torch.nn.Parameter):
    """Its gradient is no tensor."""

    @property
    def grad(self) -> Any:
        return 3


def test_subclasses_are_left_to_python() -> None:
    with pytest.raises(UnreadableError, match="subclass"):
        TensorReader([_Odd(torch.zeros(3))])


@pytest.mark.parametrize("native", [True, False])
def test_an_optimizer_reads_with_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not when the torch backend is asked for: then no library is."""
    calls = []
    grads: Callable[..., list[Tensor]] = TensorReader.grads
    monkeypatch.setattr(TensorReader, "grads", lambda self, params: calls.append(1) or grads(self, params))
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    with a8multi.use_backend("cpu" if native else "torch"):
        run(optimizer, params, range(3))
    assert len(calls) == (2 if native else 0)


def test_a_gradient_of_another_layout_is_learnt() -> None:
    """Of odd strides that are nothing to a step: one survey, and the reader goes on."""
    params = parameters([(1, 5), (65, 300)])
    optimizer = a8multi.AdamW8bit(params)
    with a8multi.use_backend("cpu"):
        run(optimizer, params, range(2))
        first = optimizer._roster
        grads = gradients(params, 2)
        apply(optimizer, params, [torch.as_strided(grads[0], (1, 5), (17, 1)), grads[1]])
        (work,) = optimizer._roster.works.values()
        assert optimizer._roster is first
        assert work.addresses.tolist() == [[p.data_ptr() for p in params], [p.grad.data_ptr() for p in params]]

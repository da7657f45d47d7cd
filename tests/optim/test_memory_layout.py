"""Pitfall 12: how a parameter or its gradient lies in memory changes nothing but where the bits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.helpers import differences, gradient, normal, snapshot
from torch import Tensor
from torch.nn import Parameter

import a8multi
from a8multi.optim import roster

MAKES: dict[str, Callable[..., Any]] = {
    "adamw": lambda params: a8multi.AdamW8bit(params, lr=1e-2, stochastic_rounding_writeback=True),
    "adamw nf4": lambda params: a8multi.AdamW8bit(params, lr=1e-2, first_moment="nf4", min_quantized_numel=0),
    "ademamix": lambda params: a8multi.AdEMAMix8bit(params, lr=1e-2, third_moment="int8"),
    "lamb": lambda params: a8multi.LAMB8bit(params, lr=1e-2, stochastic_rounding_writeback=True),
    "sgd": lambda params: a8multi.SGD8bit(params, lr=0.1),
    "factored": lambda params: a8multi.Adafactor8bit(params, beta1=0.9),
    "full": lambda params: a8multi.Adafactor8bit(params, factored=False, min_8bit_size=0),
}


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _transposed(x: Tensor) -> Tensor:
    """The same values, the last dimension outermost in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else _transposed(x)


def _strided(x: Tensor) -> Tensor:
    """Every second column of a wider tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _expanded(x: Tensor) -> Tensor:
    """A gradient that is one row for all, as the backward of a sum gives it. The values are the first row's."""
    return x[:1].expand(x.shape)


@pytest.fixture(params=["apollo", *MAKES])
def make_apollo_too(request: Any) -> Any:
    return MAKES.get(request.param, lambda params: a8multi.APOLLO8bit(params, lr=1e-2, rank=8))


LAYOUTS = {"contiguous": _contiguous, "transposed": _transposed, "channels_last": _channels_last, "strided": _strided}
SHAPES = ((65, 70), (8, 16, 6, 6), (20, 3, 80))


def _trained(
    device: Any,
    make: Callable[..., Any],
    lay_param: Callable[[Tensor], Tensor],
    lay_grad: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    of_grad: Callable[[Tensor], Tensor] = _contiguous,
) -> list[dict[str, Any]]:
    params = [Parameter(lay_param(normal(s, i).to(device, dtype))) for i, s in enumerate(SHAPES)]
    optimizer = make(params)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = lay_grad(of_grad(gradient(param.shape, 50 * step + i).to(device, dtype)))
        optimizer.step()
    return snapshot(optimizer, params)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_every_layout_of_parameter_and_gradient(backend: Any, make: Any, of_param: str, of_grad: str) -> None:
    expected = _trained(backend.device, make, _contiguous, _contiguous, torch.bfloat16)
    found = _trained(backend.device, make, LAYOUTS[of_param], LAYOUTS[of_grad], torch.bfloat16)
    assert not differences(found, expected)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_expanded_gradient(backend: Any, make: Any) -> None:
    def whole(x: Tensor) -> Tensor:
        return _expanded(x).contiguous()

    expected = _trained(backend.device, make, _contiguous, _contiguous, torch.float32, whole)
    found = _trained(backend.device, make, _contiguous, _expanded, torch.float32)
    assert not differences(found, expected)


def test_strided_parameters_share_calls_and_a_failure_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit in the room for copies together; versions count what was written before a call failed."""
    monkeypatch.setattr(roster, "_COPIED", 4 * 2 * 3 * 6000)
    params = [Parameter(_transposed(normal((60, 100), i))) for i in range(7)]
    optimizer = a8multi.AdamW8bit(params, lr=1e-2)
    calls: list[int] = []

    class Failing:
        name = "torch"

        def elementwise(self, plan: Any, hypers: Any) -> None:
            calls.append(len(plan.items))
            if len(calls) == 6:
                raise RuntimeError("the device is gone")
            with torch.no_grad():
                for item in plan.items:
                    item.param.add_(1.0)

    monkeypatch.setattr(optimizer, "_backend", lambda device: Failing())
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert calls == [3, 3, 1]
    versions = [param._version for param in params]
    with pytest.raises(RuntimeError, match="device is gone"):
        optimizer.step()
    assert all(param._version > before for param, before in zip(params, versions, strict=True))
    assert [float((p.detach() - normal((60, 100), i)).round().mean()) for i, p in enumerate(params)] == [2.0] * 6 + [
        1.0
    ]


def test_a_view_writes_into_its_base(backend: Any) -> None:
    """Flat parameters, as sharding makes them: the neighbours in memory are left alone."""
    base = torch.arange(1000, dtype=torch.float32, device=backend.device)
    param = Parameter(base[100:900:2])
    old = base.clone()
    optimizer = a8multi.AdamW8bit([param], lr=0.1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    moved = (base != old).cpu()
    assert moved[100:900:2].all()
    moved[100:900:2] = False
    assert not moved.any()


def test_a_layout_that_changes_between_steps(backend: Any) -> None:
    """The plan of the contiguous parameters does not outlive them."""
    params = [Parameter(normal((70, 80), i).to(backend.device)) for i in range(2)]
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer, expected = a8multi.AdamW8bit(params), a8multi.AdamW8bit(twins)
    for step in range(6):
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            grad = gradient(param.shape, 50 * step + i).to(backend.device)
            twin.grad = grad
            param.grad = _transposed(grad) if (step + i) % 3 == 0 else grad
        if step == 3:
            params[0].data = _transposed(params[0].data)
        optimizer.step()
        expected.step()
    assert not differences(snapshot(optimizer, params), snapshot(expected, twins))


def test_unaligned_parameters(backend: Any) -> None:
    """A parameter that begins at an odd element of its storage has the alignment of its type and no more."""
    storage = torch.zeros(5001, dtype=torch.bfloat16, device=backend.device)
    values = normal((5000,), 1).to(backend.device, torch.bfloat16)
    storage[1:] = values
    param, twin = Parameter(storage[1:]), Parameter(values.clone())
    optimizer, expected = a8multi.AdamW8bit([param]), a8multi.AdamW8bit([twin])
    for step in range(2):
        param.grad = twin.grad = gradient((5000,), step).to(backend.device, torch.bfloat16)
        optimizer.step()
        expected.step()
    assert not differences(snapshot(optimizer, [param]), snapshot(expected, [twin]))


def _negative(x: Tensor) -> Tensor:
    """The same values, with the bit that says that the memory holds their negatives."""
    return torch._neg_view(-x)


def test_gradients_whose_memory_holds_their_negatives(backend: Any, make_apollo_too: Any) -> None:
    expected = _trained(backend.device, make_apollo_too, _contiguous, _contiguous, torch.bfloat16)
    assert _negative(torch.ones(3)).is_contiguous()
    found = _trained(backend.device, make_apollo_too, _contiguous, _negative, torch.bfloat16)
    assert not differences(found, expected)


def test_a_gradient_may_become_its_negatives_at_the_same_address(backend: Any) -> None:
    found = []
    for lay in (_contiguous, _negative):
        param = Parameter(normal((1,), 0).to(backend.device))
        optimizer = a8multi.AdamW8bit([param], lr=1e-2)
        memory = torch.empty_like(param)
        for step in range(4):
            grad = gradient(param.shape, step).to(backend.device)
            param.grad = memory.copy_(grad) if step < 2 or lay is _contiguous else torch._neg_view(memory.copy_(-grad))
            optimizer.step()
        found.append(snapshot(optimizer, [param]))
    assert not differences(*found)

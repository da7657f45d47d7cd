"""CAME and the norm-growth limiter through the public classes: against the float64 oracle, and over steps."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import differences, gradients, parameters, run, snapshot
from oracle import adafactor
from torch import Tensor

import a8multi
from a8multi.plan import matrix_shape

SHAPES = ((65, 300), (300, 64), (513, 1025), (8, 4, 3, 3), (70, 1), (1, 70), (129,), (4097,))


def _start(param: Tensor, *, confidence: bool) -> adafactor.Moments:
    shape = tuple(param.shape)
    zeros = torch.zeros(shape, dtype=torch.float64)
    if len(shape) < 2:
        return adafactor.Moments(zeros, zeros, None, 0.0)
    rows, cols = matrix_shape(shape)
    pair = torch.zeros(rows, dtype=torch.float64), torch.zeros(cols, dtype=torch.float64)
    return adafactor.Moments(zeros, pair, pair if confidence else None, 0.0)


def _follow(optimizer: Any, params: list[Any], reference: Any, steps: int) -> None:
    """Every step is compared from the parameters as they are, so that errors do not add up; the states are apart."""
    held = [_start(p, confidence=True) for p in params]
    for step in range(1, steps + 1):
        before = [p.detach().cpu().double() for p in params]
        grads = [g * (1 + 4 * (step % 3 == 0)) for g in gradients(params, step)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            expected, held[i] = reference(before[i], g.cpu().double(), held[i], step)
            error = (p.detach().cpu().double() - expected).norm()
            assert error <= 1e-4 * (expected - before[i]).norm() + 1e-7 * before[i].norm(), (i, step)


@pytest.mark.parametrize("limits", [False, True])
def test_the_papers_algorithm(limits: bool, backend: BackendCase) -> None:
    params = parameters(SHAPES, device=backend.device)
    optimizer = a8multi.CAME8bit(
        params, lr=1e-2, weight_decay=0.1, first_moment="fp32", second_moment="fp32", enable_fira=limits
    )

    def reference(p: Tensor, g: Tensor, held: adafactor.Moments, step: int) -> tuple[Tensor, adafactor.Moments]:
        growth = 1.01 if limits else float("inf")
        return adafactor.came(p, g, held, lr=1e-2, weight_decay=0.1, growth=growth)

    _follow(optimizer, params, reference, 7)


@pytest.mark.parametrize("limits", [False, True])
def test_the_order_of_adafactor8bit(limits: bool, backend: BackendCase) -> None:
    params = parameters(SHAPES, device=backend.device)
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "relative_step": False, "weight_decay": 0.1}
    optimizer = a8multi.Adafactor8bit(
        params, **options, quantize=False, came_order="adafactor8bit", enable_fira_for_adafactor=limits
    )
    eps1 = float(torch.finfo(torch.float32).eps)

    def reference(p: Tensor, g: Tensor, held: adafactor.Moments, step: int) -> tuple[Tensor, adafactor.Moments]:
        growth = 1.01 if limits else float("inf")
        return adafactor.adafactor(p, g, held, step, **options, eps1=eps1, growth=growth)

    _follow(optimizer, params, reference, 7)


def test_adafactor_with_beta3_is_came() -> None:
    """With the same numbers and no scaling of its own, Adafactor8bit takes the steps of CAME8bit."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    came = a8multi.CAME8bit(params, lr=1e-3, eps=(1e-14, 1e-16))
    options = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "eps": (1e-7, 0.0), "first_moment": "int8"}
    other = a8multi.Adafactor8bit(twins, lr=1e-3, relative_step=False, scale_parameter=False, block_size=128, **options)
    run(came, params, range(5))
    run(other, twins, range(5))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first_moment", ["int8", "nf4", "bf16"])
def test_resuming(first_moment: str, dtype: torch.dtype, backend: BackendCase) -> None:
    params = parameters(SHAPES, dtype, backend.device)
    optimizer = a8multi.CAME8bit(params, first_moment=first_moment, enable_fira=True)
    run(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(optimizer, params, range(3, 6))
    resumed = a8multi.CAME8bit(twins, first_moment=first_moment, enable_fira=True)
    resumed.load_state_dict(saved)
    run(resumed, twins, range(3, 6))
    assert not differences(snapshot(resumed, twins), snapshot(optimizer, params))


def test_state_is_small() -> None:
    params = parameters([(768, 3072)])
    optimizer = a8multi.CAME8bit(params)
    run(optimizer, params, range(1))
    held = sum(v.numel() * v.element_size() for v in optimizer.state[params[0]].values() if isinstance(v, Tensor))
    assert held / params[0].numel() <= 1.06


def test_the_limiter_bounds_the_growth(backend: BackendCase) -> None:
    params = parameters([(64, 128), (300,)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(
        params, lr=1.0, beta2=0.999, relative_step=False, scale_parameter=False, d=0.0,
        enable_fira_for_adafactor=True, fira_margin=0.1,
    )  # fmt: skip
    norms = []
    for step in range(6):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g * 10.0**step
        optimizer.step()
        norms.append([float((p.detach() - b).norm()) for p, b in zip(params, before, strict=True)])
    for last, now in pairwise(norms):
        assert all(b <= a * 1.1 * (1 + 1e-5) for a, b in zip(last, now, strict=True))
    for p, norm in zip(params, norms[-1], strict=True):
        assert float(optimizer.state[p]["update_norm"]) == pytest.approx(norm, rel=1e-4)


def test_zero_gradients_say_nothing_to_the_limiter(backend: BackendCase) -> None:
    """LoRA's A has none while B is zero. Elsewhere a limit of zero took over a thousand steps to grow away."""
    params = parameters([(64, 128)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(
        params, lr=1.0, beta2=0.999, relative_step=False, scale_parameter=False, enable_fira_for_adafactor=True
    )
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    before = params[0].detach().clone()
    params[0].grad = gradients(params, 1)[0]
    optimizer.step()
    # Clipped to an RMS of 1 at most; not to nothing.
    assert float((params[0].detach() - before).square().mean().sqrt()) > 0.5


def test_turning_the_limiter_on_and_off_keeps_the_rest() -> None:
    params = parameters([(64, 128)])
    optimizer = a8multi.CAME8bit(params)
    run(optimizer, params, range(2))
    kept = {k: v for k, v in optimizer.state[params[0]].items() if isinstance(v, Tensor)}
    optimizer.param_groups[0]["enable_fira"] = True
    run(optimizer, params, range(2, 3))
    state = optimizer.state[params[0]]
    assert all(state[name] is value for name, value in kept.items())
    assert float(state["update_norm"]) > 0
    optimizer.param_groups[0]["enable_fira"] = False
    run(optimizer, params, range(3, 4))
    assert "update_norm" not in optimizer.state[params[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.999)}, "betas must be three numbers"),
        ({"betas": (0.9, 0.999, 1.0)}, r"betas\[2\]"),
        ({"eps": 1e-30}, "eps must be two numbers"),
        ({"clip_threshold": -1.0}, "clip_threshold"),
        ({"fira_margin": -0.1}, "fira_margin"),
        ({"first_moment": "fp8"}, "first_moment must be one of int8, nf4, bf16, fp32"),
        ({"enable_fira": 1}, "enable_fira must be True or False"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a8multi.CAME8bit(parameters([(8, 8)]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta3": 0.9999}, "set beta1"),
        ({"beta3": 0.9999, "beta1": 0.9, "factored": False}, "leave factored=True"),
        ({"beta3": 1.0, "beta1": 0.9}, "beta3 must be"),
        ({"came_order": "else"}, "came_order must be one of paper, adafactor8bit"),
        ({"fira_margin": float("nan")}, "fira_margin"),
        ({"enable_fira_for_adafactor": "yes"}, "enable_fira_for_adafactor must be True or False"),
    ],
)
def test_bad_options_of_adafactor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a8multi.Adafactor8bit(parameters([(8, 8)]), **options)

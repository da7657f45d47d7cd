"""The float64 references against torch.optim where it has the rule, and against what their papers say in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import adafactor, adam, apollo, rules

TORCH = {
    "adamw": (torch.optim.AdamW, adam.adamw, {"weight_decay": 0.1, "maximize": True}),
    "adam": (torch.optim.Adam, adam.adam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "rmsprop": (torch.optim.RMSprop, rules.rmsprop, {"weight_decay": 0.1}),
    "rmsprop-all": (torch.optim.RMSprop, rules.rmsprop, {"momentum": 0.9, "centered": True, "alpha": 0.9}),
    "sgd": (torch.optim.SGD, rules.sgd, {"weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, rules.sgd, {"momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": (torch.optim.SGD, rules.sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, rules.adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", TORCH)
def test_the_reference_is_torchs_rule(name: str) -> None:
    made, rule, options = TORCH[name]
    ours, theirs = random(50), torch.nn.Parameter(random(50))
    optimizer = made([theirs], lr=0.1, **options)
    moments: Any = rules.zeros(ours) if rule.__module__.endswith("rules") else adam.Moments(ours * 0, ours * 0)
    for step in range(1, 6):
        grad = random(50, seed=step)
        theirs.grad = grad.clone()
        optimizer.step()
        ours, moments = rule(ours, grad, moments, step, lr=0.1, **options)
    assert torch.allclose(ours, theirs.detach(), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, random(50), atol=1e-2)


def test_ademamix_schedules_begin_and_end_where_they_should() -> None:
    betas = (0.9, 0.999, 0.9999)
    assert rules.ademamix_schedules(7, betas, 5.0, None, None) == (5.0, 0.9999)
    assert rules.ademamix_schedules(1000, betas, 5.0, 1000, 1000) == (5.0, 0.9999)
    assert rules.ademamix_schedules(5000, betas, 5.0, 1000, 1000) == (5.0, 0.9999)
    alpha, beta3 = rules.ademamix_schedules(500, betas, 5.0, 1000, 1000)
    assert alpha == 2.5
    # Half way, its half-life is half way too.
    half = [torch.tensor(beta, dtype=torch.float64).log().reciprocal() for beta in (0.9, beta3, 0.9999)]
    assert torch.isclose(half[1], (half[0] + half[2]) / 2, rtol=1e-10)


@pytest.mark.parametrize("rule", [rules.lamb, rules.lars])
def test_trust_ratios_take_no_notice_of_the_gradients_scale(rule: Callable[..., rules.Result]) -> None:
    param, grad = random(40), random(40, seed=1)
    options = {"lr": 0.1, "eps": 0.0}
    small, _ = rule(param, grad * 1e-3, rules.zeros(param), 1, **options)
    large, _ = rule(param, grad * 1e3, rules.zeros(param), 1, **options)
    assert torch.allclose(small, large, rtol=1e-12)
    # A zero parameter has no norm to compare with: the ratio is 1.
    moved, _ = rule(param * 0, grad, rules.zeros(param), 1, **options)
    assert torch.allclose(moved, -0.1 * (grad.sign() if rule is rules.lamb else grad), rtol=1e-12)


def test_came_without_residuals_divides_by_the_paper_epsilon() -> None:
    """A constant gradient from the first step on, beta1 = 0: nothing strays from its average, s = eps2."""
    param, grad = random(4, 6), torch.ones(4, 6, dtype=torch.float64)
    old = adafactor.Moments(param * 0, (param[:, 0] * 0, param[0] * 0), (param[:, 0] * 0, param[0] * 0))
    moved, new = adafactor.came(param, grad, old, lr=0.1, betas=(0.0, 0.0, 0.0), eps=(1e-15, 4.0))
    assert torch.allclose(moved, param - 0.1 / 2.0, rtol=1e-12)
    assert new.confidence is not None
    assert torch.allclose(new.confidence[0], torch.full((4,), 4.0, dtype=torch.float64))


def test_the_limiter_bounds_growth_and_forgets_zero_updates() -> None:
    u = random(30)
    norm = float(u.norm())
    same, last = adafactor.limited(u, 0.0, 1.01)
    assert torch.equal(same, u)
    assert last == pytest.approx(norm)
    grown, last = adafactor.limited(3 * u, last, 1.01)
    assert float(grown.norm()) == pytest.approx(1.01 * norm)
    assert last == pytest.approx(1.01 * norm)
    assert adafactor.limited(u * 0, last, 1.01)[1] == last
    assert adafactor.limited(u * 9, None, 1.01)[1] is None


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_of_full_rank_scales_the_gradient_as_adam_would(scale_type: str) -> None:
    """With P the identity the scaled gradient has the norms of Adam's update, and at the first step its sign."""
    param, grad = random(6, 9), random(6, 9, seed=1)
    old = adam.Moments(grad * 0, grad * 0)
    identity = torch.eye(6, dtype=torch.float64)
    options = {"lr": 0.1, "eps": 0.0}
    moved, _ = apollo.apollo(param, grad, old, 1, identity, scale_type=scale_type, **options)
    step, adams = param - moved, param - adam.adam(param, grad, old, 1, **options)[0]
    dims = {"channel": 0, "tensor": (0, 1)}[scale_type]
    assert torch.allclose(step.norm(dim=dims), adams.norm(dim=dims), rtol=1e-12)
    assert torch.equal(step.sign(), adams.sign())

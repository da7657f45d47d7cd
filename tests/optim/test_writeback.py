"""bfloat16 and float16 parameters written back with stochastic rounding: unbiased, deterministic, and not undone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim.helpers import apply, differences, gradients, parameters, run, snapshot

import a8multi

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_is_unbiased(backend: Any, dtype: torch.dtype) -> None:
    """Decay by a fraction of the spacing: up or down with the probability that keeps the mean.

    The bound is five standard errors of 2^18 independent roundings, each of at most half a spacing of deviation.
    """
    count = 1 << 18
    for value, decay in ((1.5, 1e-3), (-1.25, 3e-4), (1.75, 5e-5)):
        params = [torch.nn.Parameter(torch.full((count,), value, dtype=dtype, device=backend.device))]
        optimizer = a8multi.AdamW8bit(params, lr=1.0, weight_decay=decay, stochastic_rounding_writeback=True)
        apply(optimizer, params, [torch.zeros_like(params[0])])
        spacing = torch.finfo(dtype).eps
        exact = value * (1 - decay)
        fraction = math.modf(abs(exact) / spacing)[0]
        deviation = spacing * math.sqrt(fraction * (1 - fraction) / count)
        mean = float(params[0].detach().double().mean())
        # 16 bits of noise decide a fraction to within half of 2^-16 of a spacing.
        assert abs(mean - exact) < 5 * deviation + spacing * 2.0**-16 + 1e-7
        assert params[0].unique().numel() == 2


@pytest.mark.parametrize("kind", [a8multi.AdamW8bit, a8multi.Adafactor8bit, a8multi.Lion8bit])
def test_weight_decay_does_not_vanish(backend: Any, kind: Any) -> None:
    """Pitfall 15: 1 - 1e-4 is less than half a spacing of bfloat16, so that to nearest nothing ever decays."""
    ends = {}
    for stochastic in (False, True):
        params = [torch.nn.Parameter(torch.full((8192,), 1.5, dtype=torch.bfloat16, device=backend.device))]
        options = {"relative_step": False, "scale_parameter": False} if kind is a8multi.Adafactor8bit else {}
        optimizer = kind(params, lr=1e-3, weight_decay=0.1, stochastic_rounding_writeback=stochastic, **options)
        for _ in range(200):
            apply(optimizer, params, [torch.zeros_like(params[0])])
        ends[stochastic] = float(params[0].detach().double().mean())
    assert ends[False] == 1.5
    assert ends[True] == pytest.approx(1.5 * (1 - 1e-4) ** 200, rel=2e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_updates_are_not_lost(backend: Any, dtype: torch.dtype) -> None:
    """An update of a fiftieth of the spacing arrives, on average, over a hundred steps."""
    params = [torch.nn.Parameter(torch.ones(16384, dtype=dtype, device=backend.device))]
    lr = torch.finfo(dtype).eps / 50
    optimizer = a8multi.AdamW8bit(params, lr=lr, weight_decay=0.0, stochastic_rounding_writeback=True)
    for _ in range(100):
        apply(optimizer, params, [-torch.ones_like(params[0])])
    assert float(params[0].detach().double().mean() - 1) == pytest.approx(100 * lr, rel=0.05)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", [a8multi.AdamW8bit, a8multi.Adafactor8bit, a8multi.SGD8bit, a8multi.LAMB8bit])
def test_deterministic_for_a_seed(backend: Any, kind: Any, dtype: torch.dtype) -> None:
    def trained(seed: int) -> Any:
        params = parameters([(4097,), (65, 300), (33,)], dtype, backend.device)
        options = {"stochastic_rounding": False, "stochastic_rounding_writeback": True}
        optimizer = kind(params, lr=1e-3, seed=seed, **options)
        run(optimizer, params, range(3))
        return snapshot(optimizer, params)

    assert not differences(trained(7), trained(7))
    assert differences(trained(7), trained(8))
    assert differences(trained(7), trained(7 + (1 << 40)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_noise_of_neighbours_is_independent(backend: Any, dtype: torch.dtype) -> None:
    """Which way an element is rounded says nothing of the next, of the next parameter's, or of the next step's."""
    count = 1 << 16
    params = [torch.nn.Parameter(torch.full((count,), 1.5, dtype=dtype, device=backend.device)) for _ in range(2)]
    # Half a spacing down: a coin for each element.
    decay = torch.finfo(dtype).eps / 2 / 1.5
    optimizer = a8multi.AdamW8bit(params, lr=1.0, weight_decay=decay, stochastic_rounding_writeback=True)
    coins = []
    for _ in range(2):
        for param in params:
            param.data.fill_(1.5)
        apply(optimizer, params, [torch.zeros_like(p) for p in params])
        coins.append([(p.detach().cpu().double() < 1.5).double() - 0.5 for p in params])
    a, b, later = coins[0][0], coins[0][1], coins[1][0]
    limit = 5 / math.sqrt(count)
    for what, x, y in (
        ("itself", a, torch.ones_like(a)),
        ("the next element", a[:-1], a[1:]),
        ("the one after it", a[:-2], a[2:]),
        ("the next block's", a[:-128], a[128:]),
        ("the next parameter's", a, b),
        ("the next step's", a, later),
    ):
        correlation = float((x * y).mean()) * (2 if what == "itself" else 4)
        assert abs(correlation) < limit, what


def test_float32_parameters_are_written_as_they_are(backend: Any) -> None:
    """There is nothing to round: the option changes no bit of a float32 run."""
    trained = []
    for stochastic in (False, True):
        params = parameters([(4097,)], device=backend.device)
        optimizer = a8multi.AdamW8bit(params, stochastic_rounding_writeback=stochastic)
        for step in range(3):
            apply(optimizer, params, gradients(params, step))
        trained.append(snapshot(optimizer, params))
    assert not differences(*trained)

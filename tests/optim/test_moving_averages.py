"""Quantised moments over many steps, beside float64 averages of the same gradients: the error must not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import apply, decoded, gradient, gradients, normal, parameters

import a8multi


def _second_moment_error(device: Any, steps: tuple[int, ...], **options: Any) -> list[tuple[float, float]]:
    """Mean and RMS of the relative error of the stored second moment after these steps.

    The first gradient sets the average to ``start``; after that all but two elements a block have the gradient of a
    quarter of it, so that the average falls by less than a thousandth a step. The block's smallest and largest elements
    stay where they are, and with them the codes: one is a step of eight per cent.
    """
    beta2 = 0.999
    start = 10 ** (-6 * torch.rand(4096, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    falls = torch.full((4096,), 0.25, dtype=torch.float64)
    start[0::128], start[1::128] = 1e-7, 1.0
    falls[0::128] = falls[1::128] = 1.0
    params = [torch.nn.Parameter(torch.zeros(4096, device=device))]
    optimizer = a8multi.AdamW8bit(params, lr=0.0, betas=(0.0, beta2), **options)
    first = (start / (1 - beta2)).sqrt().float().to(device)
    later = (start * falls).sqrt().float().to(device)
    found = []
    for step in range(1, max(steps) + 1):
        apply(optimizer, params, [first if step == 1 else later])
        if step in steps:
            exact = start * (falls + (1 - falls) * beta2 ** (step - 1))
            error = (decoded(optimizer.state[params[0]], "exp_avg_sq", (4096,), 128) / exact - 1)[falls < 1]
            found.append((float(error.mean()), float((error**2).mean().sqrt())))
    return found


def test_the_log8_average_does_not_stall(backend: Any) -> None:
    """Each step at beta2 = 0.999 changes the average by less than a hundredth of a code, and still it follows."""
    (mean_300, rms_300), (mean_1000, rms_1000) = _second_moment_error(backend.device, (300, 1000))
    # Stalled it would be 0.9 at step 1000.
    assert abs(mean_300) < 0.02
    assert abs(mean_1000) < 0.035
    # The noise of the roundings that an average holds.
    assert rms_300 < 0.1
    assert rms_1000 < 0.1


@pytest.mark.parametrize("gradients_are", ["zero", "normal"])
def test_wide_blocks_follow_their_average(backend: Any, gradients_are: str) -> None:
    """Blocks over six decades for 1000 steps: no element may drift, alone or together with its block.

    Each step encodes what the last one decoded. The block's extremes must come back as they were: a grid that moves by
    itself carries every element with it, in step with the noise (times 40 by step 1000, with a header too coarse).
    """
    beta2 = 0.999
    random = torch.Generator().manual_seed(5)
    start = 10 ** (-6 * torch.rand(4096, generator=random, dtype=torch.float64))
    params = [torch.nn.Parameter(torch.zeros(4096, device=backend.device))]
    optimizer = a8multi.AdamW8bit(params, lr=0.0, betas=(0.0, beta2))
    exact = torch.zeros(4096, dtype=torch.float64)
    for step in range(1000):
        size = torch.randn(4096, generator=random).double() if gradients_are == "normal" else torch.zeros(())
        grad = (start.sqrt() * (size if step else (1 - beta2) ** -0.5)).float()
        apply(optimizer, params, [grad.to(backend.device)])
        exact = beta2 * exact + (1 - beta2) * grad.double() ** 2
    error = decoded(optimizer.state[params[0]], "exp_avg_sq", (4096,), 128) / exact - 1
    assert abs(float(error.mean())) < 0.02
    assert float((error**2).mean().sqrt()) < 0.2
    assert float(error.abs().max()) < 1.2


def test_rounding_to_nearest_would_stall() -> None:
    """That the measure above can tell: without noise the same average never falls."""
    ((mean, _),) = _second_moment_error("cpu", (1000,), stochastic_rounding=False)
    assert mean > 0.8


def _update_error(make: Any, make_exact: Any, steps: int, device: Any) -> list[float]:
    """||update - exact update|| / ||exact update|| at every step, each with its own state, on the same gradients.

    Gradients with a part that stays, one that drifts slowly and noise, of sizes that differ by row, which is what
    training looks like.
    """
    shape = (64, 128)
    ours, exact = (torch.nn.Parameter(normal(shape, 0, 0.1).to(device)) for _ in range(2))
    optimizer, reference = make([ours]), make_exact([exact])
    size = normal((64, 1), 11).exp() * (0.3 * normal(shape, 14)).exp() * 1e-2
    lasting, drifting = normal(shape, 12), normal(shape, 13)
    errors = []
    for step in range(steps):
        drifting = 0.95 * drifting + 0.3 * normal(shape, 100 + step)
        grad = (size * (0.3 * lasting + 0.5 * drifting + normal(shape, 5000 + step))).to(device)
        before = ours.detach().clone(), exact.detach().clone()
        apply(optimizer, [ours], [grad])
        apply(reference, [exact], [grad])
        update, wanted = (p.detach() - old for p, old in zip((ours, exact), before, strict=True))
        errors.append(float((update - wanted).norm() / wanted.norm()))
    return errors


def _assert_flat(errors: list[float]) -> None:
    """The last fifty steps are no worse than the fifty before the middle: what rounding adds, the averages forget."""
    middle = len(errors) // 2
    assert sum(errors[-50:]) <= 1.15 * sum(errors[middle - 50 : middle]) + 50 * 1e-4


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({}, 0.03, id="int8 log8"),
        pytest.param({"first_moment": "fp32"}, 0.013, id="log8 alone"),
        pytest.param({"second_moment": "fp32"}, 0.028, id="int8 alone"),
        pytest.param({"first_moment": "bf16", "second_moment": "fp32"}, 0.005, id="bf16 alone"),
        pytest.param({"first_moment": "nf4"}, 0.33, id="nf4 log8"),
    ],
)
def test_closed_loop_update_of_adamw(backend: Any, options: dict[str, Any], bound: float) -> None:
    """At every step, and flat. beta2 = 0.98 forgets within these steps; test_the_log8_average is about 0.999."""
    common = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
    errors = _update_error(
        lambda params: a8multi.AdamW8bit(params, **common, **options),
        lambda params: torch.optim.AdamW(params, **common),
        300,
        backend.device,
    )
    assert max(errors) <= bound
    _assert_flat(errors)
    # The rounding was there: the states are not float32.
    assert errors[-1] > 1e-4


def test_closed_loop_update_of_the_defaults(backend: Any) -> None:
    errors = _update_error(a8multi.AdamW8bit, torch.optim.AdamW, 200, backend.device)
    assert max(errors) <= 0.03


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        pytest.param({"factored": False, "block_size": 128}, 0.013, id="full"),
        pytest.param({"beta1": 0.9, "first_moment": "int8"}, 0.022, id="int8"),
        pytest.param({"beta1": 0.9}, 0.3, id="nf4"),
    ],
)
def test_closed_loop_update_of_adafactor(backend: Any, options: dict[str, Any], bound: float) -> None:
    common = {"lr": 1e-2, "beta2": 0.98, "relative_step": False, **options}
    errors = _update_error(
        lambda params: a8multi.Adafactor8bit(params, **common),
        lambda params: a8multi.Adafactor8bit(params, **{**common, "quantize": False}),
        300,
        backend.device,
    )
    assert max(errors) <= bound
    _assert_flat(errors)
    assert errors[-1] > 1e-4


@pytest.mark.parametrize("first", ["int8", "nf4", "bf16", "fp32"])
def test_zero_stays_exactly_zero(backend: Any, first: str) -> None:
    """Pitfall 9: where the gradient has always been zero, state and parameter stay as they are."""
    params = parameters([(8192,)], device=backend.device)
    old = params[0].detach().clone()
    optimizer = a8multi.AdamW8bit(params, weight_decay=0.0, first_moment=first)
    zero = torch.arange(8192) % 3 == 0
    zero[256:512] = True  # whole blocks too
    for step in range(50):
        grad = gradients(params, step)[0]
        grad[zero.to(backend.device)] = 0
        apply(optimizer, params, [grad])
    state = optimizer.state[params[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        assert (decoded(state, name, (8192,), 128)[zero] == 0).all()
    assert torch.equal(params[0][zero.to(backend.device)], old[zero.to(backend.device)])
    assert (decoded(state, "exp_avg_sq", (8192,), 128)[~zero] > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_are_not_kept_in_the_parameter_type(backend: Any, dtype: torch.dtype) -> None:
    """Pitfall 7: beta2 = 0.999 in bfloat16 would never decay. Float32 averages end where float64 ones do."""
    params = parameters([(256,)], dtype, backend.device)
    optimizer = a8multi.AdamW8bit(params, lr=0.0)
    grad = gradient((256,), 3).to(dtype)
    apply(optimizer, params, [grad.to(backend.device)])
    for _ in range(500):
        apply(optimizer, params, [torch.zeros_like(params[0])])
    held = optimizer.state[params[0]]["exp_avg_sq"]
    assert held.dtype == torch.float32
    expected = grad.double() ** 2 * 0.001 * 0.999**500
    big = expected > 1e-30
    assert ((held.cpu().double() / expected - 1)[big].abs() < 1e-4).all()


@pytest.mark.parametrize(
    ("make", "most"),
    [
        pytest.param(a8multi.AdamW8bit, 2.10, id="adamw"),
        pytest.param(lambda params: a8multi.Adafactor8bit(params, beta1=0.9), 0.60, id="adafactor nf4"),
        pytest.param(a8multi.Adafactor8bit, 0.01, id="adafactor"),
        pytest.param(lambda params: a8multi.Adafactor8bit(params, factored=False), 1.04, id="adafactor full"),
    ],
)
def test_bytes_of_state(make: Any, most: float) -> None:
    """What the README promises, in bytes a parameter."""
    params = parameters([(768, 768), (3072, 768)])
    optimizer = make(params)
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    state = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() * v.element_size() for v in state) / sum(p.numel() for p in params) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_small_values_of_lions_average_move(backend: Any, stochastic: bool, dtype: torch.dtype) -> None:
    """Beside an average that stays where it is, each step moves the others by a quarter of a code at most.

    To nearest they stay at zero. By phases they follow the float64 average, on either side of zero, and the largest
    keeps its code.
    """
    params = [torch.nn.Parameter(torch.zeros(33 * 128, dtype=dtype, device=backend.device))]
    optimizer = a8multi.Lion8bit(params, lr=0.0, stochastic_rounding=stochastic)
    grad = torch.linspace(-0.19, 0.19, 33 * 128).to(dtype)
    grad[::128] = torch.where(torch.arange(33) % 2 == 0, 1.0, -1.0).to(dtype)
    first = 100.0 * grad * (grad.abs() == 1.0)  # so that the largest are one from the first step on
    apply(optimizer, params, [first.to(backend.device)])
    for _ in range(200):
        apply(optimizer, params, [grad.to(backend.device)])
    held = decoded(optimizer.state[params[0]], "exp_avg", (33 * 128,), 128)
    large = grad.abs() == 1.0
    codes = optimizer.state[params[0]]["exp_avg"].cpu()
    assert torch.equal(codes[large].double(), 127.0 * grad[large].double())
    if not stochastic:
        assert not held[~large].any()
        return
    error = held[~large] - (1 - 0.99**200) * grad[~large].double()
    assert float(error.mean().abs()) < 1e-3
    assert float(error.square().mean().sqrt()) < 0.75 / 127  # of values up to 21 codes

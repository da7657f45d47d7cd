"""NaN and infinity spread as in torch within their tensor, and into no other; stochastic write-back passes them on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim.helpers import apply, decoded, differences, gradients, parameters, run, snapshot

import a8multi

SHAPES = ((4097,), (65, 300), (129,))
MAKES: dict[str, Any] = {
    "adamw": a8multi.AdamW8bit,
    "adamw nf4": lambda params: a8multi.AdamW8bit(params, first_moment="nf4", min_quantized_numel=0),
    "lion": a8multi.Lion8bit,
    "ademamix": a8multi.AdEMAMix8bit,
    "lamb": a8multi.LAMB8bit,
    "lars": lambda params: a8multi.LARS8bit(params, momentum=0.9),
    "factored": lambda params: a8multi.Adafactor8bit(params, beta1=0.9),
    "full": lambda params: a8multi.Adafactor8bit(params, factored=False),
}
VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_other_tensors_are_as_without_it(backend: Any, make: Any, value: float) -> None:
    """Parameters and states of the others, byte for byte, over the steps that follow too."""
    params, twins = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, expected = make(params), make(twins)
    for step in range(4):
        grads = gradients(params, step)
        apply(expected, twins, [g.clone() for g in grads])
        if step == 1:
            grads[1][3, 5] = value
        apply(optimizer, params, grads)
    found, wanted = snapshot(optimizer, params), snapshot(expected, twins)
    assert not differences(found[::2], wanted[::2])
    assert differences(found[1:2], wanted[1:2])
    assert not params[1].isfinite().all()


@pytest.mark.parametrize("value", VALUES)
def test_float32_state_spreads_as_in_torch(backend: Any, value: float) -> None:
    """Which elements become NaN or infinite, with AdamW: those and no others."""
    params = parameters([(300,), (20, 30)], device=backend.device)
    reference = [p.detach().clone().requires_grad_() for p in params]
    optimizer = a8multi.AdamW8bit(params, first_moment="fp32", second_moment="fp32")
    expected = torch.optim.AdamW(reference)
    for step in range(3):
        grads = gradients(params, step)
        if step == 1:
            grads[0][7] = grads[1][3, 4] = value
        apply(optimizer, params, grads)
        apply(expected, reference, [g.clone() for g in grads])
    for param, wanted in zip(params, reference, strict=True):
        assert torch.equal(param.isfinite(), wanted.isfinite())
        assert not param.isfinite().all()
        torch.testing.assert_close(param, wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("value", VALUES)
def test_a_quantised_moment_loses_one_block(backend: Any, value: float) -> None:
    """Documented: a block of int8 that held it decodes to NaN as a whole; its neighbours are what they would be."""
    params, twins = (parameters([(4096,)], device=backend.device) for _ in range(2))
    optimizer, expected = a8multi.AdamW8bit(params), a8multi.AdamW8bit(twins)
    for step in range(2):
        grads = gradients(params, step)
        apply(expected, twins, [g.clone() for g in grads])
        grads[0][130] = value
        apply(optimizer, params, grads)
    block = slice(128, 256)
    state, wanted = optimizer.state[params[0]], expected.state[twins[0]]
    assert decoded(state, "exp_avg", (4096,), 128)[block].isnan().all()
    for name, size in (("exp_avg", 128), ("exp_avg_sq", 128), ("exp_avg_block", 1), ("exp_avg_sq_block", 1)):
        of_block = slice(block.start * size // 128, block.stop * size // 128)
        for outside in (slice(0, of_block.start), slice(of_block.stop, None)):
            assert torch.equal(state[name][outside], wanted[name][outside]), name
    assert torch.equal(params[0][:128], twins[0][:128])
    assert torch.equal(params[0][256:], twins[0][256:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_write_back_passes_them_unchanged(backend: Any, dtype: torch.dtype) -> None:
    """Pitfall 13: random bits added to a NaN would make it -0.0, added to an infinity a NaN."""
    params = parameters([(4096,)], dtype, backend.device)
    with torch.no_grad():
        params[0][:3] = torch.tensor(VALUES)
    optimizer = a8multi.AdamW8bit(params, lr=1e-3, stochastic_rounding_writeback=True)
    for step in range(50):
        run(optimizer, params, range(step, step + 1))
        values = params[0][:3].tolist()
        assert math.isnan(values[0])
        assert values[1:] == [math.inf, -math.inf]
    assert params[0][3:].isfinite().all()


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], ids=hex)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_write_back_keeps_every_pattern_of_nan(backend: Any, dtype: torch.dtype, pattern: int) -> None:
    """Pitfall 13: 0x7fffffff is what GPUs produce; any bit more and it is -0.0."""
    params = parameters([(512,)], dtype, backend.device)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip(f"torch {torch.__version__} has no gradients of another type than the parameter")
    params[0].grad_dtype = None
    optimizer = a8multi.AdamW8bit(params, stochastic_rounding_writeback=True)
    grad = torch.full((512,), pattern, dtype=torch.int32).view(torch.float32).to(backend.device)
    apply(optimizer, params, [grad])
    assert params[0].isnan().all()


def test_write_back_overflows_to_infinity(backend: Any) -> None:
    """Past the largest float16: infinity, as without noise, and not a NaN."""
    for stochastic in (False, True):
        params = [torch.nn.Parameter(torch.full((64,), 65504.0, dtype=torch.float16, device=backend.device))]
        optimizer = a8multi.AdamW8bit(params, lr=1e5, weight_decay=0.0, stochastic_rounding_writeback=stochastic)
        apply(optimizer, params, [-torch.ones_like(params[0])])
        assert (params[0] == math.inf).all()


def test_infinite_parameters_without_gradient_noise(backend: Any) -> None:
    """An L2 term of weight 0 adds nothing: 0 * infinity would be a NaN."""
    params = [torch.nn.Parameter(torch.full((64,), math.inf, device=backend.device))]
    optimizer = a8multi.Adam8bit(params, weight_decay=0.0)
    apply(optimizer, params, [torch.ones_like(params[0])])
    assert (params[0] == math.inf).all()
    assert optimizer.state[params[0]]["exp_avg"].isfinite().all()

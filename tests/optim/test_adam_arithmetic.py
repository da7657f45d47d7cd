"""Adam and AdamW against torch.optim in float64, and one step at a time against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import DTYPES, EDGE_SHAPES, SMALL_SHAPES, TILE_SHAPE, apply, assert_within, gradients, parameters
from optim.open_loop import check_adam

import a8multi

FLOAT32 = {"first_moment": "fp32", "second_moment": "fp32"}
PAIRS = {"AdamW": (a8multi.AdamW8bit, torch.optim.AdamW), "Adam": (a8multi.Adam8bit, torch.optim.Adam)}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.03},
    "decay": {"weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.9)},
    "no first average": {"betas": (0.0, 0.999)},
    "no second average": {"betas": (0.9, 0.0)},
    "large eps": {"eps": 1e-2},
    "no eps": {"eps": 0.0},
    "zero lr": {"lr": 0.0, "weight_decay": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", PAIRS)
def test_float32_state_equals_torch_in_float64(backend: Any, kind: str, options: dict[str, Any]) -> None:
    ours, theirs = PAIRS[kind]
    shapes = SMALL_SHAPES if options else EDGE_SHAPES
    params = parameters(shapes, device=backend.device)
    reference = [p.detach().cpu().double().requires_grad_() for p in params]
    optimizer = ours(params, **FLOAT32, **options)
    expected = theirs(reference, **options)
    start = [p.detach().clone() for p in reference]
    for step in range(20):
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        apply(expected, reference, [g.cpu().double() for g in grads])
    for param, wanted, old in zip(params, reference, start, strict=True):
        way = (wanted.detach() - old).abs()
        # Half a unit of the last place for each of 20 steps, and the arithmetic of an update.
        bound = 20 * 2.0**-24 * (old.abs() + way) + 4e-6 * way + 2e-6 * float(optimizer.param_groups[0]["lr"])
        assert_within(param, wanted.detach(), bound, kind)
        if param.numel() and options.get("lr") != 0.0:
            assert float(way.min()) > 0, "the reference did not move, so nothing was compared"


def test_many_steps_stay_with_torch(backend: Any) -> None:
    """The averages, the bias corrections and the step count over 500 steps."""
    params = parameters([(200,)], device=backend.device)
    reference = [p.detach().cpu().double().requires_grad_() for p in params]
    optimizer = a8multi.AdamW8bit(params, lr=1e-3, **FLOAT32)
    expected = torch.optim.AdamW(reference, lr=1e-3)
    for step in range(500):
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        apply(expected, reference, [g.cpu().double() for g in grads])
    # The parameter and its decay factor, 1 - lr * weight_decay, are each rounded to float32 at every step.
    wanted = reference[0].detach()
    assert_within(params[0], wanted, 500 * 2.0**-24 * wanted.abs() + 2e-6, "after 500 steps")
    assert optimizer.state[params[0]]["step"] == 500


def test_tile_shape(backend: Any) -> None:
    params = parameters([TILE_SHAPE], device=backend.device)
    optimizer = a8multi.AdamW8bit(params, lr=1e-2)
    for step in range(2):
        check_adam(optimizer, params, gradients(params, step))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", PAIRS)
def test_every_pair_of_types(backend: Any, kind: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """float32 arithmetic whatever the types; a gradient of another type than its parameter."""
    params = parameters([(), (1,), (33,), (129,), (4097,), (16385,)], dtype, backend.device)
    optimizer = PAIRS[kind][0](params, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        # torch refuses such a gradient when it is assigned; backward hooks and torch.nn.Parameter.data produce them.
        grads = gradients(params, step, grad_dtype)
        check_adam(_with_any_gradient(optimizer, params, grads), params, grads)


def _with_any_gradient(optimizer: Any, params: Any, grads: Any) -> Any:
    for param, grad in zip(params, grads, strict=True):
        if grad.dtype != param.dtype:
            if not hasattr(param, "grad_dtype"):
                pytest.skip(f"torch {torch.__version__} has no gradients of another type than the parameter")
            param.grad_dtype = None
    return optimizer


FORMATS = {
    "int8 log8": {},
    "nf4 log8": {"first_moment": "nf4"},
    "bf16 log8": {"first_moment": "bf16"},
    "fp32 log8": {"first_moment": "fp32"},
    "int8 fp32": {"second_moment": "fp32"},
    "nf4 fp32": {"first_moment": "nf4", "second_moment": "fp32"},
    "nearest": {"stochastic_rounding": False},
    "blocks of 32": {"block_size": 32},
    "blocks of 64, nf4": {"block_size": 64, "first_moment": "nf4"},
    "blocks of 4096": {"block_size": 4096},
    "everything quantised": {"min_quantized_numel": 0},
    "everything nf4": {"min_quantized_numel": 0, "first_moment": "nf4"},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_each_step_of_quantised_state_is_exact_but_for_its_storage(backend: Any, options: dict[str, Any]) -> None:
    params = parameters([s for s in EDGE_SHAPES if s != (16383,)], device=backend.device)
    optimizer = a8multi.AdamW8bit(params, lr=1e-2, weight_decay=0.1, **options)
    for step in range(4):
        check_adam(optimizer, params, gradients(params, step, scale=1e-2 * 4.0**-step))


@pytest.mark.parametrize(
    "options", [{"maximize": True}, {"weight_decay": 0.2}, {"betas": (0.0, 0.5), "eps": 0.0}], ids=str
)
def test_each_step_of_quantised_adam(backend: Any, options: dict[str, Any]) -> None:
    params = parameters([(4097,), (65, 300)], device=backend.device)
    optimizer = a8multi.Adam8bit(params, lr=1e-2, **options)
    for step in range(3):
        check_adam(optimizer, params, gradients(params, step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_write_back_of_each_step(backend: Any, dtype: torch.dtype, stochastic: bool) -> None:
    params = parameters(EDGE_SHAPES, dtype, backend.device)
    optimizer = a8multi.AdamW8bit(params, lr=1e-2, stochastic_rounding_writeback=stochastic)
    for step in range(3):
        check_adam(optimizer, params, gradients(params, step))


def test_small_float16_parameters_are_rounded_to_the_subnormals(backend: Any) -> None:
    values = torch.linspace(-(2.0**-13), 2.0**-13, 5001)
    params = [torch.nn.Parameter(values.to(backend.device, torch.float16))]
    optimizer = a8multi.AdamW8bit(params, lr=3e-6)
    for step in range(3):
        check_adam(optimizer, params, gradients(params, step, torch.float16))

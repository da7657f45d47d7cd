"""Adafactor against torch.optim.Adafactor where the options mean the same, and step by step against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import (
    DTYPES,
    EDGE_SHAPES,
    EPSILON,
    SMALL_SHAPES,
    TILE_SHAPE,
    apply,
    assert_within,
    gradients,
    normal,
    parameters,
)
from optim.open_loop import check_adafactor

import a8multi

# torch has nothing else for the size of an update than its own clipping and relative step.
AS_TORCH = {"quantize": False, "scale_weight_decay": False}
# torch factors the last two dimensions of more.
TORCH_SHAPES = tuple(s for s in (*SMALL_SHAPES, (4097,), (65, 300), (16385,)) if len(s) <= 2)
TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr above the relative step": {"lr": 5.0},
    "lr below the relative step": {"lr": 1e-3},
    "decay": {"weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "eps1": {"eps": (1e-3, 1e-3)},
    "eps2": {"eps": (None, 0.5)},
    "wide clip": {"d": 2.0},
    "no clip": {"d": 1e9},
    "decay of beta2": {"beta2_decay": -0.3},
    "no average": {"beta2_decay": 0.0},
}


@pytest.mark.parametrize("options", TORCH_OPTIONS.values(), ids=TORCH_OPTIONS.keys())
def test_float32_state_equals_torch_in_float64(backend: Any, options: dict[str, Any]) -> None:
    params = parameters(TORCH_SHAPES, device=backend.device)
    reference = [p.detach().cpu().double().requires_grad_() for p in params]
    optimizer = a8multi.Adafactor8bit(params, **AS_TORCH, **options)
    eps1, eps2 = options.get("eps", (None, 1e-3))
    # In float64 None would be another number.
    eps = (EPSILON[torch.float32] if eps1 is None else eps1, eps2)
    # A tensor without elements divides by its size in torch.
    alive = [i for i, p in enumerate(params) if p.numel()]
    expected = torch.optim.Adafactor([reference[i] for i in alive], **{**options, "eps": eps})
    start = [p.detach().clone() for p in reference]
    for step in range(20):
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        apply(expected, [reference[i] for i in alive], [grads[i].cpu().double() for i in alive])
    for param, wanted, old in zip(params, reference, start, strict=True):
        way = (wanted.detach() - old).abs()
        bound = 20 * 2.0**-23 * (old.abs() + way) + 2e-5 * float(way.max() if way.numel() else 0)
        assert_within(param, wanted.detach(), bound, f"shape {tuple(param.shape)}")
        if param.numel():
            assert float(way.max()) > 1e-4, "the reference did not move, so nothing was compared"


def test_decay_at_a_bounded_lr_follows_the_bound(backend: Any) -> None:
    """As adafactor8bit, and unlike torch, which decays by lr even where the relative step bounds it."""
    params = parameters([(64,)], device=backend.device)
    old = params[0].detach().clone()
    optimizer = a8multi.Adafactor8bit(params, lr=0.9, weight_decay=0.1, **AS_TORCH)
    for step in range(1, 10):
        old = params[0].detach().clone()
        apply(optimizer, params, [torch.zeros_like(params[0])])
        assert_within(params[0], old.cpu().double() * (1 - min(0.9, step**-0.5) * 0.1), 1e-7, f"step {step}")


ORACLE_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"quantize": False},
    "first moment": {"quantize": False, "beta1": 0.9},
    "no first average": {"quantize": False, "beta1": 0.0},
    "fixed beta2": {"quantize": False, "beta2": 0.99},
    "both corrections": {"quantize": False, "beta1": 0.9, "beta2": 0.99, "relative_step": False},
    "first correction alone": {"quantize": False, "beta1": 0.9, "relative_step": False},
    "no relative step": {"quantize": False, "relative_step": False, "lr": 2.0},
    "no parameter scale": {"quantize": False, "scale_parameter": False},
    "full": {"quantize": False, "factored": False},
    "full, first moment": {"quantize": False, "factored": False, "beta1": 0.9, "beta2": 0.999},
    "no clip": {"quantize": False, "d": 0.0},
    "tight clip": {"quantize": False, "d": 0.01, "beta1": 0.5},
    "decay by alpha": {"quantize": False, "weight_decay": 0.5},
    "decay by alpha, corrected": {"quantize": False, "weight_decay": 0.5, "beta1": 0.9, "relative_step": False},
    "decay by rho": {"quantize": False, "weight_decay": 0.5, "scale_weight_decay": False},
    "maximize": {"quantize": False, "maximize": True, "beta1": 0.9},
    "large eps": {"quantize": False, "eps": (0.05, 1.0)},
    "small eps": {"quantize": False, "eps": (1e-15, 0.0)},
    "full, quantised": {"factored": False},
    "full, quantised to nearest": {"factored": False, "stochastic_rounding": False},
    "nf4": {"beta1": 0.9},
    "nf4, full": {"beta1": 0.9, "factored": False},
    "int8": {"beta1": 0.9, "first_moment": "int8"},
    "int8, full": {"beta1": 0.9, "first_moment": "int8", "factored": False},
    "bf16": {"beta1": 0.9, "first_moment": "bf16"},
    "float32 first": {"beta1": 0.9, "first_moment": "fp32"},
    "small blocks": {"beta1": 0.9, "factored": False, "block_size": 32, "m_block_size": 64},
    "large blocks": {"beta1": 0.9, "factored": False, "block_size": 4096, "m_block_size": 4096},
    "everything quantised": {"beta1": 0.9, "factored": False, "min_8bit_size": 0},
}


@pytest.mark.parametrize("options", ORACLE_OPTIONS.values(), ids=ORACLE_OPTIONS.keys())
def test_each_step_is_exact_but_for_the_storage(backend: Any, options: dict[str, Any]) -> None:
    params = parameters([*SMALL_SHAPES, (4096,), (16385,), (65, 300), (6, 5, 200)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params, **options)
    for step in range(3):
        check_adafactor(optimizer, params, gradients(params, step, scale=1e-2 * 4.0**-step))


def test_tile_shape(backend: Any) -> None:
    params = parameters([TILE_SHAPE, (512, 1024), (2, 2000), (2000, 2)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params, beta1=0.9)
    for step in range(2):
        check_adafactor(optimizer, params, gradients(params, step))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_types(backend: Any, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    params = parameters([(), (33,), (129,), (4097,), (65, 300)], dtype, backend.device)
    optimizer = a8multi.Adafactor8bit(params, beta1=0.9, factored=True)
    for param in params:
        if grad_dtype != dtype and not hasattr(param, "grad_dtype"):
            pytest.skip(f"torch {torch.__version__} has no gradients of another type than the parameter")
        if grad_dtype != dtype:
            param.grad_dtype = None
    for step in range(2):
        check_adafactor(optimizer, params, gradients(params, step, grad_dtype))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_write_back_of_each_step(backend: Any, dtype: torch.dtype, stochastic: bool) -> None:
    params = parameters(EDGE_SHAPES, dtype, backend.device)
    optimizer = a8multi.Adafactor8bit(params, stochastic_rounding_writeback=stochastic)
    for step in range(2):
        check_adafactor(optimizer, params, gradients(params, step))


# --- Pitfalls of Adafactor that others shipped. ---


def test_eps_of_each_parameter_is_that_of_its_own_type(backend: Any) -> None:
    """Pitfall 1: the first parameter's type does not leak into the others, whatever the order."""

    def step(order: tuple[int, ...]) -> list[torch.Tensor]:
        dtypes = (torch.bfloat16, torch.float32)
        # Gradients far below bfloat16's epsilon, so that eps1 is what bounds the update.
        params = [torch.nn.Parameter(normal((64,), 3).to(backend.device, dtype)) for dtype in dtypes]
        optimizer = a8multi.Adafactor8bit([params[i] for i in order], d=0.0)
        apply(optimizer, params, [torch.full_like(p, 1e-5) for p in params])
        return [(p.detach().cpu().float() - normal((64,), 3)).abs().max() for p in params]

    assert step((0, 1)) == step((1, 0))
    # alpha is about lr: u = 1e-5 / 1.2e-7 is clipped to 1 by the root for float32, and is 1e-5 / 0.0078 for bfloat16.
    assert float(step((1, 0))[1]) > 5e-3


@pytest.mark.parametrize("eps1", [None, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_never_give_nan(backend: Any, dtype: torch.dtype, eps1: float | None) -> None:
    """Pitfalls 4 and 6: nor at the first step, nor where eps1 underflows."""
    params = parameters([(5,), (4, 6), (4097,), (3, 4, 5), ()], dtype, backend.device)
    old = [p.detach().clone() for p in params]
    optimizer = a8multi.Adafactor8bit(params, eps=(eps1, 1e-3), beta1=0.9, factored=True)
    for _ in range(3):
        apply(optimizer, params, [torch.zeros_like(p) for p in params])
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))
    run_after = gradients(params, 0)
    apply(optimizer, params, run_after)
    assert all(p.isfinite().all() for p in params)


def test_rows_and_columns_without_gradient(backend: Any) -> None:
    """An embedding: most rows are zero, and must neither move nor spoil the others."""
    params = parameters([(50, 20)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params, eps=(1e-30, 1e-3))
    grad = gradients(params, 0)[0]
    grad[1:] = 0
    grad[:, 3] = 0
    old = params[0].detach().clone()
    for _ in range(3):
        apply(optimizer, params, [grad])
    moved = (params[0] != old).cpu()
    assert params[0].isfinite().all()
    assert not moved[1:].any()
    assert not moved[:, 3].any()
    assert int(moved.sum()) == 19


def test_momentum_averages_gradients_before_they_are_scaled(backend: Any) -> None:
    """Pitfall 5: m / sqrt(v) is scaled, clipped and stepped by; it is not an average of such updates."""
    params = [torch.nn.Parameter(torch.zeros(1, device=backend.device))]
    options = {"scale_parameter": False, "relative_step": False, "beta1": 0.5, "beta2": 0.5, "d": 0.0}
    optimizer = a8multi.Adafactor8bit(params, lr=1.0, **options)
    apply(optimizer, params, [torch.tensor([2.0], device=backend.device)])
    # m = 1, v = 2; corrected by sqrt(0.5) / 0.5: exactly 1.
    assert params[0].item() == pytest.approx(-1.0, rel=1e-6)
    optimizer.param_groups[0]["lr"] = 0.1
    apply(optimizer, params, [torch.tensor([-4.0], device=backend.device)])
    # m = 0.5 - 2 = -1.5, v = 1 + 8 = 9; corrected by sqrt(0.75) / 0.75.
    assert params[0].item() == pytest.approx(-1.0 + 0.1 * 1.5 / 3 * 0.75**-0.5, rel=1e-6)


def test_convolution_is_factored_compactly(backend: Any) -> None:
    """Pitfall 3: 64 + 576 numbers for a convolution of 64 x 64 x 3 x 3, not 64 * 64 * (3 + 3)."""
    params = parameters([(64, 64, 3, 3)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params)
    check_adafactor(optimizer, params, gradients(params, 0))
    state = optimizer.state[params[0]]
    assert (tuple(state["row_var"].shape), tuple(state["col_var"].shape)) == ((64,), (576,))
    assert "exp_avg_sq" not in state

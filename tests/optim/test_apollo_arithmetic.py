"""APOLLO step by step against the float64 oracle, with Adafactor's options and quantised moments; bfloat16 products.

As in open_loop.py: the state as it is stored, what float64 arithmetic makes of it, and no error that adds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BackendCase
from optim.helpers import EPSILON, apply, assert_within, decoded, gradients, parameters
from optim.open_loop import assert_stored, assert_written
from oracle import adafactor, apollo
from torch import Tensor

import a8multi
from a8multi.backend.torch_formats import random_integers
from a8multi.plan import matrix_shape

# Both ways round, a square, one of four dimensions, a vector.
SHAPES = ((64, 96), (96, 64), (48, 48), (16, 3, 5, 5), (300,))
RANK, GAP = 8, 2
STEPS = 3
# What is lost of an element's update with float32 products, relative.
ROUNDING = 3e-6
# And of a whole matrix's with bfloat16 products, whose result is rounded to it, times sqrt(rank): over a channel's
# elements of R the roundings average out. Decision 0013.
BF16_PRODUCTS = 2.0**-8
# The worst channel, in units of the whole matrix.
_WORST = 4
_SHORT, _FLUSHED = 8 * 2.0**-24, 1.2e-38


class Projected(NamedTuple):
    """A projected parameter's shapes. ``turned``: its smaller dimension is the second."""

    rows: int
    cols: int
    rank: int

    @property
    def turned(self) -> bool:
        return self.rows >= self.cols

    def wide(self, value: Tensor) -> Tensor:
        """A matrix as the paper has it, with the smaller dimension first."""
        return value.T if self.turned else value

    @property
    def low(self) -> tuple[int, int]:
        """Shape of what is stored of R."""
        return (self.rows, self.rank) if self.turned else (self.rank, self.cols)

    def matrix(self, seed: int, interval: int) -> Tensor:
        """P as the state knows it: integers, which are 2 sqrt(rank) times the paper's."""
        size = min(self.rows, self.cols)
        drawn = random_integers(seed, interval, size, self.rank * size, torch.device("cpu"))
        return drawn.double().view(self.rank, size)


def projected(param: Tensor, group: dict[str, Any]) -> Projected | None:
    if not group["apollo_rank"] or param.ndim < 2:
        return None
    rows, cols = matrix_shape(param.shape)
    return Projected(rows, cols, min(group["apollo_rank"], rows, cols))


def _interval(step: int, group: dict[str, Any]) -> int:
    return int((step - 1) // group["apollo_update_proj_gap"])


def _moments(state: dict[str, Any], group: dict[str, Any], param: Tensor, p: Projected | None) -> adafactor.Moments:
    """The moments before a step, of a projected parameter with the smaller dimension first."""
    shape = tuple(param.shape) if p is None else p.low
    sizes = {"exp_avg": group["m_block_size"], "exp_avg_sq": group["block_size"]}
    held: dict[str, Any] = {name: decoded(state, name, shape, size) for name, size in sizes.items() if name in state}
    zeros = torch.zeros(shape, dtype=torch.float64)
    first = held.get("exp_avg", None if group["beta1"] is None else zeros)
    second = held.get("exp_avg_sq", zeros)
    if group["apollo_factorize"] and p is not None:
        means = (state["row_var"], state["col_var"]) if state else (zeros[:, 0], zeros[0])
        row, col = (mean.cpu().double() for mean in means)
        second = (col, row) if p.turned else (row, col)
    elif p is not None:
        second = p.wide(second)
    norm = None if p is None else float(state.get("update_norm", 0.0))
    return adafactor.Moments(first if first is None or p is None else p.wide(first), second, None, norm)


def _expected(
    p: Projected | None,
    param: Tensor,
    grad: Tensor,
    old: adafactor.Moments,
    step: int,
    group: dict[str, Any],
    eps1: float,
) -> tuple[Tensor, adafactor.Moments]:
    """The oracle's step, on the parameter in its own shape. eps1: of what is not projected."""
    shared = ("beta1", "beta2", "beta2_decay", "maximize", "relative_step", "scale_parameter", "d")
    options = {name: group[name] for name in (*shared, "weight_decay", "scale_weight_decay")}
    options |= {"lr": float(group["lr"]), "eps2": group["eps"][1]}
    if p is None:
        return adafactor.adafactor(param, grad, old, step, eps1=eps1, **options)
    matrix = [p.wide(each.reshape(p.rows, p.cols)) for each in (param, grad)]
    drawn = p.matrix(group["seed"], _interval(step, group))
    unit = 2 * math.sqrt(p.rank)
    new, moments = apollo.adafactor_apollo(
        *matrix,
        old,
        step,
        drawn,
        eps=group["apollo_eps"],
        scale=math.sqrt(group["apollo_scale"]) * unit,
        scale_type=group["apollo_scale_type"],
        growth=1 + group["fira_margin"],
        **options,
    )
    return p.wide(new).reshape(param.shape), moments


def _check_moments(
    state: dict[str, Any],
    group: dict[str, Any],
    p: Projected,
    new: adafactor.Moments,
    error: Tensor,
    loss: float,
    what: str,
) -> None:
    """What is stored of R after a step. error: of R itself. loss: of the update's norm, relative."""
    if new.first is not None:
        exact = p.wide(new.first)
        lost = _SHORT * exact.abs() + p.wide(error) + _FLUSHED
        assert_stored(state, "exp_avg", exact, lost, group["m_block_size"], f"exp_avg of {what}")
    if isinstance(new.second, tuple):
        row, col = new.second[::-1] if p.turned else new.second
        for name, mean in (("row_var", row), ("col_var", col)):
            assert_within(state[name], mean, 1e-5 * mean + _FLUSHED, f"{name} of {what}")
    else:
        exact = p.wide(new.second)
        # Of the square of R: v is at least (1 - beta2) R^2, and its error 2 (1 - beta2) |R| times that of R.
        lost = _SHORT * exact + p.wide(2 * (new.second.sqrt() + error) * error) + _FLUSHED
        loose = group["stochastic_rounding"]
        assert_stored(state, "exp_avg_sq", exact, lost, group["block_size"], f"exp_avg_sq of {what}", loose)
    norm = torch.tensor(new.norm)
    assert_within(state["update_norm"], norm, loss * norm, f"update_norm of {what}")


def check(optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Takes one step with these gradients and checks every parameter and its state."""
    group = optimizer.param_groups[0]
    before = []
    for param in params:
        state = optimizer.state.get(param, {})
        p = projected(param, group)
        before.append((param.detach().cpu().double(), p, _moments(state, group, param, p), state.get("step", 0) + 1))

    apply(optimizer, params, grads)

    for i, (param, grad, (value, p, old, step)) in enumerate(zip(params, grads, before, strict=True)):
        what = f"parameter {i} of shape {tuple(param.shape)} at step {step}"
        g, state = grad.cpu().double(), optimizer.state[param]
        eps1 = EPSILON[param.dtype] if group["eps"][0] is None else group["eps"][0]
        expected, new = _expected(p, value, g, old, step, group, eps1)
        assert state["step"] == step, what
        rounded = p is not None and grad.dtype is torch.bfloat16
        loss = BF16_PRODUCTS / math.sqrt(p.rank) if p is not None and rounded else ROUNDING
        update = (expected - value).abs() + value.abs() * group["weight_decay"] * float(group["lr"])
        error = (_WORST if rounded else 1) * loss * update + _SHORT * value.abs() + _FLUSHED
        assert_written(param, expected, error, group["stochastic_rounding_writeback"], what)
        assert float(update.norm()) > 0, what
        if p is not None:
            wide, matrix = p.wide(g.reshape(p.rows, p.cols)), p.matrix(group["seed"], _interval(step, group))
            lost = _SHORT * (matrix.abs() @ wide.abs()) + (2.0**-8 * (matrix @ wide).abs() if rounded else 0.0)
            _check_moments(state, group, p, new, lost, loss, what)


# lr so large that relative_step bounds it at the third step.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "first moment": {"beta1": 0.9},
    "no first average": {"beta1": 0.0, "beta2": 0.99, "relative_step": False},
    "beta2": {"beta2": 0.99},
    "no first moment": {"beta2": 0.99, "relative_step": False},
    "both corrections": {"beta1": 0.9, "beta2": 0.99, "relative_step": False},
    "first correction alone": {"beta1": 0.9, "relative_step": False},
    "decay of beta2": {"beta2_decay": -0.3},
    "factorized": {"apollo_factorize": True},
    "factorized, first moment": {"apollo_factorize": True, "beta1": 0.9},
    "factorized, both corrections": {"apollo_factorize": True, "beta1": 0.9, "beta2": 0.99, "relative_step": False},
    "factorized, no first moment": {"apollo_factorize": True, "beta2": 0.99, "relative_step": False},
    "tensor": {"apollo_scale_type": "tensor", "apollo_scale": 128.0, "apollo_rank": 1, "beta1": 0.9},
    "no parameter scale": {"scale_parameter": False},
    "no clip": {"d": 0.0},
    "tight clip": {"d": 0.01, "beta1": 0.5},
    "decay by alpha": {"weight_decay": 0.5},
    "decay by rho": {"weight_decay": 0.5, "scale_weight_decay": False},
    "maximize": {"maximize": True, "beta1": 0.9, "weight_decay": 0.1},
    "wide margin": {"fira_margin": 0.5},
    "large eps2": {"eps": (None, 1.0)},
}


def _adafactor(params: Any, **options: Any) -> Any:
    options = {"lr": 0.6, "apollo_rank": RANK, "apollo_update_proj_gap": GAP, "quantize": False, **options}
    return a8multi.Adafactor8bit(params, **options)


def _gradients(params: Any, step: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Of sizes that jump, so that the limiter has something to do."""
    return [g * (1 + 4 * (step % 3 == 2)) for g in gradients(params, step, dtype)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_float32_state(options: dict[str, Any], backend: BackendCase) -> None:
    params = parameters(SHAPES, device=backend.device)
    optimizer = _adafactor(params, **options)
    for step in range(STEPS):
        check(optimizer, params, _gradients(params, step))


STORED: dict[str, dict[str, Any]] = {
    "int8": {"beta1": 0.9, "first_moment": "int8"},
    "nf4": {"beta1": 0.9, "first_moment": "nf4"},
    "bf16": {"beta1": 0.9, "first_moment": "bf16"},
    "second alone": {},
    "to nearest": {"beta1": 0.9, "stochastic_rounding": False},
    "small blocks": {"beta1": 0.9, "block_size": 32, "m_block_size": 64},
    "factorized": {"beta1": 0.9, "apollo_factorize": True},
    "as adam": {"beta1": 0.9, "beta2": 0.99, "relative_step": False, "scale_parameter": False, "d": 0.0},
    "mini": {"beta1": 0.9, "apollo_rank": 1, "apollo_scale_type": "tensor", "apollo_scale": 128.0},
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED.keys())
def test_each_step_is_exact_but_for_the_storage(options: dict[str, Any], backend: BackendCase) -> None:
    params = parameters(SHAPES, device=backend.device)
    optimizer = _adafactor(params, quantize=True, min_8bit_size=0, **options)
    for step in range(STEPS):
        check(optimizer, params, _gradients(params, step))
    assert optimizer.state[params[0]]["exp_avg" if "beta1" in options else "exp_avg_sq"].dtype is not torch.float32


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("options", [{"quantize": False}, {"min_8bit_size": 0}], ids=["float32", "quantised"])
def test_bfloat16_parameters(options: dict[str, Any], stochastic: bool, backend: BackendCase) -> None:
    """They start at zero, so that it is their update that is rounded when it is written."""
    params = parameters(SHAPES, torch.bfloat16, backend.device)
    optimizer = _adafactor(params, beta1=0.9, stochastic_rounding_writeback=stochastic, **options)
    for step in range(STEPS):
        with torch.no_grad():
            torch._foreach_zero_(params)
        check(optimizer, params, _gradients(params, step))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(("shape", "rank", "scale_type"), [
    ((64, 96), 8, "channel"),
    ((96, 64), 64, "channel"),
    ((512, 1024), 8, "channel"),
    ((512, 1024), 64, "channel"),
    ((1024, 512), 256, "channel"),
    ((512, 1024), 64, "tensor"),
    ((1024, 512), 1, "tensor"),
])  # fmt: skip
def test_the_error_of_bfloat16_products(
    shape: tuple[int, int], rank: int, scale_type: str, backend: BackendCase
) -> None:
    """Of the update, against float64 steps with moments of their own and the same gradients; lr=1 from zero, so that
    the float32 parameter is the update."""
    param = torch.nn.Parameter(torch.zeros(shape, device=backend.device))
    if not hasattr(param, "grad_dtype"):
        pytest.skip(f"torch {torch.__version__} has no gradients of another type than the parameter")
    param.grad_dtype = None
    options = {"scale_type": scale_type, "update_proj_gap": GAP, "fira_margin": 1e3, "quantize": False}
    optimizer = a8multi.APOLLO8bit([param], lr=1.0, rank=rank, **options)
    group = optimizer.param_groups[0]
    p = projected(param, group)
    held, errors = _moments({}, group, param, p), []
    for step in range(1, 5):
        with torch.no_grad():
            param.zero_()
        (grad,) = gradients([param], step, torch.bfloat16)
        apply(optimizer, [param], [grad])
        zero = torch.zeros(shape, dtype=torch.float64)
        expected, held = _expected(p, zero, grad.cpu().double(), held, step, group, 0.0)
        errors.append(float((param.detach().cpu() - expected).norm() / expected.norm()))
    assert max(errors) <= BF16_PRODUCTS / math.sqrt(rank), errors

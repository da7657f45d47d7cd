"""One step judged by itself: from the state as it is stored, to what float64 arithmetic makes of it.

The moments before the step are decoded, the float64 oracle takes the step, and parameter and state after it must lie
within the rounding of float32 arithmetic plus that of their own storage. No error adds up, so the bounds are tight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import adafactor, adam
from torch import Tensor

from a8multi.plan import matrix_shape

from .helpers import EPSILON, apply, assert_within, code_spacing, decoded, spacing

# Rounding of a short float32 expression, relative; and what is lost where subnormals are flushed.
_SHORT = 8 * 2.0**-24
_FLUSHED = 1.2e-38
# The same for a quotient of sums over a whole matrix.
_LONG = 1e-5


def check_adam(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Takes one step of AdamW8bit or Adam8bit with these gradients and checks every parameter and its state."""
    rule = adam.adamw if type(optimizer).__name__ == "AdamW8bit" else adam.adam
    group = optimizer.param_groups[0]
    names = ("betas", "eps", "weight_decay", "maximize")
    options = {name: group[name] for name in names} | {"lr": float(group["lr"])}
    block_size = group["block_size"]
    before = []
    for param in params:
        p = param.detach().cpu().double()
        state = optimizer.state.get(param)
        if state:
            first = decoded(state, "exp_avg", p.shape, block_size)
            old = adam.Moments(first, decoded(state, "exp_avg_sq", p.shape, block_size))
        else:
            old = adam.Moments(torch.zeros_like(p), torch.zeros_like(p))
        before.append((p, old, (state or {"step": 0})["step"] + 1))

    apply(optimizer, params, grads)

    for i, (param, grad, (p, old, step)) in enumerate(zip(params, grads, before, strict=True)):
        if not param.numel():
            continue
        what = f"parameter {i} of shape {tuple(param.shape)} at step {step}"
        g = grad.detach().cpu().double()
        expected, new = rule(p, g, old, step, **options)
        state = optimizer.state[param]
        assert state["step"] == step, what
        effective = g.abs() + (options["weight_decay"] * p.abs() if rule is adam.adam else 0.0)
        first_error = _SHORT * (old.first.abs() + effective) + _FLUSHED
        # Of the L2 sum: where gradient and decay cancel, the square keeps their rounding.
        second_error = _SHORT * (new.second + (1 - options["betas"][1]) * effective**2) + _FLUSHED
        assert_stored(state, "exp_avg", new.first, first_error, block_size, f"exp_avg of {what}")
        loose = group["stochastic_rounding"]
        assert_stored(state, "exp_avg_sq", new.second, second_error, block_size, f"exp_avg_sq of {what}", loose)

        root = (new.second / (1 - options["betas"][1] ** step)).sqrt() + options["eps"]
        root_error = (second_error / (1 - options["betas"][1] ** step)) / root
        update = adam.update(new, step, options["betas"], options["eps"]).abs()
        lost = first_error / (1 - options["betas"][0] ** step) / root + update * (root_error / root + _SHORT)
        error = options["lr"] * lost + _SHORT * p.abs() + _FLUSHED
        assert_written(param, expected, error, group["stochastic_rounding_writeback"], what)


def check_adafactor(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Takes one step of Adafactor8bit with these gradients and checks every parameter and its state."""
    group = optimizer.param_groups[0]
    names = ("beta1", "beta2", "beta2_decay", "weight_decay", "d", "maximize", "relative_step", "scale_parameter")
    options = {name: group[name] for name in (*names, "scale_weight_decay")} | {"lr": float(group["lr"])}
    before = [(p.detach().cpu().double(), _adafactor_moments(optimizer, p, group)) for p in params]
    steps = [optimizer.state[p]["step"] + 1 if optimizer.state.get(p) else 1 for p in params]

    apply(optimizer, params, grads)

    for i, (param, grad, (p, old), step) in enumerate(zip(params, grads, before, steps, strict=True)):
        if not param.numel():
            continue
        what = f"parameter {i} of shape {tuple(param.shape)} at step {step}"
        eps1, eps2 = group["eps"]
        eps1 = EPSILON[param.dtype] if eps1 is None else eps1
        g = grad.detach().cpu().double()
        expected, new = adafactor.adafactor(p, g, old, step, eps1=eps1, eps2=eps2, **options)
        state = optimizer.state[param]
        assert state["step"] == step, what
        first_error = torch.zeros(())
        if new.first is not None:
            assert old.first is not None
            first_error = _SHORT * (old.first.abs() + g.abs()) + _FLUSHED
            assert_stored(state, "exp_avg", new.first, first_error, group["m_block_size"], f"exp_avg of {what}")
        if isinstance(new.second, tuple):
            for name, mean in zip(("row_var", "col_var"), new.second, strict=True):
                assert_within(state[name], mean, _LONG * mean + _FLUSHED, f"{name} of {what}")
        else:
            loose = group["stochastic_rounding"]
            error = _SHORT * new.second + _FLUSHED
            block_size = group["block_size"]
            assert_stored(state, "exp_avg_sq", new.second, error, block_size, f"exp_avg_sq of {what}", loose)
        # The whole update's size, which the sums' rounding scales, and each element's own.
        size = (expected - p).abs() + p.abs() * options["weight_decay"] * options["lr"]
        roots = adafactor.root(new.second, tuple(p.shape), eps1)
        factor = float(size.sum() / ((g if new.first is None else new.first).abs() / roots).sum().clamp(min=1e-30))
        error = _LONG * size + factor * first_error / roots + _SHORT * p.abs() + _FLUSHED
        assert_written(param, expected, error, group["stochastic_rounding_writeback"], what)


def _adafactor_moments(optimizer: torch.optim.Optimizer, param: Tensor, group: dict[str, Any]) -> adafactor.Moments:
    state, shape = optimizer.state.get(param), param.shape
    first: Tensor | None = None
    second: Tensor | tuple[Tensor, Tensor]
    if state:
        if "exp_avg" in state:
            first = decoded(state, "exp_avg", shape, group["m_block_size"])
        if "row_var" in state:
            second = (state["row_var"].cpu().double(), state["col_var"].cpu().double())
        else:
            second = decoded(state, "exp_avg_sq", shape, group["block_size"])
        return adafactor.Moments(first, second)
    if group["beta1"] is not None:
        first = torch.zeros(shape, dtype=torch.float64)
    if param.ndim >= 2 and group["factored"] and param.numel():
        rows, cols = matrix_shape(shape)
        second = (torch.zeros(rows, dtype=torch.float64), torch.zeros(cols, dtype=torch.float64))
    else:
        second = torch.zeros(shape, dtype=torch.float64)
    return adafactor.Moments(first, second)


def assert_stored(
    state: dict[str, Any],
    name: str,
    exact: Tensor,
    error: Tensor,
    block_size: int,
    what: str,
    stochastic: bool = False,
) -> None:
    """The moment decodes to ``exact`` within the arithmetic's error and half a code; a whole one if stochastic."""
    half = code_spacing(state, name, exact, block_size)
    held = decoded(state, name, exact.shape, block_size)
    is_log8 = f"{name}_block" in state and state[f"{name}_block"].dtype == torch.int32
    by_phases = stochastic and (is_log8 or state[name].dtype == torch.int8)
    codes = 2.001 if by_phases else 1.001
    # The error is amplified where a stored value is moved over the middle between two codes: once more.
    assert_within(held, exact, codes * half + 2 * error, what)
    if f"{name}_block" in state and not is_log8:
        assert_scales(state, name, exact, error, block_size, what)


def assert_scales(state: dict[str, Any], name: str, exact: Tensor, error: Tensor, block_size: int, what: str) -> None:
    """A block's largest magnitude is what its largest code stands for, so that no code is wasted."""
    levels = 127.0 if state[name].dtype == torch.int8 else 1.0
    blocks = torch.nn.functional.pad(exact.abs().reshape(-1), (0, -exact.numel() % block_size)).view(-1, block_size)
    largest = blocks.amax(1)
    bound = float(error.max()) + _SHORT * largest
    assert_within(state[f"{name}_block"].cpu().double() * levels, largest, bound, f"scale of {what}")


def assert_written(param: Tensor, exact: Tensor, error: Tensor, stochastic: bool, what: str) -> None:
    """The parameter is ``exact`` rounded to its type: to nearest, or to either neighbour."""
    if param.dtype is torch.float32:
        assert_within(param, exact, error, what)
        return
    whole = spacing(exact, param.dtype)
    assert_within(param, exact, error + whole * (1.001 if stochastic else 0.501), what)

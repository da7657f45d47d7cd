"""The element-wise rules in plain torch operations: native/include/a8/rules.h, one operation at a time in its order.

Each rule is a function of parameter, gradient and moments, all float32 [n]. It moves the moments and returns the
update u; then p <- p * decay - step_size * u. The sources of the formulas stand in rules.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind
from a8multi.plan import Item
from a8multi.plan.step_plan import has_norm

from . import torch_formats as formats
from . import torch_step as step
from .torch_formats import add, constant, div, mul, sqrt, sub
from .torch_step import Hyper, Moments


@dataclass(frozen=True)
class Rule:
    """``a8_rule``: what an update needs besides ``Hyper``.

    Attributes:
        decay: of the parameter; 1 where weight decay is part of the gradient or of the update.
        l2: weight decay where it is added to the gradient, else 0.
        in_update: weight decay where it is added to the update, else 0.
        step_size: lr and all that scales the update.
        local: LARS: what scales the gradient.
    """

    hyper: Hyper
    decay: float
    l2: float
    in_update: float
    step_size: float | Tensor
    local: float | Tensor = 1.0

    @classmethod
    def of(cls, hyper: Hyper, kind: RuleKind) -> Rule:
        l2, inside = bool(hyper.flags & Flag.L2_DECAY), has_norm(kind)
        lr = np.float32(hyper.lr)
        with np.errstate(all="ignore"):
            decay = step.ONE - step.flushed(lr * np.float32(hyper.weight_decay))
            corrected = step.flushed(lr * np.float32(hyper.bias1))
        return cls(
            hyper,
            decay=1.0 if l2 or inside else float(decay),
            l2=hyper.weight_decay if l2 and not inside else 0.0,
            in_update=hyper.weight_decay if inside else 0.0,
            step_size=float(corrected if kind in (RuleKind.ADAM, RuleKind.ADAGRAD) else lr),
        )

    def gradient(self, item: Item, grad: Tensor, p: Tensor, start: int, stop: int) -> Tensor:
        """What the moments see. With no L2 term the gradient is untouched: 0 * p is not 0 for an infinite p."""
        g = step.gradient(grad, self.hyper, start, stop)
        return add(g, mul(p, self.l2)) if self.l2 != 0.0 else g


Update = Callable[[Rule, Tensor, Tensor, Moments], Tensor]


# --- Averages that several rules have. ---


def _first(rule: Rule, m: Moments, g: Tensor) -> Tensor:
    return add(mul(m.first, rule.hyper.beta1), mul(g, rule.hyper.one_minus_beta1))


def _second(rule: Rule, m: Moments, g: Tensor) -> Tensor:
    return add(mul(m.second, rule.hyper.beta2), mul(mul(g, rule.hyper.one_minus_beta2), g))


def _third(rule: Rule, m: Moments, g: Tensor) -> Tensor:
    return add(mul(m.third, rule.hyper.beta3), mul(g, rule.hyper.one_minus_beta3))


def _root(rule: Rule, v: Tensor) -> Tensor:
    return add(mul(sqrt(v), rule.hyper.bias2), rule.hyper.eps)


# --- The rules. ---


def _adam(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.first, m.second = _first(rule, m, g), _second(rule, m, g)
    return div(m.first, _root(rule, m.second))


def _lion(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    c = _first(rule, m, g)
    m.first = add(mul(m.first, rule.hyper.beta2), mul(g, rule.hyper.one_minus_beta2))
    # torch.sign turns NaN into 0; here it stays NaN, and zeros keep their sign.
    return torch.where(c > 0, 1.0, torch.where(c < 0, -1.0, c))


def _rmsprop(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.second, m.third = _second(rule, m, g), _third(rule, m, g)
    variance = sub(m.second, mul(m.third, m.third))
    u = div(g, _root(rule, torch.where(variance < 0, 0.0, variance)))
    m.first = add(mul(m.first, rule.hyper.beta1), u)
    return m.first


def _with_nesterov(rule: Rule, g: Tensor, momentum: Tensor) -> Tensor:
    return add(g, mul(momentum, rule.hyper.beta1)) if rule.hyper.flags & Flag.NESTEROV else momentum


def _sgd(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.first = _first(rule, m, g)
    return _with_nesterov(rule, g, m.first)


def _adagrad(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.second = add(m.second, mul(g, g))
    return div(g, _root(rule, m.second))


def _ademamix(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.first, m.second, m.third = _first(rule, m, g), _second(rule, m, g), _third(rule, m, g)
    mixed = add(mul(m.first, rule.hyper.bias1), mul(m.third, rule.hyper.mix))
    return div(mixed, _root(rule, m.second))


def _lamb(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    m.first, m.second = _first(rule, m, g), _second(rule, m, g)
    u = div(mul(m.first, rule.hyper.bias1), _root(rule, m.second))
    return add(u, mul(p, rule.in_update)) if rule.in_update != 0.0 else u


def _lars(rule: Rule, p: Tensor, g: Tensor, m: Moments) -> Tensor:
    scaled = mul(add(g, mul(p, rule.in_update)) if rule.in_update != 0.0 else g, rule.local)
    m.first = _first(rule, m, scaled)
    return _with_nesterov(rule, scaled, m.first)


_UPDATES: dict[RuleKind, Update] = {
    RuleKind.ADAM: _adam,
    RuleKind.LION: _lion,
    RuleKind.RMSPROP: _rmsprop,
    RuleKind.SGD: _sgd,
    RuleKind.ADAGRAD: _adagrad,
    RuleKind.ADEMAMIX: _ademamix,
    RuleKind.LAMB: _lamb,
    RuleKind.LARS: _lars,
}


# --- Norms of the whole tensor. ---


def _ratio_of_norms(rule: Rule, kind: RuleKind, param_squares: Tensor, squares: Tensor) -> Rule:
    """With LAMB's trust ratio or LARS's coefficient, which are 1 where a norm is zero."""
    hyper, p, u = rule.hyper, sqrt(param_squares), sqrt(squares)
    both = (p > 0) & (u > 0)
    if kind == RuleKind.LAMB:
        trust = torch.where(both, div(p, u), 1.0)
        return replace(rule, step_size=mul(trust, hyper.lr))
    whole = add(add(u, mul(p, hyper.weight_decay)), hyper.eps)
    return replace(rule, local=torch.where(both, div(mul(p, hyper.trust), whole), 1.0))


def _measured(item: Item, grad: Tensor, rule: Rule, kind: RuleKind) -> Rule:
    """The sums are added in torch's order: the libraries' differ in the last places."""
    param_squares, squares = constant(0.0, item.param), constant(0.0, item.param)
    for start, stop in step.slices(item.param.numel()):
        p = formats.load(item.param, start, stop)
        u = rule.gradient(item, grad, p, start, stop)
        if kind == RuleKind.LAMB:
            u = _lamb(rule, p, u, Moments.of(item, start, stop))
        param_squares += mul(p, p).sum()
        squares += mul(u, u).sum()
    return _ratio_of_norms(rule, kind, param_squares, squares)


# --- One parameter. ---


def update(item: Item, grad: Tensor, hyper: Hyper, kind: RuleKind, skip: Tensor | None) -> None:
    """One step of one parameter.

    Args:
        skip: bool 0-d: when true nothing is written; None: it is false.

    Raises:
        ValueError: a moment is factored.
    """
    specs = (item.moments.first, item.moments.second, item.moments.third)
    if any(spec is not None and spec.format is None for spec in specs):
        raise ValueError(f"{item.name}: an element-wise step takes no factored moment; plan it for Adafactor")
    rule = Rule.of(hyper, kind)
    if has_norm(kind):
        rule = _measured(item, grad, rule, kind)
    for start, stop in step.slices(item.param.numel()):
        p = formats.load(item.param, start, stop)
        g = rule.gradient(item, grad, p, start, stop)
        moments = Moments.of(item, start, stop)
        u = _UPDATES[kind](rule, p, g, moments)
        p = sub(mul(p, rule.decay), mul(u, rule.step_size))
        step.store(item, hyper, start, p, moments, skip, kind == RuleKind.LION)

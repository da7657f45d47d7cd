"""Adafactor and CAME in plain torch operations: native/include/a8/adafactor.h, one operation at a time in its order.

The phases are those of native/include/a8/abi.h (a8_phase), one parameter at a time. Sums are added in torch's order, so
the result agrees with the libraries' in all but the last places. The sources of the formulas stand in adafactor.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from a8multi.loader.structs import Flag
from a8multi.plan import Item

from . import torch_formats as formats
from . import torch_step as step
from .torch_formats import add, constant, div, mul, sqrt, sub
from .torch_step import Hyper, Moments

# What a row and a column contribute to a factored quantity, [rows] and [cols].
Factors = tuple[Tensor, Tensor]

_LARGEST = torch.finfo(torch.float32).max


@dataclass
class _Step:
    """One parameter during its step. The fields with a default are what the phases find out.

    Attributes:
        skip: bool 0-d: when true nothing is written; None: it is false.
        roots: factors of 1 / sqrt(v), or of 1 / sqrt(v s); None: v is held element by element.
        clipped: 1 / max(1, RMS(u) / d), where the first moment averages the clipped update.
        confidence: factors of 1 / sqrt(s), for CAME's order.
    """

    item: Item
    grad: Tensor
    hyper: Hyper
    skip: Tensor | None
    roots: Factors | None = None
    clipped: Tensor | float = 1.0
    confidence: Factors | None = None

    @property
    def averages_update(self) -> bool:
        return bool(self.hyper.flags & Flag.AVERAGE_UPDATE)

    def scaled_gradient(self, start: int, stop: int) -> tuple[Tensor, Tensor, Moments]:
        """Gradient, 1 / sqrt(v) and the moments: an element-wise v has taken the gradient in, the others are old."""
        g = step.gradient(self.grad, self.hyper, start, stop)
        moments = Moments.of(self.item, start, stop)
        if self.roots is not None:
            roots = self.outer(self.roots, start, stop)
        else:
            moments.second = _average(self.hyper, moments.second, mul(g, g))
            roots = _reciprocal_root(moments.second)
        with np.errstate(divide="ignore", over="ignore"):
            bound = float(step.ONE / np.float32(self.hyper.eps))
        return g, roots.clamp(max=bound), moments

    def outer(self, factors: Factors, start: int, stop: int) -> Tensor:
        """The products of a row's and a column's factor, of the flattened elements start to stop."""
        cols = self.item.cols
        first, last = start // cols, (stop - 1) // cols + 1
        products = mul(factors[0][first:last, None], factors[1])
        return products.view(-1)[start - first * cols : stop - first * cols]

    def averaged(self, moments: Moments, x: Tensor) -> Tensor:
        """The first moment when it has taken x in; x itself where there is none."""
        if self.item.moments.first is None:
            return x
        return add(mul(moments.first, self.hyper.beta1), mul(x, self.hyper.one_minus_beta1))

    def clipped_update(self, start: int, stop: int) -> tuple[Tensor, Moments]:
        """CAME's order: the clipped update, and the moments with it taken in."""
        g, roots, moments = self.scaled_gradient(start, stop)
        u = mul(mul(g, roots), self.clipped)
        moments.first = self.averaged(moments, u)
        return u, moments

    def update(self, start: int, stop: int) -> tuple[Tensor, Moments]:
        """What the parameter is moved by but for the step size, and the new moments."""
        if self.averages_update:
            _, moments = self.clipped_update(start, stop)
            u = moments.first
            return (u if self.confidence is None else mul(u, self.outer(self.confidence, start, stop))), moments
        g, roots, moments = self.scaled_gradient(start, stop)
        moments.first = self.averaged(moments, g)
        return mul(moments.first, roots), moments

    def residual(self, start: int, stop: int) -> Tensor:
        """``a8_residual``: what CAME averages over rows and columns."""
        if self.averages_update:
            u, moments = self.clipped_update(start, stop)
            difference = sub(u, moments.first)
        else:
            g, roots, moments = self.scaled_gradient(start, stop)
            difference = sub(mul(g, roots), mul(self.averaged(moments, g), roots))
        return add(mul(difference, difference), self.hyper.eps3)

    def sum_of_squares(self, values: Callable[[int, int], Tensor]) -> Tensor:
        total = constant(0.0, self.item.param)
        for start, stop in step.slices(self.item.param.numel()):
            x = values(start, stop)
            total += mul(x, x).sum()
        return total

    def means(self, values: Callable[[int, int], Tensor]) -> Factors:
        """Means of an element-wise quantity over rows and columns."""
        rows, cols = _sums(self.item, values)
        return div(rows, constant(self.item.cols, rows)), div(cols, constant(self.item.rows, cols))


def _sums(item: Item, values: Callable[[int, int], Tensor]) -> Factors:
    """Sums of an element-wise quantity over rows and columns, float32 [rows] and [cols]."""
    rows = torch.zeros(item.rows, dtype=torch.float32, device=item.param.device)
    cols = torch.zeros(item.cols, dtype=torch.float32, device=item.param.device)
    for start, stop in step.slices(item.rows * item.cols):
        first, last = start // item.cols, (stop - 1) // item.cols + 1
        missing = (start - first * item.cols, last * item.cols - stop)
        x = values(start, stop)
        matrix = (F.pad(x, missing) if any(missing) else x).view(-1, item.cols)
        rows[first:last] += matrix.sum(1)
        cols += matrix.sum(0)
    return rows, cols


def _squares(grad: Tensor, start: int, stop: int) -> Tensor:
    g = formats.load(grad, start, stop)
    return mul(g, g)


def _average(hyper: Hyper, average: Tensor, x: Tensor) -> Tensor:
    return add(mul(average, hyper.beta2), mul(x, hyper.one_minus_beta2))


def _confidence(hyper: Hyper, confidence: Tensor, x: Tensor) -> Tensor:
    return add(mul(confidence, hyper.beta3), mul(x, hyper.one_minus_beta3))


def _reciprocal_root(x: Tensor) -> Tensor:
    return div(constant(1.0, x), sqrt(x))


def _factors(rows: Tensor, cols: Tensor, least_mean: float) -> Factors:
    """Of 1 / sqrt(rows * cols / mean(rows)). clamp leaves NaN alone, as the libraries' comparisons do."""
    mean = div(rows.sum(), constant(rows.numel(), rows)).clamp_(min=least_mean)
    return _reciprocal_root(div(rows, mean)), _reciprocal_root(cols)


def _moved(task: _Step, held: Factors, new: Factors, move: Callable[[Hyper, Tensor, Tensor], Tensor]) -> Factors:
    """Row and column means moved towards the new ones, and stored."""
    rows, cols = (move(task.hyper, old, x) for old, x in zip(held, new, strict=True))
    formats.write(rows, held[0], task.skip)
    formats.write(cols, held[1], task.skip)
    return rows, cols


def _held(item: Item, name: str) -> Factors:
    rows, cols = getattr(item, name), getattr(item, f"{name}_block")
    if rows is None or cols is None:
        raise ValueError(f"{item.name}: a factored moment needs row means in {name} and column means in {name}_block")
    return rows, cols


def _limit(task: _Step, squares: Tensor) -> Tensor:
    """``a8_limit``: the factor that keeps the update's norm within bounds, 0-d; keeps the norm that is left."""
    last = task.item.limiter
    if last is None:
        return constant(1.0, squares)
    norm, most = sqrt(squares), mul(last, task.hyper.growth)
    says_something = (norm > 0) & (norm <= _LARGEST)
    grows = says_something & (last > 0) & (norm > most)
    factor = torch.where(grows, div(most, norm), 1.0)
    formats.write(torch.where(grows, most, torch.where(says_something, norm, last)), last, task.skip)
    return factor


def _excess(task: _Step, squares: Tensor) -> Tensor:
    """max(1, RMS(u) / d), 0-d."""
    if not task.hyper.clip > 0.0:
        return constant(1.0, squares)
    numel = constant(task.item.param.numel(), squares)
    return div(sqrt(div(squares, numel)), constant(task.hyper.clip, squares)).clamp_(min=1.0)


def sums(item: Item, grad: Tensor) -> Factors:
    """Sums of the squared gradient over rows and columns."""
    return _sums(item, partial(_squares, grad))


def update(item: Item, grad: Tensor, hyper: Hyper, skip: Tensor | None, given: Factors | None = None) -> None:
    """One step of one parameter.

    Args:
        skip: bool 0-d: when true nothing is written; None: it is false.
        given: what stands in the place of the row and column factors of 1 / sqrt(v).

    Raises:
        ValueError: there is no second moment, or a third one without row and column means.
    """
    task = _Step(item, grad, hyper, skip)
    third, average = item.moments.third, task.averages_update
    if item.moments.second is None:
        raise ValueError(f"{item.name}: an Adafactor step needs a second moment")
    if third is not None and not (item.moments.factored and third.format is None):
        raise ValueError(f"{item.name}: CAME's confidence needs a factored second moment and is factored itself")
    second: Factors | None = None
    if given is not None:
        task.roots = given
    elif item.moments.factored:
        second = _moved(task, _held(item, "second"), task.means(partial(_squares, grad)), _average)
        task.roots = _factors(*second, hyper.eps)
    if third is not None and not average:
        assert second is not None
        confidence = _moved(task, _held(item, "third"), task.means(task.residual), _confidence)
        rows, cols = (mul(v, s) for v, s in zip(second, confidence, strict=True))
        task.roots = _factors(rows, cols, hyper.eps)

    param_squares, squares = constant(0.0, item.param), constant(0.0, item.param)
    if hyper.flags & Flag.SCALE_PARAMETER:
        param_squares = task.sum_of_squares(lambda start, stop: formats.load(item.param, start, stop))
    if hyper.clip > 0.0 or (item.limiter is not None and not average):
        # In CAME's order what is clipped is not yet averaged.
        of = (lambda a, b: task.clipped_update(a, b)[0]) if average else (lambda a, b: task.update(a, b)[0])
        squares = task.sum_of_squares(of)
    if average:
        task.clipped = div(constant(1.0, squares), _excess(task, squares))
        if third is not None:
            confidence = _moved(task, _held(item, "third"), task.means(task.residual), _confidence)
            task.confidence = _factors(*confidence, formats.SMALLEST_NORMAL)
        if item.limiter is not None:
            squares = task.sum_of_squares(lambda start, stop: task.update(start, stop)[0])

    decay, step_size = _rule(task, param_squares, squares, _limit(task, squares))
    for start, stop in step.slices(item.param.numel()):
        u, moments = task.update(start, stop)
        p = formats.load(item.param, start, stop)
        step.store(item, hyper, start, sub(mul(p, decay), mul(u, step_size)), moments, skip)


def _rule(task: _Step, param_squares: Tensor, squares: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Decay of the parameter and step size, 0-d. bias2 bounds lr; bias1 corrects the moments' bias.

    squares: of the update as it is before the limiter's factor.
    """
    hyper = task.hyper
    rho = constant(min(hyper.lr, hyper.bias2), param_squares)
    alpha = rho
    if hyper.flags & Flag.SCALE_PARAMETER:
        numel = constant(task.item.param.numel(), param_squares)
        alpha = mul(sqrt(div(param_squares, numel)).clamp_(min=hyper.eps2), rho)
    alpha = mul(alpha, hyper.bias1)
    decayed = alpha if hyper.flags & Flag.SCALE_DECAY else rho
    decay = sub(constant(1.0, rho), mul(decayed, hyper.weight_decay))
    step_size = mul(alpha, factor)
    if not task.averages_update:
        step_size = div(step_size, _excess(task, mul(mul(squares, factor), factor)))
    return decay, step_size

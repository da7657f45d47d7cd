"""Float64 references of Adafactor, written from the paper and the public docstring: one pure function a rule.

Receive and return float64 tensors; nothing is shared with the package under test.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """first: moving average of the gradient, or None. second: of its square, or (row means, column means)."""

    first: Tensor | None
    second: Tensor | tuple[Tensor, Tensor]


def rms(x: Tensor) -> float:
    return math.sqrt(float((x * x).mean()))


def beta2_at(step: int, beta2: float | None, beta2_decay: float) -> float:
    """Section 7.2: 1 - t ** beta2_decay, so that the first step sets the average; or a fixed one."""
    return 1.0 - float(step) ** beta2_decay if beta2 is None else beta2


def second_moment(grad: Tensor, old: Tensor | tuple[Tensor, Tensor], beta2: float) -> Tensor | tuple[Tensor, Tensor]:
    """Of all elements, or (Algorithm 4) of rows and columns of the gradient as a matrix. Means replace sums."""
    squares = grad * grad
    if isinstance(old, tuple):
        row, col = old
        matrix = squares.reshape(len(row), len(col))
        return beta2 * row + (1 - beta2) * matrix.mean(1), beta2 * col + (1 - beta2) * matrix.mean(0)
    return beta2 * old + (1 - beta2) * squares


def root(second: Tensor | tuple[Tensor, Tensor], shape: tuple[int, ...], eps1: float) -> Tensor:
    """sqrt(v), at least eps1; v of a matrix is the outer product of its means over their own mean."""
    if isinstance(second, tuple):
        row, col = second
        mean = max(float(row.mean()), eps1)
        second = (row[:, None] * col[None, :] / mean).reshape(shape)
    return second.sqrt().clamp(min=eps1)


def adafactor(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    eps1: float,
    beta1: float | None = None,
    beta2: float | None = None,
    beta2_decay: float = -0.8,
    eps2: float = 1e-3,
    weight_decay: float = 0.0,
    d: float = 1.0,
    maximize: bool = False,
    relative_step: bool = True,
    scale_parameter: bool = True,
    scale_weight_decay: bool = True,
) -> tuple[Tensor, Moments]:
    """One step. Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5; the rest from Adafactor8bit's docstring."""
    gradient = -grad if maximize else grad
    second = second_moment(gradient, old.second, beta2_at(step, beta2, beta2_decay))
    first = None if old.first is None or beta1 is None else beta1 * old.first + (1 - beta1) * gradient
    u = (gradient if first is None else first) / root(second, tuple(param.shape), eps1)

    rho = min(lr, 1 / math.sqrt(step)) if relative_step else lr
    alpha = rho * max(eps2, rms(param)) if scale_parameter else rho
    if beta1 is not None and not relative_step:
        alpha /= 1 - beta1**step
        if beta2 is not None:
            alpha *= math.sqrt(1 - beta2**step)
    decay = weight_decay * (alpha if scale_weight_decay else rho)
    clip = max(1.0, rms(u) / d) if d > 0 else 1.0
    return param * (1 - decay) - alpha / clip * u, Moments(first, second)

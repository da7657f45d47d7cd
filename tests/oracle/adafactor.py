"""Float64 references of Adafactor and CAME, from the papers and the public docstrings: one pure function a rule.

Receive and return float64 tensors; nothing is shared with the package under test.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """first: moving average of the gradient, or None. second: of its square, or (row means, column means).

    confidence: CAME's, (row means, column means), or None. norm: of the last update that was not zero, 0.0 before
    the first; None: it is not limited.
    """

    first: Tensor | None
    second: Tensor | tuple[Tensor, Tensor]
    confidence: tuple[Tensor, Tensor] | None = None
    norm: float | None = None


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


def limited(u: Tensor, last: float | None, growth: float) -> tuple[Tensor, float | None]:
    """Chen et al. 2024 (Fira), arXiv:2410.01623, section 3.3: the update's norm is at most ``growth`` times the last.

    Returns the update and its norm, which is the last one of the next step. A zero update neither has nor leaves one.
    """
    norm = math.sqrt(float((u * u).sum()))
    if last is None or norm == 0.0:
        return u, last
    if last > 0.0 and norm / last > growth:
        return u / norm * growth * last, growth * last
    return u, norm


def confidence_of(residual: Tensor, old: tuple[Tensor, Tensor], beta3: float, eps3: float) -> tuple[Tensor, Tensor]:
    """CAME's averages of a squared residual over rows and columns. Means replace sums."""
    matrix = (residual * residual + eps3).reshape(len(old[0]), len(old[1]))
    row, col = (beta3 * held + (1 - beta3) * matrix.mean(dim) for held, dim in zip(old, (1, 0), strict=True))
    return row, col


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
    beta3: float = 0.0,
    eps3: float = 1e-16,
    growth: float = 1.01,
) -> tuple[Tensor, Moments]:
    """One step. Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5; the rest from Adafactor8bit's docstring.

    With a confidence: as adafactor8bit 0.2.4 orders CAME, whose confidence multiplies the second moment.
    """
    gradient = -grad if maximize else grad
    second = second_moment(gradient, old.second, beta2_at(step, beta2, beta2_decay))
    first = None if old.first is None or beta1 is None else beta1 * old.first + (1 - beta1) * gradient
    averaged = gradient if first is None else first
    roots = root(second, tuple(param.shape), eps1)
    confidence = old.confidence
    if confidence is not None:
        confidence = confidence_of((gradient - averaged) / roots, confidence, beta3, eps3)
        product = tuple(v * s for v, s in zip(second, confidence, strict=True))
        roots = root((product[0], product[1]), tuple(param.shape), eps1)
    u, norm = limited(averaged / roots, old.norm, growth)

    correction = 1.0
    if beta1 is not None and not relative_step:
        correction = (1.0 if beta2 is None else math.sqrt(1 - beta2**step)) / (1 - beta1**step)
    options = {"relative_step": relative_step, "scale_parameter": scale_parameter, "eps2": eps2, "d": d}
    decay = {"weight_decay": weight_decay, "scale_weight_decay": scale_weight_decay}
    new = stepped(param, u, step, lr=lr, correction=correction, **options, **decay)
    return new, Moments(first, second, confidence, norm)


def stepped(
    param: Tensor,
    u: Tensor,
    step: int,
    *,
    lr: float,
    correction: float,
    relative_step: bool,
    scale_parameter: bool,
    eps2: float,
    d: float,
    weight_decay: float,
    scale_weight_decay: bool,
) -> Tensor:
    """The parameter after an update: clipped, scaled and decayed. correction: of the bias, a factor of alpha."""
    rho = min(lr, 1 / math.sqrt(step)) if relative_step else lr
    alpha = (rho * max(eps2, rms(param)) if scale_parameter else rho) * correction
    decay = weight_decay * (alpha if scale_weight_decay else rho)
    clip = max(1.0, rms(u) / d) if d > 0 else 1.0
    return param * (1 - decay) - alpha / clip * u


def came(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    *,
    lr: float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: tuple[float, float] = (1e-15, 1e-16),
    d: float = 1.0,
    weight_decay: float = 0.0,
    growth: float = 1.01,
) -> tuple[Tensor, Moments]:
    """One step of CAME. Luo et al. 2023, arXiv:2307.02047, Algorithm 2; decoupled weight decay.

    eps: least root of the second moment, where the paper adds eps1 to the squared gradient; and its eps2. Without a
    confidence the step is the average of the clipped update.
    """
    assert old.first is not None
    second = second_moment(grad, old.second, betas[1])
    u = grad / root(second, tuple(param.shape), eps[0])
    u = u / max(1.0, rms(u) / d) if d > 0 else u
    first = betas[0] * old.first + (1 - betas[0]) * u
    confidence, step = old.confidence, first
    if confidence is not None:
        confidence = confidence_of(u - first, confidence, betas[2], eps[1])
        row, col = confidence
        step = first / (row[:, None] * col[None, :] / row.mean()).sqrt().reshape(param.shape)
    step, norm = limited(step, old.norm, growth)
    return param * (1 - lr * weight_decay) - lr * step, Moments(first, second, confidence, norm)

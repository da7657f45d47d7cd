"""Float64 references of Adam and AdamW, written from the papers: one pure function a rule.

Receive and return float64 tensors of one shape; nothing is shared with the package under test.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Moving averages of the gradient and of its square, before bias correction."""

    first: Tensor
    second: Tensor


class Options(NamedTuple):
    """What both rules take, under torch.optim's names."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False


def moments(grad: Tensor, old: Moments, betas: tuple[float, float]) -> Moments:
    beta1, beta2 = betas
    return Moments(beta1 * old.first + (1 - beta1) * grad, beta2 * old.second + (1 - beta2) * grad * grad)


def update(new: Moments, step: int, betas: tuple[float, float], eps: float) -> Tensor:
    """The bias-corrected ratio m_hat / (sqrt(v_hat) + eps). step: 1 for the first."""
    m_hat = new.first / (1 - betas[0] ** step)
    v_hat = new.second / (1 - betas[1] ** step)
    return m_hat / (v_hat.sqrt() + eps)


def adamw(param: Tensor, grad: Tensor, old: Moments, step: int, **options: Any) -> tuple[Tensor, Moments]:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2, the decay multiplied by lr as in torch.optim.AdamW.

    options: as ``Options``.
    """
    o = Options(**options)
    new = moments(-grad if o.maximize else grad, old, o.betas)
    return param - o.lr * o.weight_decay * param - o.lr * update(new, step, o.betas, o.eps), new


def adam(param: Tensor, grad: Tensor, old: Moments, step: int, **options: Any) -> tuple[Tensor, Moments]:
    """Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1, with the L2 term added to the gradient that is minimised.

    options: as ``Options``.
    """
    o = Options(**options)
    new = moments((-grad if o.maximize else grad) + o.weight_decay * param, old, o.betas)
    return param - o.lr * update(new, step, o.betas, o.eps), new


def average_after(values: list[float], beta: float) -> float:
    """An exponential moving average from zero over a list, by its closed form rather than step by step."""
    count = len(values)
    return math.fsum((1 - beta) * beta ** (count - 1 - k) * value for k, value in enumerate(values))

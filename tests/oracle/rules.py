"""Float64 references of the other element-wise rules, from the papers and torch's documentation: one function a rule.

Each receives float64 parameter, gradient and moments (zeros before the first step) and the step, 1 for the first, and
returns the new parameter and moments. Nothing is shared with the package under test.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """first: momentum or average gradient. second: of its square. third: AdEMAMix's slow one, RMSprop's gradient."""

    first: Tensor
    second: Tensor
    third: Tensor


Result = tuple[Tensor, Moments]


def zeros(param: Tensor) -> Moments:
    return Moments(torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param))


def average(old: Tensor, x: Tensor, beta: float) -> Tensor:
    return beta * old + (1 - beta) * x


def lion(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> Result:
    """Chen et al. 2023, arXiv:2302.06675, Algorithm 2."""
    direction = average(old.first, grad, betas[0]).sign()
    new = old._replace(first=average(old.first, grad, betas[1]))
    return param - lr * (direction + weight_decay * param), new


def rmsprop(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Result:
    """torch.optim.RMSprop; centered: Graves 2013, arXiv:1308.0850, equations 38 to 41, epsilon outside of the root."""
    g = grad + weight_decay * param
    second = average(old.second, g * g, alpha)
    third = average(old.third, g, alpha) if centered else old.third
    root = (second - third * third).clamp(min=0.0).sqrt() + eps
    first = momentum * old.first + g / root
    return param - lr * first, Moments(first, second, third)


def sgd(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Result:
    """torch.optim.SGD: the first gradient is not dampened."""
    g = grad + weight_decay * param
    first = g if step == 1 else momentum * old.first + (1 - dampening) * g
    if momentum == 0.0:
        return param - lr * g, old
    return param - lr * (g + momentum * first if nesterov else first), old._replace(first=first)


def adagrad(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
) -> Result:
    """Duchi, Hazan & Singer 2011, figure 1 with a diagonal; the rest as torch.optim.Adagrad."""
    g = grad + weight_decay * param
    second = old.second + g * g
    return param - lr / (1 + (step - 1) * lr_decay) * g / (second.sqrt() + eps), old._replace(second=second)


def ademamix_schedules(
    step: int, betas: tuple[float, float, float], alpha: float, t_alpha: int | None, t_beta3: int | None
) -> tuple[float, float]:
    """alpha and beta3 at a step: arXiv:2409.03137, section 3.1. A schedule of None is off."""
    first, _, last = betas
    if t_alpha is not None:
        alpha = min(step * alpha / t_alpha, alpha)
    if t_beta3 is None:
        return alpha, last
    share = step / t_beta3
    log_first, log_last = math.log(first), math.log(last)
    grown = math.exp(log_first * log_last / ((1 - share) * log_last + share * log_first)) if share < 1 else last
    return alpha, min(grown, last)


def ademamix(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Result:
    """Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1."""
    alpha, beta3 = ademamix_schedules(step, betas, alpha, t_alpha, t_beta3)
    new = Moments(
        average(old.first, grad, betas[0]),
        average(old.second, grad * grad, betas[1]),
        average(old.third, grad, beta3),
    )
    m_hat, v_hat = new.first / (1 - betas[0] ** step), new.second / (1 - betas[1] ** step)
    return param - lr * ((m_hat + alpha * new.third) / (v_hat.sqrt() + eps) + weight_decay * param), new


def norm(x: Tensor) -> float:
    return math.sqrt(float((x * x).sum()))


def lamb(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Result:
    """You et al. 2020, arXiv:1904.00962, Algorithm 2 with phi(z) = z; a ratio of 1 where a norm is zero."""
    new = old._replace(
        first=average(old.first, grad, betas[0]),
        second=average(old.second, grad * grad, betas[1]),
    )
    m_hat, v_hat = new.first / (1 - betas[0] ** step), new.second / (1 - betas[1] ** step)
    u = m_hat / (v_hat.sqrt() + eps) + weight_decay * param
    ratio = norm(param) / norm(u) if norm(param) > 0 and norm(u) > 0 else 1.0
    return param - lr * ratio * u, new


def lars(
    param: Tensor,
    grad: Tensor,
    old: Moments,
    step: int,
    *,
    lr: float,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    **options: Any,
) -> Result:
    """You et al. 2017, arXiv:1708.03888, equation 6 and Algorithm 1; the momentum before lr, as torch.optim.SGD has it.

    options: dampening and nesterov, as of ``sgd``.
    """
    p, g = norm(param), norm(grad)
    local = trust_coefficient * p / (g + weight_decay * p + eps) if p > 0 and g > 0 else 1.0
    scaled = local * (grad + weight_decay * param)
    return sgd(param, scaled, old, step, lr=lr, momentum=momentum, **options)

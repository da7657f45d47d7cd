"""Float64 reference of APOLLO, written from the paper: one pure function a step. The projection is an argument.

Receives and returns float64 tensors; nothing is shared with the package under test.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import adafactor, adam


def scaling(projected: Tensor, update: Tensor, scale_type: str) -> Tensor:
    """How much larger the adaptive update is than the projected gradient it came from, 0 where that gradient is zero.

    Args:
        projected, update: [rank, n].
        scale_type: "channel": [n], a ratio for each column; "tensor": 0-d.
    """
    if scale_type == "tensor":
        before, after = torch.linalg.vector_norm(projected), torch.linalg.vector_norm(update)
    else:
        before, after = projected.norm(dim=0), update.norm(dim=0)
    return torch.where(before > 0, after / before.clamp(min=torch.finfo(before.dtype).tiny), 0.0)


def apollo(
    param: Tensor,
    grad: Tensor,
    old: adam.Moments,
    step: int,
    projection: Tensor,
    *,
    lr: float,
    scale: float = 1.0,
    scale_type: str = "channel",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Tensor, adam.Moments]:
    """Zhu et al. 2024, arXiv:2412.05270, Algorithm 1: the gradient itself, scaled as AdamW would in the subspace.

    Args:
        param, grad: [m, n], m <= n; a higher matrix is to be given transposed.
        old: moments of the projected gradient, [rank, n].
        projection: P, [rank, m].
        scale: alpha, which multiplies the update.
    """
    projected = projection @ grad
    new = adam.moments(projected, old, betas)
    ratio = scaling(projected, adam.update(new, step, betas, eps), scale_type)
    return param - lr * (scale * grad * ratio + weight_decay * param), new


def projected_update(
    projected: Tensor,
    old: adafactor.Moments,
    step: int,
    *,
    beta1: float | None,
    beta2: float | None,
    beta2_decay: float,
    eps: float,
    corrects: bool,
) -> tuple[Tensor, adafactor.Moments]:
    """The adaptive update of a projected gradient with Adafactor8bit's options, and the new moments.

    Without ``beta1`` the projected gradient is in the place of its average. ``beta2=None``: 1 - t ** beta2_decay, which
    needs no correction. A second moment of row and column means bounds its root by eps; else eps is added.

    Args:
        corrects: whether the moments' bias is corrected.
    """
    second = adafactor.second_moment(projected, old.second, adafactor.beta2_at(step, beta2, beta2_decay))
    first = None if old.first is None or beta1 is None else beta1 * old.first + (1 - beta1) * projected
    average, bias = projected if first is None else first, 1.0
    if corrects:
        average = average / (1 - (beta1 or 0.0) ** step)
        bias = 1.0 if beta2 is None else math.sqrt(1 - beta2**step)
    new = adafactor.Moments(first, second)
    if isinstance(second, tuple):
        return average / adafactor.root(second, tuple(projected.shape), eps) * bias, new
    return average / (second.sqrt() / bias + eps), new


def adafactor_apollo(
    param: Tensor,
    grad: Tensor,
    old: adafactor.Moments,
    step: int,
    projection: Tensor,
    *,
    beta1: float | None,
    beta2: float | None,
    beta2_decay: float,
    eps: float,
    scale: float,
    scale_type: str,
    maximize: bool,
    relative_step: bool,
    growth: float,
    **options: Any,
) -> tuple[Tensor, adafactor.Moments]:
    """One step of Adafactor8bit with ``apollo_rank``: APOLLO's scaled gradient is the update that Adafactor limits,
    clips, scales and decays. There is no other bias correction than that of the projected moments.

    Args:
        param, grad, old, projection: as of ``apollo``; old has a norm. Of R, so of the state, nothing depends on
            ``maximize``: its scales are ratios of norms.
        scale: multiplies the update; that of a projection in units of its own, which eps and the moments have too,
            contains them.
        options: as of ``adafactor.stepped``.
    """
    projected = projection @ grad
    corrections = {"beta1": beta1, "beta2": beta2, "beta2_decay": beta2_decay}
    update, new = projected_update(projected, old, step, eps=eps, corrects=not relative_step, **corrections)
    u = (-scale if maximize else scale) * grad * scaling(projected, update, scale_type)
    u, norm = adafactor.limited(u, old.norm, growth)
    moved = adafactor.stepped(param, u, step, correction=1.0, relative_step=relative_step, **options)
    return moved, new._replace(norm=norm)

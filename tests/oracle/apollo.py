"""Float64 reference of APOLLO, written from the paper: one pure function a step. The projection is an argument.

Receives and returns float64 tensors; nothing is shared with the package under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import adam


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

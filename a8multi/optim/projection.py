"""APOLLO's steps: gradients projected to a low rank, and what Adam would do there as a scale of each channel.

Zhu et al. 2024, arXiv:2412.05270, Algorithm 1. Matrix products are the framework's; all else runs on the plans and
phases that there are. For a matrix G of which the smaller dimension is projected to ``rank``:

1. R = P G (or G P^T): a product a matrix;
2. one element-wise step of Adam on R for all matrices, whose "parameter" starts at zero and so ends as Adam's update U;
3. the reduce phase sums R^2 and U^2 over the rank, and s = |U| / |R| is each channel's scale;
4. the norm and apply phases of Adafactor, with s in the place of the factors of 1 / sqrt(v).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.backend.torch_formats import noise_halves, noise_key
from a8multi.loader.structs import RuleKind
from a8multi.plan import Item, Live, Moments, MomentSpec, StepPlan

from .roster import Work

# Of the elements of all projected gradients, the share that is worked on at once, and the least number that is not
# split: these and Adam's updates of them are what a step needs besides its state.
_SHARE, _LEAST = 8, 1 << 22
_FACTORED = MomentSpec(None)


@dataclass(frozen=True)
class Projector:
    """How one matrix is projected.

    Attributes:
        rows, cols: of the matrix.
        rank: of the projection, at most the smaller of the two.
        whole: one scale for the whole matrix (APOLLO-Mini) instead of one a channel.
        gain: factor of the scales.
        seed: of the random matrix.
        gap: steps after which another one is drawn.
    """

    rows: int
    cols: int
    rank: int
    whole: bool
    gain: float
    seed: int
    gap: int

    @property
    def per_row(self) -> bool:
        """The columns are projected, and each row is a channel; else the other way round."""
        return self.rows >= self.cols

    @property
    def shape(self) -> torch.Size:
        """Of the projected gradient."""
        return torch.Size((self.rows, self.rank) if self.per_row else (self.rank, self.cols))

    def project(self, grad: Tensor, step: int, drawn: Drawn, out: Tensor) -> None:
        """R of a gradient in the step that follows ``step`` others, in the units of P (see ``_random_matrix``)."""
        wide = self.cols if self.per_row else self.rows
        dtype = grad.dtype if grad.dtype is torch.bfloat16 else torch.float32
        matrix = drawn.matrix(step // self.gap, self.seed, self.rank, wide, dtype, grad.device)
        grad = grad.reshape(self.rows, self.cols).to(matrix.dtype)
        torch.mm(*((grad, matrix.t()) if self.per_row else (matrix, grad)), out=out.view(self.shape))


class Drawn:
    """The random matrices in use: of each size the last one drawn, for it is wanted until the next takes its place."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[int, Tensor]] = {}

    def matrix(self, epoch: int, seed: int, *size: Any) -> Tensor:
        """P of an interval, [rank, projected dimension]. size: rank, projected dimension, dtype and device."""
        kept = self._kept.get((seed, *size))
        if kept is None or kept[0] != epoch:
            kept = self._kept[(seed, *size)] = epoch, _random_matrix(seed, epoch, *size)
        return kept[1]


def _random_matrix(seed: int, epoch: int, rank: int, wide: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of independent, nearly normal integers from -8 to 8: two times normal with variance 1.

    Each is the number of ones in 16 random bits, less 8: exact in every type and the same on every device, where a
    normal generator is neither. All matrices of one size and interval share it, so it is kept: of a model with hidden
    size 2048 and rank 256, 1 MB in bfloat16. The paper's has variance 1 / rank; but for eps its scale does not matter:
    Adam's update knows none, and s is the ratio of two norms, of which that of R is scaled back.
    """
    halves = noise_halves(noise_key(seed, epoch, wide), 0, rank * wide, device)
    halves = halves - (halves >> 1 & 0x5555)
    halves = (halves & 0x3333) + (halves >> 2 & 0x3333)
    halves = halves + (halves >> 4) & 0x0F0F
    return ((halves + (halves >> 8) & 0x1F) - 8).to(dtype).view(rank, wide)


def _in_waves(sizes: Sequence[int]) -> list[list[int]]:
    """Which matrices go together, by the sizes of their projected gradients."""
    room = max(_LEAST, sum(sizes) // _SHARE)
    waves: list[list[int]] = []
    filled = room
    for index, size in enumerate(sizes):
        if filled + size > room:
            waves.append([])
            filled = 0
        waves[-1].append(index)
        filled += size
    return waves


class Projection:
    """The projected parameters of one device.

    Args:
        device: of them.
        drawn: the random matrices.
        members: their indices in the work.
        items: of each; ``moments`` are those of the projected gradient.
        projectors: of each.
    """

    def __init__(
        self,
        device: torch.device,
        drawn: Drawn,
        members: Sequence[int],
        items: Sequence[Item],
        projectors: Sequence[Projector],
    ) -> None:
        self._drawn = drawn
        self.members = list(members)
        sizes = [projector.shape.numel() for projector in projectors]
        self._waves: list[tuple[list[int], _Wave]] = []
        waves = _in_waves(sizes)
        room = max(sum(sizes[i] for i in wave) for wave in waves)
        low = {dtype: torch.empty(room, dtype=dtype, device=device) for dtype in {_low_dtype(item) for item in items}}
        updates = torch.empty(room, device=device)
        for wave in waves:
            parts = [items[i] for i in wave], [projectors[i] for i in wave]
            self._waves.append(([self.members[i] for i in wave], _Wave(device, *parts, low, updates)))

    def run(self, backend: Backend, work: Work, low: np.ndarray, scaled: np.ndarray, live: Live | None) -> None:
        """One step of all.

        Args:
            low: hyper-parameters of Adam on the projected gradients; scaled: of the parameters, and ``live`` what of
                them lives on the device; both in the rows of ``work``.
        """
        for members, wave in self._waves:
            steps = [work.row_keys[work.rows[i]][1] for i in members]
            grads = [work.grads[i].contiguous() for i in members]
            wave.run(backend, grads, steps, self._drawn, low, scaled, live)


def _low_dtype(item: Item) -> torch.dtype:
    """Of the product: that of the gradients where tensor cores take it and it has float32's range."""
    return torch.bfloat16 if item.grad_dtype is torch.bfloat16 else torch.float32


class _Wave:
    """Some matrices that go through the four parts together.

    Args:
        low, updates: memory for their projected gradients, by type, and Adam's updates of them.
    """

    def __init__(
        self,
        device: torch.device,
        items: Sequence[Item],
        projectors: Sequence[Projector],
        low: dict[torch.dtype, Tensor],
        updates: Tensor,
    ) -> None:
        self.projectors = list(projectors)
        self.low: list[Tensor] = []
        self.updates: list[Tensor] = []
        at = 0
        for item, projector in zip(items, projectors, strict=True):
            size = projector.shape.numel()
            self.low.append(low[_low_dtype(item)][at : at + size].view(projector.shape))
            self.updates.append(updates[at : at + size].view(projector.shape))
            at += size
        self._memory = updates[:at]
        # Where a plan wants means that its phases do not touch.
        none = torch.zeros(1, device=device)

        def matrix(item: Item, rows: int, cols: int, *, limiter: bool) -> Item:
            moments = Moments(second=_FACTORED, limiter=limiter)
            means = replace(item, moments=moments, rows=rows, cols=cols, second=none, second_block=none)
            return replace(means, first=None, first_block=None)

        self.adam: dict[str, tuple[StepPlan, list[int]]] = {}
        inner = [
            replace(item, param=update, grad_dtype=_low_dtype(item), limiter=None)
            for item, update in zip(items, self.updates, strict=True)
        ]
        for kind in ("adam", "rmsprop", "adafactor"):
            members = [i for i, item in enumerate(items) if _kind(item.moments) == kind]
            if members:
                rule = RuleKind.RMSPROP if kind == "rmsprop" else RuleKind.ADAM
                shapes = [projectors[i].shape for i in members]
                matrices = [replace(inner[i], rows=s[0], cols=s[1]) for i, s in zip(members, shapes, strict=True)]
                plan = StepPlan(device, matrices if kind == "adafactor" else [inner[i] for i in members], rule=rule)
                self.adam[kind] = plan, members
        matrices = [matrix(item, *p.shape, limiter=False) for item, p in zip(inner, projectors, strict=True)]
        self.sums_of_low = StepPlan(device, matrices)
        self.sums_of_updates = StepPlan(device, [replace(item, grad_dtype=torch.float32) for item in matrices])
        limited = [matrix(item, p.rows, p.cols, limiter=True) for item, p in zip(items, projectors, strict=True)]
        self.main = StepPlan(device, limited)

    def run(
        self,
        backend: Backend,
        grads: list[Tensor],
        steps: Sequence[int | Tensor],
        drawn: Drawn,
        low_hypers: np.ndarray,
        hypers: np.ndarray,
        live: Live | None,
    ) -> None:
        """One step of all, whose gradients and steps taken before these are."""
        for projector, grad, step, out in zip(self.projectors, grads, steps, self.low, strict=True):
            projector.project(grad, int(step), drawn, out)
        self._memory.zero_()
        for kind, (plan, members) in self.adam.items():
            plan.grads = [self.low[i] for i in members]
            run = backend.adafactor if kind == "adafactor" else backend.elementwise
            run(plan, low_hypers)
        self.sums_of_low.grads, self.sums_of_updates.grads = self.low, self.updates
        of_low, of_updates = backend.sums(self.sums_of_low, low_hypers), backend.sums(self.sums_of_updates, low_hypers)
        self.main.grads = grads
        try:
            backend.adafactor_scaled(self.main, self._factors(of_low, of_updates), hypers, live)
        finally:
            self.main.grads = []

    def _factors(
        self, of_low: list[tuple[Tensor, Tensor]], of_updates: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """What each row and column scales the gradient by, from both kinds of sums; None: 1."""
        which = [0 if projector.per_row else 1 for projector in self.projectors]
        below = [sums[side] for sums, side in zip(of_low, which, strict=True)]
        above = [sums[side] for sums, side in zip(of_updates, which, strict=True)]
        for i, projector in enumerate(self.projectors):
            if projector.whole:
                below[i], above[i] = below[i].sum().expand_as(below[i]), above[i].sum().expand_as(above[i])
        # A channel without a gradient has an update of zero besides: 0 / tiny.
        below = list(torch._foreach_clamp_min(below, torch.finfo(torch.float32).tiny))
        scales = list(torch._foreach_div(above, below))
        torch._foreach_sqrt_(scales)
        # R is in the units of P, which is 2 sqrt(rank) times the paper's.
        torch._foreach_mul_(scales, [p.gain * 2.0 * math.sqrt(p.rank) for p in self.projectors])
        return [(scale, None) if side == 0 else (None, scale) for scale, side in zip(scales, which, strict=True)]


def _kind(moments: Moments) -> str:
    """Which rule runs on the projected gradient."""
    if moments.factored:
        return "adafactor"
    return "adam" if moments.first is not None else "rmsprop"

"""APOLLO's steps: gradients projected to a low rank, and what Adam would do there as a scale of each channel.

Zhu et al. 2024, arXiv:2412.05270, Algorithm 1. Matrix products are the framework's; all else runs on the plans and
phases that there are. For a matrix G of which the smaller dimension is projected to ``rank``:

1. R = P G (or G P^T): a product a matrix;
2. one element-wise step of Adam on R, whose "parameter" starts at zero and so ends as Adam's update U;
3. the reduce phase sums R^2 and U^2 over the rank;
4. s = |U| / |R| is each channel's scale, and the norm and apply phases of Adafactor take it in the place of the factors
   of 1 / sqrt(v).

The first three go through the matrices in waves, whose R and U share memory; the last is one call for all.
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
from a8multi.backend.streams import Followed
from a8multi.loader.structs import BatchHint, RuleKind
from a8multi.plan import Item, Live, Moments, MomentSpec, StepPlan, plain
from a8multi.plan.step_plan import HYPER

from .roster import Work

# Of the elements of all projected gradients, the share that is worked on at once, and the least number that is not
# split: these and Adam's updates of them are what a step needs besides its state.
_SHARE, _LEAST = 8, 1 << 23
_ALIGNMENT = 64
_FACTORED = Moments(second=MomentSpec(None))
# For plans whose phases read none.
_NO_HYPERS = np.zeros(1, HYPER)


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
    def wide(self) -> int:
        """The dimension that is projected."""
        return self.cols if self.per_row else self.rows

    @property
    def room(self) -> int:
        """Elements of memory for the projected gradient: the next one begins where wide loads can, in any type."""
        return -(-self.shape.numel() // _ALIGNMENT) * _ALIGNMENT

    def side_of(self, factors: tuple[Tensor, Tensor]) -> Tensor:
        """The channels' among what belongs to rows and columns."""
        return factors[0 if self.per_row else 1]

    @property
    def shape(self) -> torch.Size:
        """Of the projected gradient."""
        return torch.Size((self.rows, self.rank) if self.per_row else (self.rank, self.cols))


# A table of hyper-parameters, and what of it lives on the device.
Table = tuple[np.ndarray, Live | None]


@dataclass
class Tables:
    """What a step needs to know besides the gradients, in the rows of its work.

    Attributes:
        low: hyper-parameters of Adam on the projected gradients.
        scaled: of the parameters.
        taken: steps taken before this one, those counted on the device as int64 0-d in memory that stays as it is.
    """

    low: Table
    scaled: Table
    taken: list[int | Tensor]


class Drawn:
    """The random matrices in use: of each size the last one drawn, for it is wanted until the next takes its place.

    They hold independent, nearly normal integers from -8 to 8: two times normal with variance 1. Integers are exact in
    every type and the same on every device, where a normal generator is neither. All matrices of one size and interval
    share one, so it is kept: of a model with hidden size 2048 and rank 256, 1 MB in bfloat16. The paper's has variance
    1 / rank; but for eps its scale does not matter: Adam's update knows none, and s is the ratio of two norms, of which
    that of R is scaled back.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Tensor, int | Tensor]] = {}

    def matrix(self, backend: Backend, taken: int | Tensor, gap: int, seed: int, *size: Any) -> Tensor:
        """P of the interval in which a parameter is, [rank, projected dimension]. The next call may overwrite it.

        Args:
            taken: steps; int64 0-d where the device counts them, in memory that keeps its value until the next call.
            size: rank, projected dimension, dtype and device.
        """
        key = (gap, seed, *size)
        rank, wide, dtype, device = size
        matrix, before = self._kept.get(key, (None, None))
        if matrix is None:
            matrix = torch.empty((rank, wide), dtype=dtype, device=device)
        if isinstance(taken, Tensor):
            backend.draw(matrix, taken, before if isinstance(before, Tensor) else None, gap, seed, wide)
        elif not isinstance(before, int) or before // gap != taken // gap:
            counter = torch.full((), taken, dtype=torch.int64, device=device)
            backend.draw(matrix, counter, None, gap, seed, wide)
        self._kept[key] = matrix, taken
        return matrix

    def matrices(self) -> list[Tensor]:
        return [matrix for matrix, _ in self._kept.values()]


def _in_waves(sizes: Sequence[int]) -> list[list[int]]:
    """Which matrices go together, by the room that their projected gradients need."""
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

    All that is the same at every step is made here once: plans, views of the memory that they work on, addresses.

    Args:
        device: of them.
        members: their indices in the work.
        items: of each; ``moments`` are those of the projected gradient.
        projectors: of each.
    """

    def __init__(
        self,
        device: torch.device,
        members: Sequence[int],
        items: Sequence[Item],
        projectors: Sequence[Projector],
    ) -> None:
        self.members = list(members)
        sizes = [projector.room for projector in projectors]
        waves = _in_waves(sizes)
        room = max(sum(sizes[i] for i in wave) for wave in waves)
        low = {dtype: torch.empty(room, dtype=dtype, device=device) for dtype in {_low_dtype(item) for item in items}}
        updates = torch.empty(room, device=device)
        self._room, self._followed = [*low.values(), updates], Followed()
        self._waves: list[tuple[list[int], _Wave]] = []
        for wave in waves:
            parts = [items[i] for i in wave], [projectors[i] for i in wave]
            self._waves.append((wave, _Wave(device, *parts, low, updates)))
        none = torch.zeros(1, device=device)
        matrices = [_matrix(item, none, p.rows, p.cols) for item, p in zip(items, projectors, strict=True)]
        self._main = StepPlan(device, matrices)
        self._places = [p.side_of(factors) for p, factors in zip(projectors, self._main.factors, strict=True)]

    def screen(self, backend: Backend, work: Work, scale: Tensor | None, found: Tensor, tables: Tables) -> None:
        """Looks at the gradients, as ``Backend.screen``."""
        self._main.grads = [work.grads[i] for i in self.members]
        try:
            backend.screen(self._main, scale, found, *tables.scaled)
        finally:
            self._main.grads = []

    def run(self, backend: Backend, work: Work, tables: Tables, drawn: Drawn) -> None:
        """One step of all."""
        steps = [tables.taken[work.rows[i]] for i in self.members]
        grads = [plain(work.grads[i]) for i in self.members]
        skip = work.plan.skip
        if work.device.type == "cuda":
            self._followed.use(work.device, [*self._room, *drawn.matrices()])
        for wave, plans in self._waves:
            plans.run(backend, [grads[i] for i in wave], [steps[i] for i in wave], drawn, tables.low, skip)
        self._put_scales()
        if tables.low[1] is not None and tables.scaled[1] is not None:
            tables.scaled[1].staged_bytes += tables.low[1].staged_bytes
        self._main.grads, self._main.skip = grads, skip
        try:
            backend.adafactor_scaled(self._main, *tables.scaled)
        finally:
            self._main.grads = []

    def _put_scales(self) -> None:
        """From the sums of all waves to where the main plan has what each row and column scales the gradient by."""
        below = [plans.below for _, plans in self._waves]
        scales = [plans.above for _, plans in self._waves]
        # A channel without a gradient may have averages of earlier ones: what it is scaled by must be finite, for
        # infinity times zero is NaN. A NaN of a gradient stays one.
        float32 = torch.finfo(torch.float32)
        torch._foreach_clamp_min_(below, float32.tiny)
        torch._foreach_div_(scales, below)
        torch._foreach_clamp_max_(scales, float32.max)
        torch._foreach_sqrt_(scales)
        gained = [each for _, plans in self._waves for each in plans.gained]
        torch._foreach_mul_([scale for scale, _ in gained], [gain for _, gain in gained])
        torch._foreach_copy_(self._places, [scale for _, plans in self._waves for scale in plans.scales])


def _low_dtype(item: Item) -> torch.dtype:
    """Of the product: that of the gradients where tensor cores take it and it has float32's range."""
    return torch.bfloat16 if item.grad_dtype is torch.bfloat16 else torch.float32


def _matrix(item: Item, none: Tensor, rows: int, cols: int) -> Item:
    """The item as a matrix without moments of its own. none: where a plan wants means that its phases do not touch."""
    moments = replace(_FACTORED, limiter=item.limiter is not None)
    means = replace(item, moments=moments, rows=rows, cols=cols, second=none, second_block=none)
    return replace(means, first=None, first_block=None)


class _Wave:
    """Some matrices that go through projection, Adam and sums together.

    Args:
        low, updates: memory for their projected gradients, by type, and Adam's updates of them.

    Attributes:
        below, above: what a run leaves: sums over the rank of R^2 and of U^2, of the same place in both, between others
            that mean nothing.
        scales: the parts of ``above`` that belong to each matrix's channels.
        gained: parts of ``above``, together all that is in ``scales``, and the gain of each: one where that is enough.
    """

    def __init__(
        self,
        device: torch.device,
        items: Sequence[Item],
        projectors: Sequence[Projector],
        low: dict[torch.dtype, Tensor],
        updates: Tensor,
    ) -> None:
        self._low: list[Tensor] = []
        inner: list[Item] = []  # an item's update as the parameter
        at = 0
        for item, projector in zip(items, projectors, strict=True):
            part = slice(at, at + projector.shape.numel())
            dtype = _low_dtype(item)
            self._low.append(low[dtype][part].view(projector.shape))
            inner.append(replace(item, param=updates[part].view(projector.shape), grad_dtype=dtype, limiter=None))
            at += projector.room
        self._updates = updates[:at]

        # Matrices by what their products have in common: the random one, on which side, and for how long.
        self._products: dict[tuple[Any, ...], list[int]] = {}
        for i, (item, p) in enumerate(zip(items, projectors, strict=True)):
            size = p.seed, p.rank, p.wide, _low_dtype(item), device
            self._products.setdefault((p.per_row, p.gap, size), []).append(i)
        self._shapes = [(p.rows, p.cols) for p in projectors]

        self._adam: list[tuple[str, StepPlan]] = []
        for kind in ("adam", "rmsprop", "adafactor"):
            members = [i for i, item in enumerate(items) if _kind(item.moments) == kind]
            if members:
                rule = RuleKind.RMSPROP if kind == "rmsprop" else RuleKind.ADAM
                chosen = [inner[i] for i in members]
                if kind == "adafactor":
                    chosen = [replace(item, rows=item.param.shape[0], cols=item.param.shape[1]) for item in chosen]
                plan = StepPlan(device, chosen, rule=rule)
                plan.hints = BatchHint.OTHER_FORMATS  # a negative lr is outside of the fast path's range
                plan.grads = [self._low[i] for i in members]
                self._adam.append(("adafactor" if kind == "adafactor" else "elementwise", plan))

        # First of all R, then of all U, so that both halves of the scratch are laid out alike.
        none = torch.zeros(1, device=device)
        of_low = [_matrix(replace(item, hyper=0), none, *item.param.shape) for item in inner]
        self._sums = StepPlan(device, of_low + [replace(item, grad_dtype=torch.float32) for item in of_low])
        self._sums.grads = self._low + [item.param for item in inner]
        factors = self._sums.factors
        self._sums.scratch.zero_()  # not all of a half is written, and all is read
        half = int(self._sums.tensors["row_at"][len(items)])
        self.above = self._sums.scratch[half:]
        self.below = self._sums.scratch[: len(self.above)]
        self.scales = [p.side_of(pair) for p, pair in zip(projectors, factors[len(items) :], strict=True)]
        # R is in the units of P, which is 2 sqrt(rank) times the paper's.
        gains = [p.gain * 2.0 * math.sqrt(p.rank) for p in projectors]
        alike = len(set(gains)) == 1
        self.gained = [(self.above, gains[0])] if alike else list(zip(self.scales, gains, strict=True))
        self._whole = [p.side_of(pair) for p, pair in zip([*projectors] * 2, factors, strict=True) if p.whole]

    def run(
        self,
        backend: Backend,
        grads: list[Tensor],
        steps: list[int | Tensor],
        drawn: Drawn,
        low: Table,
        skip: Tensor | None,
    ) -> None:
        """To the sums, with the gradients of the matrices and the steps taken before this one."""
        self._project(backend, grads, steps, drawn)
        self._updates.zero_()
        for method, plan in self._adam:
            plan.skip = skip
            getattr(backend, method)(plan, *low)
        # A step that lives on the device may be captured, and then needs tables of the graph's.
        backend.sums(self._sums, *(low if low[1] is not None else (_NO_HYPERS,)))
        for sums in self._whole:
            sums.copy_(sums.sum())

    def _project(self, backend: Backend, grads: list[Tensor], steps: list[int | Tensor], drawn: Drawn) -> None:
        """R of every gradient, in the units of P (see ``Drawn``)."""
        for (per_row, gap, size), members in self._products.items():
            interval: int | None = None  # of the matrix at hand; None: there is none, or only the device knows
            for i in members:
                taken = steps[i]
                wanted = None if isinstance(taken, Tensor) else taken // gap
                if wanted is None or wanted != interval:
                    matrix = drawn.matrix(backend, taken, gap, *size)
                    matrix = matrix.t() if per_row else matrix
                interval = wanted
                grad = grads[i] if grads[i].ndim == 2 else grads[i].view(self._shapes[i])
                if grad.dtype is not matrix.dtype:
                    grad = grad.to(matrix.dtype)
                if per_row:
                    torch.mm(grad, matrix, out=self._low[i])
                else:
                    torch.mm(matrix, grad, out=self._low[i])


def _kind(moments: Moments) -> str:
    """Which rule runs on the projected gradient."""
    if moments.factored:
        return "adafactor"
    return "adam" if moments.first is not None else "rmsprop"

"""The same steps on any native library: parameters described by cases, stepped through StepPlan, compared as bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.native import NativeBackend
from a8multi.loader import Library, structs
from a8multi.loader.structs import BatchHint, Flag, Phase, RuleKind
from a8multi.optim import state as state_of
from a8multi.plan import Item, Moments, MomentSpec, Schedule, StepPlan, matrix_shape
from a8multi.plan.step_plan import HYPER
from a8multi.quant.formats import FORMATS

_GUARD_BYTES = 64
_GUARD = 0x5E


@dataclass(frozen=True)
class Case:
    """One parameter of a family.

    Attributes:
        shape: of the parameter.
        first, second, third: formats of its moments: a name of FORMATS, "factored", or "" for none.
        dtype: of the parameter.
        grad: of the gradient; None: as the parameter.
        blocks: block size of each moment.
        limiter: whether the growth of the update's norm is limited.
        row: of the family's table of hyper-parameters.
        skew: elements by which every array misses alignment.
        scale: of the gradients.
        odd: NaN and infinities are among the gradients, from the second step on.
        exchanged: somebody writes the parameter between two steps, behind autograd's back.
    """

    shape: tuple[int, ...]
    first: str = ""
    second: str = ""
    third: str = ""
    dtype: torch.dtype = torch.bfloat16
    grad: torch.dtype | None = None
    blocks: tuple[int, int, int] = (128, 128, 128)
    limiter: bool = False
    row: int = 0
    skew: int = 0
    scale: float = 1e-3
    odd: bool = False
    exchanged: bool = False

    def __str__(self) -> str:
        told = (
            f"{one.name}={getattr(self, one.name)}" for one in fields(self) if one.default != getattr(self, one.name)
        )
        return f"Case({', '.join(told)})"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def moments(self) -> Moments:
        names = zip((self.first, self.second, self.third), self.blocks, strict=True)
        return Moments(*(_spec(name, size) for name, size in names), limiter=self.limiter)


def _spec(name: str, block_size: int) -> MomentSpec | None:
    if not name:
        return None
    fmt = None if name == "factored" else FORMATS[name]
    return MomentSpec(fmt, block_size if fmt is not None and fmt.quantized else 0)


@dataclass(frozen=True)
class Family:
    """Parameters that one call steps together.

    Attributes:
        rule: of ``a8_elementwise``; None: ``a8_adafactor``.
        schedule: how hyper-parameters follow from the step.
        rows: what each row of hyper-parameters has instead of ``_DEFAULTS``; AVERAGE_UPDATE in all of them or none.
        cases: the parameters.
    """

    rule: RuleKind | None
    schedule: Schedule
    rows: tuple[dict[str, Any], ...]
    cases: tuple[Case, ...]

    def hypers(self, step: int) -> np.ndarray:
        table = np.zeros(len(self.rows), HYPER)
        for number, row in enumerate(self.rows):
            values = {**_DEFAULTS, **row}
            values.update({f"one_minus_beta{k}": 1.0 - values[f"beta{k}"] for k in (1, 2, 3)})
            for name, value in {**values, **self.schedule.derived(step)}.items():
                table[name][number] = value
        return table


_DEFAULTS: dict[str, Any] = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "beta3": 0.99,
    "eps": 1e-8,
    "eps2": 1e-3,
    "eps3": 1e-16,
    "clip": 1.0,
    "growth": 1.01,
    "mix": 5.0,
    "trust": 0.02,
    "flags": int(Flag.STOCHASTIC_STATE),
    "seed_low": 12345,
    "seed_high": 678,
}


class EmulatedBackend(NativeBackend):
    """The emulated CUDA library on tensors of the host.

    Args:
        library: built by ``emulation.build``, loaded.
        order: 0: threads and blocks in their order; else shuffled by this seed (device/fibers.h).
        multiprocessors: that the device says it has.
    """

    def __init__(self, library: Library, order: int = 0, multiprocessors: int = 1) -> None:
        self.name, self.library, self.isa_ran, self._uploads = "cuda", library, None, True
        self._set = ctypes.CDLL(str(library.path)).emulate
        self._set.argtypes, self._set.restype = (ctypes.c_uint32, ctypes.c_int32), None
        self._settings = order, multiprocessors
        self.factored_chunks = 0  # of the batches of Adafactor's steps

    def _call(self, entry: str, where: structs.Exec, *arguments: Any) -> None:
        self._set(*self._settings)
        if entry == "a8_adafactor":
            arguments[0]._obj.factored_chunks = self.factored_chunks
        super()._call(entry, where, *arguments)


@dataclass
class Array:
    """A tensor of a case: its place between guards, which nobody may write."""

    name: str
    data: Tensor
    room: Tensor = field(repr=False)


def bytes_of(array: Array) -> np.ndarray:
    """Of the tensor, in place."""
    start = array.data.data_ptr() - array.room.data_ptr()
    return array.room.numpy()[start : start + array.data.numel() * array.data.element_size()]


def placed(name: str, value: Tensor, skew: int) -> Array:
    """A copy of a tensor, ``skew`` elements beyond an aligned address."""
    start = _GUARD_BYTES + skew * value.element_size()
    end = start + value.numel() * value.element_size()
    room = torch.full((end + _GUARD_BYTES,), _GUARD, dtype=torch.uint8)
    data = room[start:end].view(value.dtype).view(value.shape)
    data.copy_(value)
    return Array(name, data, room)


class Run:
    """A family's parameters on one backend.

    Args:
        family: which.
        backend: what steps them.
        by_phases: one call a phase, without sums carried from step to step.
        hints: of the batches, whatever is in them.
        by_kind: the chunks of factored tensors come first, and an emulated backend is told how many those are.
    """

    def __init__(
        self,
        family: Family,
        backend: NativeBackend,
        by_phases: bool = False,
        hints: BatchHint = BatchHint.OTHER_FORMATS,
        by_kind: bool = False,
    ) -> None:
        self.family, self.backend, self.by_phases = family, backend, by_phases
        self.arrays: list[list[Array]] = []
        self.grads: list[Array] = []
        self._steps = 0
        self._generator = torch.Generator().manual_seed(1)
        items = [self._item(number, case) for number, case in enumerate(family.cases)]
        carries = family.rule is None and not by_phases
        rule = RuleKind.ADAM if family.rule is None else family.rule
        self.plan = StepPlan(torch.device("cpu"), items, rule=rule, carries_squares=carries)
        self.plan.hints = hints
        if by_kind and isinstance(backend, EmulatedBackend):
            self.plan.chunks, backend.factored_chunks = self.plan.chunks_by_kind
        self.plan.grads = [array.data for array in self.grads]
        self.plan.scratch.fill_(float("nan"))  # what is read was written

    def _item(self, number: int, case: Case) -> Item:
        moments = case.moments()
        param = placed("param", self._values(case).to(case.dtype), case.skew)
        grad = placed("grad", torch.zeros(case.shape, dtype=case.grad or case.dtype), case.skew)
        state: dict[str, Any] = {}
        state_of.ensure(state, param.data, moments, False)
        moved = [placed(name, state[name], case.skew) for name in state_of.layout(param.data, moments)]
        state.update({array.name: array.data for array in moved})
        self.arrays.append([param, *moved])
        self.grads.append(grad)
        rows, cols = matrix_shape(case.shape) if moments.factored else (0, 0)
        return Item(
            param=param.data,
            grad_dtype=grad.data.dtype,
            state=state,
            moments=moments,
            **state_of.tensors(state, moments),
            rows=rows,
            cols=cols,
            hyper=case.row,
            noise_id=number,
            name=f"case {number}",
        )

    def _values(self, case: Case) -> Tensor:
        """Small normal numbers with zeros of both signs among them."""
        values = torch.randn(case.numel, generator=self._generator) * 0.02
        chance = torch.rand(case.numel, generator=self._generator)
        values[chance < 0.2] *= 0
        return values.reshape(case.shape)

    def _gradient(self, case: Case) -> Tensor:
        """Runs of 64 of very different sizes, some of them zeros."""
        runs = -(-case.numel // 64)
        sizes = torch.exp(2 * torch.randn(runs, 1, generator=self._generator)) * case.scale
        sizes[torch.rand(runs, 1, generator=self._generator) < 0.1] = 0
        values = (torch.randn(runs, 64, generator=self._generator) * sizes).flatten()[: case.numel].clone()
        if case.odd and self._steps >= 2:
            values[case.numel // 3], values[case.numel // 2] = float("inf"), float("nan")
        return values.reshape(case.shape)

    def load(self) -> None:
        """The next gradients, the same ones in every run."""
        self._steps += 1
        for case, grad, (param, *_) in zip(self.family.cases, self.grads, self.arrays, strict=True):
            grad.data.copy_(self._gradient(case))
            if case.exchanged and self._steps == 2:
                bytes_of(param)[:] ^= 1  # by way of numpy, which torch does not notice

    def step(self) -> None:
        """One step with the next gradients."""
        self.load()
        hypers = self.family.hypers(self._steps)
        if self.by_phases:
            for phase in self._phases():
                entry = "a8_adafactor" if self.family.rule is None else "a8_elementwise"
                self.backend._step(entry, self.plan, hypers, None, int(phase), scratch=self.plan.scratch)
            return
        if self.family.rule is not None:
            self.backend.elementwise(self.plan, hypers)
            return
        self.backend.adafactor(self.plan, hypers)
        # As LowBitOptimizer does after a step.
        torch.autograd.graph.increment_version([item.param for item in self.plan.items])
        assert self.plan.squares is not None
        self.plan.squares.leave(((hypers["flags"] & Flag.SCALE_PARAMETER) != 0)[self.plan.tensors["hyper"]])

    def _phases(self) -> list[Phase]:
        """Those that there are, in the order of abi.h."""
        wanted = self.plan.phases if self.family.rule is None else Phase.NORM | Phase.APPLY
        confidence = [Phase.RESIDUAL, Phase.CONFIDENCE]
        averages = any(row.get("flags", 0) & Flag.AVERAGE_UPDATE for row in self.family.rows)
        middle = [Phase.NORM, *confidence] if averages else [*confidence, Phase.NORM]
        order = [Phase.REDUCE, Phase.MOMENTS, *middle, Phase.LIMIT, Phase.APPLY]
        return [phase for phase in order if phase in wanted]


def differences(a: Run, b: Run) -> list[str]:
    """Where two runs of one family differ, in words."""
    found = []
    for case, ours, theirs in zip(a.family.cases, a.arrays, b.arrays, strict=True):
        found += [f"{x.name} {what} of {case}" for x, y in zip(ours, theirs, strict=True) if (what := differ(x, y))]
    return found


def differ(a: Array, b: Array) -> str:
    """How two arrays differ; empty if they do not. Two NaN are alike whatever their bits; guards must be untouched."""
    for array in (a, b):
        guards = array.room.numel() - len(bytes_of(array))
        if int((array.room == _GUARD).sum()) - int((bytes_of(array) == _GUARD).sum()) != guards:
            return "was written outside of its bounds"
    x, y = a.data.reshape(-1), b.data.reshape(-1)
    unlike = (_bits(x) != _bits(y)) & ~(x.isnan() & y.isnan())
    where: Sequence[int] = unlike.nonzero().flatten().tolist()
    if not where:
        return ""
    return f"differs in {len(where)} of {len(x)} elements, first in {where[0]}: {x[where[0]]} and {y[where[0]]}"


def _bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])

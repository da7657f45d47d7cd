"""How hyper-parameters follow from the step, and what of them lives on the device.

The formulas are the mirror of native/include/a8/schedule.h, operation for operation on doubles, which Python's floats
are: eager steps derive on the host with the functions here, steps with counters on the device with ``a8_derive``, and
the bits are the same (docs/decisions/0010-derived-on-device.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.errors import BackendUnavailable
from a8multi.loader import structs
from a8multi.loader.structs import ScheduleRule

SCHEDULE = np.dtype(structs.Schedule)

_FLOAT_MAX = torch.finfo(torch.float32).max

# As plain integers: a test for a flag of an enum takes a microsecond, and a step makes half a dozen.
_FIRST_WHOLE = int(ScheduleRule.FIRST_WHOLE)
_MIX_WARMS_UP = int(ScheduleRule.MIX_WARMS_UP)
_BETA3_WARMS_UP = int(ScheduleRule.BETA3_WARMS_UP)
_BETA2_DECAYS = int(ScheduleRule.BETA2_DECAYS)
_ADAM_BIAS = int(ScheduleRule.ADAM_BIAS)
_UNBIASED = int(ScheduleRule.UNBIASED)
_LR_DECAYS = int(ScheduleRule.LR_DECAYS)
_CORRECT_BIAS = int(ScheduleRule.CORRECT_BIAS)
_RELATIVE_STEP = int(ScheduleRule.RELATIVE_STEP)


@dataclass(frozen=True)
class Schedule:
    """What a step derives its hyper-parameters from, but for the step's number: ``a8_schedule``.

    Attributes:
        rules: which fields follow from the step, and how.
        beta1, beta2: decays, 0 without one; beta2 is not read when it decays.
        beta2_decay: <= 0.
        beta3, mix: AdEMAMix's decay and weight of the slow average, which they reach after ``beta3_steps`` and
            ``mix_steps``.
        decay: of the learning rate (LR_DECAYS), or SGD's dampening (FIRST_WHOLE).
    """

    rules: ScheduleRule
    beta1: float = 0.0
    beta2: float = 0.0
    beta2_decay: float = 0.0
    beta3: float = 0.0
    mix: float = 0.0
    mix_steps: float = 0.0
    beta3_steps: float = 0.0
    decay: float = 0.0

    def derived(self, step: int) -> dict[str, float]:
        """Fields of ``a8_hyper`` at a step, counted from 1, in double precision."""
        rules = int(self.rules)
        fields: dict[str, float] = {"step": step & 0xFFFFFFFF}
        first = 1.0 / (1.0 - _power(self.beta1, step))
        root = math.sqrt(1.0 - _power(self.beta2, step))
        if rules & _FIRST_WHOLE:
            fields["one_minus_beta1"] = 1.0 if step == 1 else 1.0 - self.decay
        if rules & (_MIX_WARMS_UP | _BETA3_WARMS_UP):
            fields.update(self._slow(step, rules))
        if rules & _BETA2_DECAYS:
            one_minus_beta2 = decay(step, self.beta2_decay)
            fields.update(beta2=1.0 - one_minus_beta2, one_minus_beta2=one_minus_beta2)
        if rules & (_ADAM_BIAS | _UNBIASED):
            unbiased = bool(rules & _UNBIASED)
            fields.update(bias1=1.0 if unbiased else first, bias2=1.0 if unbiased else 1.0 / root)
            if rules & _LR_DECAYS:
                fields["bias1"] = 1.0 / (1.0 + (step - 1) * self.decay)
            return fields
        if rules & _BETA2_DECAYS:
            root = 1.0
        fields["bias1"] = first * root if rules & _CORRECT_BIAS else 1.0
        fields["bias2"] = 1.0 / math.sqrt(step) if rules & _RELATIVE_STEP else _FLOAT_MAX
        return fields

    def _slow(self, step: int, rules: int) -> dict[str, float]:
        """Of the slow average. beta3 grows so that 1 / log(beta3) goes evenly from that of beta1 to its own."""
        mix, beta3 = self.mix, self.beta3
        if rules & _MIX_WARMS_UP and step < self.mix_steps:
            mix = mix * step / self.mix_steps
        if rules & _BETA3_WARMS_UP and step < self.beta3_steps:
            first, last = half_life(self.beta1), half_life(self.beta3)
            half = first + (last - first) * (step / self.beta3_steps)
            beta3 = _exp2_product(-1.0 / half, 1.0, 0.0) if half > 0.0 else 0.0
        return {"mix": mix, "beta3": beta3, "one_minus_beta3": 1.0 - beta3}

    def record(self) -> tuple[Any, ...]:
        """As ``SCHEDULE``, without a counter and a flag that skips."""
        slow = self.mix, self.mix_steps, self.beta3_steps, half_life(self.beta1), half_life(self.beta3)
        return 0, 0, self.beta1, self.beta2, self.beta3, self.beta2_decay, *slow, self.decay, int(self.rules), 0


def half_life(beta: float) -> float:
    """Steps in which an average loses half of what it held."""
    return math.log(0.5) / math.log(beta) if 0.0 < beta < 1.0 else 0.0


def _power(x: float, n: int) -> float:
    result = 1.0
    while n > 0:
        if n & 1:
            result = result * x
        x = x * x
        n >>= 1
    return result


def _exp2_product(exponent: float, whole: float, fraction: float) -> float:
    spread = 134217729.0 * exponent
    high = spread - (spread - exponent)
    rest = (exponent - high) * whole + exponent * fraction
    head = high * whole
    shift = int(0.5 - (head + rest))
    z = ((head + float(shift)) + rest) * 0.6931471805599453
    result = 1.0
    for k in range(14, 0, -1):
        result = 1.0 + result * z / float(k)
    return result * _power(0.5, shift)


def decay(step: int, exponent: float) -> float:
    """``step ** exponent`` for an integer step >= 1 and exponent <= 0, within 1e-15 for exponents down to -1."""
    exponent = max(float(exponent), -2000.0)
    mantissa, whole = float(step), 0.0
    while mantissa > 1.4142135623730951:
        mantissa = mantissa * 0.5
        whole = whole + 1.0
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = 0.0
    for k in range(23, 0, -2):
        series = series * square + 1.0 / float(k)
    return _exp2_product(exponent, whole, 2.8853900817779268 * (s * series))


def cannot_be_captured() -> BackendUnavailable:
    """The error of the backend that has to read from the device."""
    return BackendUnavailable(
        "the torch backend cannot run in a CUDA graph: it needs the step's number and the learning rate on the host. "
        "Capture with the cuda or cupy backend, or step outside of the graph"
    )


@dataclass
class Live:
    """What of one step's hyper-parameters lives on the device, by row of their table.

    Attributes:
        records: ``SCHEDULE`` of every row, with the addresses of the counters; none when there are no counters.
        rows: the schedule of every row.
        counters: steps taken, int64 0-d on the device; None where the table holds all that follows from the step.
        rates: learning rates, float32 of one element on the device; None where the table holds it.
        capturing: the step is being captured in a CUDA graph: what it uses must live as long as the graph, and what is
            copied from the host is copied at every replay.
        skip: float32 0-d on the device: the step is not counted when it is not 0; None: every step is.
        advance: what the next derivation of this step adds to the counters. Several plans may share the counters.
        kept: device memory that must live until the step has been launched.
        staged_bytes: of the tables that the step has copied to the device or may have to.
    """

    records: np.ndarray
    rows: Sequence[Schedule]
    counters: Sequence[Tensor | None]
    rates: Sequence[Tensor | None]
    capturing: bool = False
    skip: Tensor | None = None
    advance: int = 1
    kept: list[Tensor] = field(default_factory=list)
    staged_bytes: int = 0

    def advanced(self) -> int:
        """``advance``, for the derivation that is about to run."""
        advance, self.advance = self.advance, 0
        return advance

    def read(self, hypers: np.ndarray) -> np.ndarray:
        """The table with all that lives on the device, read back to the host; moves the counters on.

        For backends that need every number on the host. On a GPU this synchronises.

        Raises:
            BackendUnavailable: the step is being captured in a CUDA graph.
        """
        if self.capturing:
            raise cannot_be_captured()
        hypers = hypers.copy()
        for row, rate in enumerate(self.rates):
            if rate is not None:
                hypers["lr"][row], hypers["lr_device"][row] = float(rate), 0
        counted = [(row, counter) for row, counter in enumerate(self.counters) if counter is not None]
        if not counted:
            return hypers
        counters = [counter for _, counter in counted]
        if self.advanced() and not (self.skip is not None and self.skip.item()):
            torch._foreach_add_(counters, 1)
        known: dict[tuple[Schedule, int], dict[str, float]] = {}
        for (row, _), step in zip(counted, torch.stack(counters).tolist(), strict=True):
            key = self.rows[row], step
            if key not in known:
                known[key] = self.rows[row].derived(step)
            for name, value in known[key].items():
                hypers[name][row] = value
        return hypers

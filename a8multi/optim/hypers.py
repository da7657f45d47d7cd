"""The hyper-parameter table of a step: one row for each group, step and type, or for each counter on the device.

What the host knows is derived here; of what lives on the device only the address enters, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.loader import structs
from a8multi.plan import Live, Schedule
from a8multi.plan.schedule import SCHEDULE
from a8multi.plan.step_plan import HYPER

from .checks import check_lr
from .roster import Group, Work

# Of a group and a parameter's type: fields of ``a8_hyper`` that are the same at every step, but for lr and seed.
Constants = Callable[[Group, torch.dtype], dict[str, Any]]


def hypers_of(
    work: Work,
    constants: Constants,
    schedule_of: Callable[[Group], Schedule],
    capturing: bool,
    skip: Tensor | None = None,
    lr: float | None = None,
) -> tuple[np.ndarray, Live | None]:
    """The table of a work's next step, and what of it lives on the device; None: nothing does.

    skip: the flag with which the device may skip the step, and then does not count it. lr: in the place of the groups'.

    Raises:
        ValueError: a group's learning rate is not valid.
    """
    # The function without the optimizer, which must not be kept alive by its own roster.
    kind = getattr(constants, "__func__", constants)
    outline = work.outlines.get(kind)
    if outline is None:
        outline = work.outlines[kind] = _Outline(work, constants, schedule_of)
    rates: list[Tensor | None] = []
    on_device = outline.counts
    for at, record, schedule in zip(outline.keys_at, outline.records, outline.schedules, strict=True):
        group, step, _ = work.row_keys[at]
        check_lr(group["lr"])
        rate = rate_on_device(group["lr"], work.device) if lr is None else None
        if rate is None:
            record.lr, record.lr_device = float(group["lr"]) if lr is None else lr, None
        else:
            record.lr, record.lr_device = 0.0, rate.data_ptr()
            on_device = True
        if not isinstance(step, Tensor):
            for name, value in schedule.derived(step + 1).items():
                setattr(record, name, value)
        rates.append(rate)
    table = np.frombuffer(bytearray(outline.records), HYPER)  # copy() of an array goes field by field
    if not on_device:
        return table, None
    of_row = outline.of_row
    schedules = [outline.schedules[i] for i in of_row]
    counters = [step if isinstance(step, Tensor) else None for _, step, _ in work.row_keys]
    records = np.empty(0, SCHEDULE)
    if outline.counts:
        records = np.array([schedule.record() for schedule in outline.schedules], SCHEDULE)[of_row]
        records["step"] = [0 if counter is None else counter.data_ptr() for counter in counters]
        records["skip"] = 0 if skip is None else skip.data_ptr()
    live = Live(records, schedules, counters, [rates[i] for i in of_row], capturing, skip)
    return table[of_row], live


class _Outline:
    """What of a work's table is the same at every step while no option changes.

    Parameters whose steps are counted on the device have a row each, but for one group and type the same record.

    Attributes:
        records: of ``a8_hyper``. Each step writes lr and what follows from the step.
        schedules: of each record.
        keys_at: of each record the first row whose it is.
        of_row: of each row its record.
        counts: whether there are rows whose steps are counted on the device.
    """

    def __init__(self, work: Work, constants: Constants, schedule_of: Callable[[Group], Schedule]) -> None:
        fields: list[dict[str, Any]] = []
        self.schedules: list[Schedule] = []
        self.keys_at: list[int] = []
        self.of_row: list[int] = []
        self.counts = False
        numbers: dict[tuple[int, int | None, torch.dtype], int] = {}
        for at, (group, step, dtype) in enumerate(work.row_keys):
            taken = None if isinstance(step, Tensor) else step
            self.counts |= taken is None
            key = (id(group), taken, dtype)
            if key not in numbers:
                numbers[key] = len(fields)
                seed = int(group["seed"])
                seeds = {"seed_low": seed & 0xFFFFFFFF, "seed_high": seed >> 32}
                fields.append({**dict.fromkeys(HYPER.names or (), 0), **constants(group, dtype), **seeds})
                self.schedules.append(schedule_of(group))
                self.keys_at.append(at)
            self.of_row.append(numbers[key])
        table = np.array([tuple(one.values()) for one in fields], HYPER)
        self.records = (structs.Hyper * len(fields)).from_buffer_copy(table.tobytes())


def rate_on_device(lr: Any, device: torch.device) -> Tensor | None:
    """The learning rate as float32 on the device of the parameters, if it is on such a device; else None."""
    if not isinstance(lr, Tensor) or lr.device.type == "cpu" or lr.device.type != device.type:
        return None
    return lr.detach().to(device, torch.float32)

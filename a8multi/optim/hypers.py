"""The hyper-parameter table of a step: one row for each group, step and type, or for each counter on the device.

What the host knows is derived here; of what lives on the device only the address enters, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.plan import Live, Schedule
from a8multi.plan.schedule import SCHEDULE
from a8multi.plan.step_plan import HYPER

from .roster import Group, Work

_NAMES = HYPER.names or ()

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
    """
    numbers: dict[tuple[int, int | None, torch.dtype], int] = {}
    rows: list[tuple[Any, ...]] = []
    schedules: list[Schedule] = []
    rates: list[Tensor | None] = []
    of_row: list[int] = []
    for group, step, dtype in work.row_keys:
        taken = None if isinstance(step, Tensor) else step
        key = (id(group), taken, dtype)
        if key not in numbers:
            numbers[key] = len(rows)
            rate = rate_on_device(group["lr"], work.device) if lr is None else None
            schedule = schedule_of(group)
            seed = int(group["seed"])
            record = constants(group, dtype)
            record.update(seed_low=seed & 0xFFFFFFFF, seed_high=seed >> 32)
            if rate is None:
                record["lr"] = float(group["lr"]) if lr is None else lr
            else:
                record["lr_device"] = rate.data_ptr()
            if taken is not None:
                record.update(schedule.derived(taken + 1))
            rows.append(tuple([record.get(name, 0) for name in _NAMES]))
            schedules.append(schedule)
            rates.append(rate)
        of_row.append(numbers[key])
    table = np.array(rows, HYPER)
    counters = [step if isinstance(step, Tensor) else None for _, step, _ in work.row_keys]
    counts = any(counter is not None for counter in counters)
    if not counts and all(rate is None for rate in rates):
        return table, None
    records = np.empty(0, SCHEDULE)
    if counts:
        records = np.array([schedule.record() for schedule in schedules], SCHEDULE)[of_row]
        records["step"] = [0 if counter is None else counter.data_ptr() for counter in counters]
        records["skip"] = 0 if skip is None else skip.data_ptr()
    live = Live(records, [schedules[i] for i in of_row], counters, [rates[i] for i in of_row], capturing, skip)
    return table[of_row], live


def rate_on_device(lr: Any, device: torch.device) -> Tensor | None:
    """The learning rate as float32 on the device of the parameters, if it is on such a device; else None."""
    if not isinstance(lr, Tensor) or lr.device.type == "cpu" or lr.device.type != device.type:
        return None
    return lr.detach().to(device, torch.float32)

"""Skipping a step whose gradients are not all finite, decided on the device and never read back.

Each device of a step gets a flag that its kernels look at before they write (``StepPlan.skip``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from a8multi.backend.streams import Followed


class Screen:
    """The flags and the number of steps that were skipped.

    Attributes:
        found: the flag of each device that has a part in the step, float32 0-d.
    """

    def __init__(self) -> None:
        self.found: dict[torch.device, Tensor] = {}
        self._flags: dict[torch.device, Tensor] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._followed: dict[torch.device, Followed] = {}

    def knows(self, devices: Iterable[torch.device]) -> bool:
        """Whether there are flags for all of these devices."""
        return set(devices) <= set(self._flags)

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """For a step of parameters on these devices, not the same ones in each step."""
        self.found = {}
        for device in devices:
            if device not in self._flags:
                self._flags[device] = torch.zeros((), device=device)
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
                self._followed[device] = Followed()
            self.found[device] = self._flags[device]
            if device.type == "cuda":
                self._followed[device].use(device, (self._flags[device], self._skipped[device]))

    def begin(self, found: Tensor | None) -> None:
        """Clear the flags, or begin with what GradScaler has found."""
        for flag in self.found.values():
            if found is None:
                flag.zero_()
            else:
                flag.copy_(found.reshape(()))

    def look_at(self, device: torch.device, grads: Iterable[Tensor], scale: Tensor | None) -> None:
        """Divide and look at gradients that belong to no plan, because they or their parameters are strided."""
        flag = self.found[device]
        for grad in grads:
            if scale is not None:
                grad.copy_(grad.float().div_(scale))
            torch.maximum(flag, grad.isfinite().all().logical_not_().float(), out=flag)

    def end(self) -> None:
        """Every gradient has been looked at: what one device has found skips the step on all."""
        flags = self.found
        if len(flags) > 1:
            worst = [
                torch.stack([other.to(device, non_blocking=device.type != "cpu") for other in flags.values()]).amax()
                for device in flags
            ]
            for flag, most in zip(flags.values(), worst, strict=True):
                flag.copy_(most)
        for device in list(flags)[:1]:  # one counts the step for all
            self._skipped[device].add_(flags[device] != 0)

    def skipped(self) -> int:
        """Steps skipped since the optimizer was built. Waits for the device."""
        return sum(int(count) for count in self._skipped.values())

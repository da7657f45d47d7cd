"""What a backend is: the operations that the rest of the package calls, and how a backend says what it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from a8multi.plan import Live, StepPlan
from a8multi.quant.formats import StateFormat


@dataclass(frozen=True)
class BackendReport:
    """What is known of one backend on this machine, as ``a8multi.backends()`` lists it.

    Attributes:
        name: "cuda", "cupy", "cpu" or "torch".
        available: whether it can run here.
        reason: why not, and what to do; empty when available.
        path: of the loaded library, or None.
        version: of the library or package, or None.
        detail: the instruction set that runs, or the architectures compiled in.
        ops: the operations it offers: "codec", "elementwise", "adafactor".
        devices: types of the devices it serves; empty: all.
    """

    name: str
    available: bool
    reason: str = ""
    path: str | None = None
    version: str | None = None
    detail: str = ""
    ops: tuple[str, ...] = ()
    devices: tuple[str, ...] = field(default=())


class Backend(Protocol):
    """The operations of a step. Every argument has been checked; tensors are contiguous and on one device.

    hypers: records of ``plan.step_plan.HYPER``, one a row that items refer to.
    live: what of them lives on the device and must be read there; None: nothing does.
    """

    name: str

    def elementwise(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        """One step of the element-wise rule ``plan.rule``: updates parameters and moments in place."""

    def screen(
        self, plan: StepPlan, scale: Tensor | None, found: Tensor, hypers: np.ndarray, live: Live | None = None
    ) -> None:
        """Divides ``plan.grads`` in place and looks at them.

        Args:
            scale: what to divide by, float32 0-d on the plan's device; None: leaves them.
            found: float32 0-d there; becomes 1 when one is not finite afterwards, else it stays.
            hypers, live: of the step that follows, so that its tables are made once.
        """

    def adafactor(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        """One Adafactor step: updates parameters and moments in place."""

    def sums(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> list[tuple[Tensor, Tensor]]:
        """Sums of the squared gradients over each row and over each column of every item, float32 [rows] and [cols].

        They are ``plan.factors``, which the next call with this plan overwrites: a plan is for this or for
        ``adafactor_scaled``, not for both. ``hypers`` is not read, but has a row for every item.
        """

    def adafactor_scaled(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        """Adafactor's norm and apply phases with other factors in the place of those of 1 / sqrt(v).

        They are ``plan.factors``: what the caller has written there, and 1 where it has written nothing.
        """

    def draw(self, matrix: Tensor, taken: Tensor, before: Tensor | None, gap: int, seed: int, noise_id: int) -> None:
        """Writes APOLLO's random matrix for a parameter that has taken so many steps.

        Args:
            matrix: float32 or bfloat16, contiguous.
            taken: int64 0-d on the device of ``matrix``; the matrix is that of interval ``taken // gap``.
            before: the ``taken`` of which ``matrix`` is: when its interval is the same, nothing is done. None: of none.
            noise_id: which of the seed's matrices.
        """

    def quantize(
        self,
        values: Tensor,
        codes: Tensor,
        blocks: Tensor,
        fmt: StateFormat,
        block_size: int,
        stochastic: bool,
        seed: int,
    ) -> None:
        """Writes codes and block headers of ``values``."""

    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        """Writes the values of ``codes``."""

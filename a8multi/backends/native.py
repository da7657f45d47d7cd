"""The compiled libraries: one binding for ``cpu`` and ``cuda``.

Turns a plan into ``a8_batch`` and calls the entry. On CUDA the tables travel to the device; nothing synchronises.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi import settings
from a8multi.errors import BackendUnavailable, NativeError
from a8multi.loader import Library, load, structs
from a8multi.plan import StepPlan
from a8multi.plan.step_plan import DTYPES
from a8multi.quant.formats import StateFormat

from .base import BackendReport


class NativeBackend:
    """A loaded library, ``cpu`` or ``cuda``.

    Attributes:
        name: which.
        library: the loaded library.
        isa_ran: of the last call, the variant whose code ran ("avx2"); None on CUDA or before the first call.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.library: Library = load(name)
        self.isa_ran: str | None = None

    def report(self) -> BackendReport:
        info = self.library.info
        ops = tuple(op.name.lower() for op in structs.Op if op in info.ops and op.name)
        detail = info.architectures if self.name == "cuda" else f"{self._isa_name()} (usable: {', '.join(info.isa_usable)})"
        return BackendReport(self.name, True, "", str(self.library.path), info.version, detail, ops)

    def _isa_name(self) -> str:
        chosen = settings.cpu_isa()
        return (self.library.info.isa_best or "none") if chosen == "auto" else chosen

    def _isa(self) -> int:
        """The variant to run, as the ABI numbers it.

        Raises:
            BackendUnavailable: A8MULTI_CPU_ISA names one that this machine cannot run.
        """
        chosen = settings.cpu_isa()
        if chosen == "auto" or self.name != "cpu":
            return structs.Isa.AUTO
        usable = self.library.info.isa_usable
        if chosen not in usable:
            raise BackendUnavailable(
                f"{settings.CPU_ISA.name}={chosen}: this processor or {self.library.path} lacks it; usable here: "
                f"{', '.join(usable)}. Unset the variable to use {self.library.info.isa_best}."
            )
        return structs.Isa[chosen.upper()]

    def check(self) -> None:
        """Raise what a call would raise because of the settings."""
        self._isa()

    @contextmanager
    def _exec(self, device: torch.device, scratch: Tensor | None = None) -> Iterator[structs.Exec]:
        where = structs.Exec()
        where.threads = torch.get_num_threads()
        where.isa = self._isa()
        if device.type == "cuda":
            where.device = device.index
            where.stream = torch.cuda.current_stream(device).cuda_stream
        if scratch is not None:
            where.scratch = scratch.data_ptr()
            where.scratch_bytes = scratch.numel() * 4
        yield where
        self.isa_ran = structs.Isa(where.isa_ran).name.lower() if where.isa_ran else None

    def _step(self, entry: str, plan: StepPlan, hypers: np.ndarray, scratch: Tensor | None, *more: Any) -> None:
        tables = {"tensors": plan.address(), "chunks": plan.chunks, "tiles": plan.tiles, "hypers": hypers}
        batch = structs.Batch()
        kept = []  # whatever holds the tables alive until the call returns
        for name, table in tables.items():
            setattr(batch, f"{name[:-1]}_count", len(table))
            if len(table) == 0:
                continue
            if plan.device.type == "cuda":
                table = _upload(table, plan.device)
                kept.append(table)
                setattr(batch, name, table.data_ptr())
            else:
                setattr(batch, name, table.ctypes.data)
        with self._exec(plan.device, scratch) as where:
            try:
                self.library.call(entry, ctypes.byref(where), ctypes.byref(batch), *more)
            except NativeError as error:
                names = ", ".join(f"{i}: {item.name}" for i, item in enumerate(plan.items[:64]))
                raise NativeError(error.status, f"{error.message} (tensors {names})", error.entry) from error

    def adam(self, plan: StepPlan, hypers: np.ndarray) -> None:
        self._step("a8_adam", plan, hypers, None)

    def adafactor(self, plan: StepPlan, hypers: np.ndarray) -> None:
        self._step("a8_adafactor", plan, hypers, plan.scratch, int(structs.Phase.ALL_PHASES))

    def _codec(
        self, entry: str, values: Tensor, codes: Tensor, blocks: Tensor, fmt: StateFormat, block_size: int, **more: int
    ) -> None:
        codec = structs.Codec(
            values=values.data_ptr(),
            codes=codes.data_ptr(),
            blocks=blocks.data_ptr(),
            numel=values.numel(),
            block_size=block_size,
            dtype=DTYPES[values.dtype],
            format=fmt.code,
            **more,
        )
        with self._exec(values.device) as where:
            self.library.call(entry, ctypes.byref(where), ctypes.byref(codec))

    def quantize(
        self, values: Tensor, codes: Tensor, blocks: Tensor, fmt: StateFormat, block_size: int, stochastic: bool, seed: int
    ) -> None:
        seed_low, seed_high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        more = {"stochastic": int(stochastic), "seed_low": seed_low, "seed_high": seed_high}
        self._codec("a8_quantize", values, codes, blocks, fmt, block_size, **more)

    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        self._codec("a8_dequantize", values, codes, blocks, fmt, block_size)


def _upload(table: np.ndarray, device: torch.device) -> Tensor:
    """The table's bytes on the device, without a synchronisation: through pinned memory, in stream order."""
    host = torch.from_numpy(table.view(np.uint8).copy()).pin_memory()
    return host.to(device, non_blocking=True)

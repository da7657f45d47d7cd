"""The compiled libraries: one binding for ``cpu`` and ``cuda``."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi import settings
from a8multi.errors import BackendUnavailable, NativeError
from a8multi.loader import Library, load, structs
from a8multi.plan import Live, StepPlan
from a8multi.plan.step_plan import DTYPES, has_norm
from a8multi.quant.formats import StateFormat

from . import marshal, streams
from .base import BackendReport

_SCHEDULES = ctypes.POINTER(structs.Schedule)
_HYPERS = ctypes.POINTER(structs.Hyper)


class NativeBackend:
    """A loaded library, ``cpu`` or ``cuda``.

    Attributes:
        name: which.
        library: the loaded library.
        isa_ran: of the last call, the variant whose code ran ("avx2"); None on CUDA or before the first call.
    """

    def __init__(self, name: str) -> None:
        if name == "cuda":
            require_cuda()
        self.name = name
        self.library: Library = load(name)
        self.isa_ran: str | None = None
        self._uploads = structs.Op.UPLOAD in self.library.info.ops

    def report(self) -> BackendReport:
        info = self.library.info
        # What no backend offers: optim/reader.py uses the one, the steps the other.
        offered = info.ops & ~(structs.Op.READER | structs.Op.UPLOAD)
        ops = tuple(op.name.lower() for op in structs.Op if op in offered and op.name)
        detail = info.architectures
        if self.name == "cpu":
            chosen = settings.cpu_isa()
            runs = info.isa_best if chosen == "auto" else chosen
            detail = f"{runs} (usable: {', '.join(info.isa_usable)})"
        return BackendReport(self.name, True, "", str(self.library.path), info.version, detail, ops)

    def check(self) -> None:
        """Raise what a call would raise because of the settings."""
        self._isa()

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

    def _where(self, device: torch.device, scratch: Tensor | None = None) -> structs.Exec:
        where = structs.Exec()
        if device.type == "cuda":
            where.device, where.stream = device.index, streams.current(device)
        else:
            where.threads, where.isa = torch.get_num_threads(), self._isa()
        if scratch is not None:
            where.scratch, where.scratch_bytes = scratch.data_ptr(), scratch.numel() * 4
        return where

    def _call(self, entry: str, where: structs.Exec, *arguments: Any) -> None:
        """Calls an entry; where it runs on a CUDA device, that is to be the current one."""
        self.library.call(entry, ctypes.byref(where), *arguments)
        self.isa_ran = structs.Isa(where.isa_ran).name.lower() if where.isa_ran else None

    def _call_once(self, entry: str, device: torch.device, *arguments: Any) -> None:
        with streams.on(device):
            self._call(entry, self._where(device), *arguments)

    def _batch(
        self, plan: StepPlan, hypers: np.ndarray, live: Live | None, where: structs.Exec
    ) -> tuple[structs.Batch, int | None]:
        return marshal.batch_of(plan, hypers, live, partial(self._upload, where) if self._uploads else None)

    def _upload(self, where: structs.Exec, data: bytes, to: int) -> None:
        self._call("a8_upload", where, data, to, len(data))

    def _step(
        self, entry: str, plan: StepPlan, hypers: np.ndarray, live: Live | None, *more: int, scratch: Any = None
    ) -> None:
        where = self._where(plan.device, scratch)
        try:
            with streams.on(plan.device):
                batch, schedules = self._batch(plan, hypers, live, where)
                if live is not None and schedules is not None:
                    tables = (ctypes.cast(schedules, _SCHEDULES), ctypes.cast(batch.hypers, _HYPERS))
                    self._call("a8_derive", where, *tables, batch.hyper_count, live.advanced())
                self._call(entry, where, ctypes.byref(batch), *more)
        except NativeError as error:
            names = ", ".join(f"{i}: {item.name}" for i, item in enumerate(plan.items[:64]))
            raise NativeError(error.status, f"{error.message} (tensors {names})", error.entry) from error

    def elementwise(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        phases = int(structs.Phase.ALL_PHASES)
        scratch = marshal.scratch_of(plan, live) if has_norm(plan.rule) else None
        self._step("a8_elementwise", plan, hypers, live, phases, scratch=scratch)

    def screen(
        self, plan: StepPlan, scale: Tensor | None, found: Tensor, hypers: np.ndarray, live: Live | None = None
    ) -> None:
        where = self._where(plan.device)
        divisor = None if scale is None else scale.data_ptr()
        with streams.on(plan.device):
            batch, _ = self._batch(plan, hypers, live, where)
            self._call("a8_screen", where, ctypes.byref(batch), divisor, found.data_ptr())

    def adafactor(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        self._step("a8_adafactor", plan, hypers, live, int(plan.phases), scratch=marshal.scratch_of(plan, live))

    def sums(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> list[tuple[Tensor, Tensor]]:
        factors = plan.factors
        self._step("a8_adafactor", plan, hypers, live, int(structs.Phase.REDUCE), scratch=plan.scratch)
        return factors

    def adafactor_scaled(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        phases = int(structs.Phase.NORM | structs.Phase.APPLY)
        self._step("a8_adafactor", plan, hypers, live, phases, scratch=plan.scratch)

    def draw(self, matrix: Tensor, taken: Tensor, before: Tensor | None, gap: int, seed: int, noise_id: int) -> None:
        counters = taken.data_ptr(), None if before is None else before.data_ptr()
        array = matrix.data_ptr(), matrix.numel(), DTYPES[matrix.dtype]
        self._call_once("a8_draw", matrix.device, *array, *counters, gap, seed & 0xFFFFFFFF, seed >> 32, noise_id)

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
        codec = marshal.codec_of(values, codes, blocks, fmt, block_size, stochastic, seed)
        self._call_once("a8_quantize", values.device, ctypes.byref(codec))

    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        codec = marshal.codec_of(values, codes, blocks, fmt, block_size)
        self._call_once("a8_dequantize", values.device, ctypes.byref(codec))


def require_cuda() -> None:
    """Raise BackendUnavailable unless torch can use an NVIDIA device here."""
    if torch.version.hip:
        raise BackendUnavailable("this torch is built for ROCm; the CUDA kernels need an NVIDIA device")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise BackendUnavailable(f"torch {torch.__version__} ({built}) sees no CUDA device on this machine")

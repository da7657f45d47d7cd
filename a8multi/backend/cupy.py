"""The CUDA kernels through CuPy: the sources of ``native/cuda`` compiled by NVRTC at first use, cached on disk by CuPy.

For machines where the compiled library is missing or was built for other devices. Nothing is written twice: the text
comes from ``loader.sources``, the structs from ``loader.structs``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi import settings
from a8multi.errors import BackendUnavailable
from a8multi.loader import flatten, geometry, structs
from a8multi.plan import Live, StepPlan
from a8multi.plan.step_plan import DTYPES, has_norm
from a8multi.quant.formats import StateFormat

from . import marshal, streams
from .base import BackendReport
from .native import require_cuda

# As CMakeLists.txt builds the library, so that the bits are the same.
_OPTIONS = ("--std=c++17", "-fmad=false", "-ftz=true", "-prec-div=true", "-prec-sqrt=true")
_MAX_GRID = 8192  # of the kernels that take any grid
# Kernels by the file that holds them. A file is compiled when one of its kernels is first wanted.
_KERNELS = {
    "adam": ("adam", "adam_lanes"),
    "momentum": ("lion", "lion_lanes", "sgd", "sgd_lanes", "lars", "lars_lanes"),
    "element": ("rmsprop", "adagrad", "ademamix", "lamb"),
    "measure": ("measure",),
    "adafactor": tuple(
        f"adafactor_{part}"
        for part in (
            "reduce",
            "means",
            "factors",
            "residual",
            "confidence",
            "confidence_factors",
            "norm_factored",
            "norm_full",
            "limit",
            "apply_factored",
            "apply_full",
        )
    ),
    "totals": ("totals",),
    "codec": ("quantize", "dequantize"),
    "draw": ("draw",),
    "schedule": ("derive",),
    "upload": ("upload",),
    "screen": ("screen",),
}
_ADAFACTOR = ("adafactor_norm_full", "totals")  # one kernel of each file that its steps want
_FILES = {name: f"cuda/kernels/{file}.cuh" for file, names in _KERNELS.items() for name in names}


class _TorchStream:
    """A stream of torch's in the CUDA stream protocol, which older versions of torch do not have."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class CupyBackend:
    """The kernels that ``loader.sources`` finds, compiled for each device when it first runs one.

    Attributes:
        nvrtc_version: of the compiler, (major, minor).
    """

    name = "cupy"
    ops = ("codec", "elementwise", "adafactor")

    def __init__(self) -> None:
        require_cuda()
        try:
            import cupy

            self.nvrtc_version: tuple[int, int] = cupy.cuda.nvrtc.getVersion()
        except Exception as error:  # CuPy raises other types than ImportError when a library does not load
            raise BackendUnavailable(
                f"CuPy or its compiler NVRTC cannot be loaded: {error}. Install the one for your CUDA version with its "
                f'libraries: pip install "cupy-cuda13x[ctk]"'
            ) from error
        self._cupy = cupy
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}

    def report(self) -> BackendReport:
        detail = f"NVRTC {'.'.join(map(str, self.nvrtc_version))}"
        return BackendReport(self.name, True, "", None, self._cupy.__version__, detail, self.ops)

    @cached_property
    def _threads(self) -> int:
        return geometry()["A8_THREADS"]

    @cached_property
    def _few_chunks(self) -> int:
        return geometry()["A8_FEW_CHUNKS"]

    @cached_property
    def _words(self) -> type[ctypes.Structure]:
        """``a8_upload_words`` of upload.cuh."""
        words = ctypes.c_uint32 * (geometry()["A8_UPLOAD_BYTES"] // 4)
        return type("a8_upload_words", (ctypes.Structure,), {"_fields_": [("at", words)]})

    def _kernel(self, name: str) -> Any:
        """The function ``a8_<name>_kernel``, a name of _KERNELS."""
        if name not in self._kernels:
            file = _FILES[name]
            try:
                if file not in self._modules:
                    self._modules[file] = self._cupy.RawModule(code=flatten(file), options=_OPTIONS)
                self._kernels[name] = self._modules[file].get_function(f"a8_{name}_kernel")
            except Exception as error:  # of NVRTC, of the driver, or of the cache on disk
                raise BackendUnavailable(
                    f"CuPy {self._cupy.__version__} cannot compile {file}: {error}. {settings.BACKEND.name}=torch runs "
                    f"without it"
                ) from error
        return self._kernels[name]

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        pointer = streams.current(device)
        with streams.on(device), self._cupy.cuda.Device(device.index):
            if hasattr(self._cupy.cuda.Stream, "from_external"):
                stream = self._cupy.cuda.Stream.from_external(_TorchStream(pointer))
            else:  # CuPy < 14
                stream = self._cupy.cuda.ExternalStream(pointer, device.index)
            with stream:
                yield

    def _run(self, name: str, grid: int, *arguments: ctypes.Structure | np.generic) -> None:
        """Launches on the current device and stream. A struct is passed by value."""
        values = [
            np.frombuffer(bytes(x), dtype=np.dtype(type(x))) if isinstance(x, ctypes.Structure) else x
            for x in arguments
        ]
        self._kernel(name)((grid,), (self._threads,), tuple(values))

    def _launch(self, name: str, device: torch.device, grid: int, *arguments: ctypes.Structure | np.generic) -> None:
        with self._on(device):
            self._run(name, grid, *arguments)

    def _upload(self, device: torch.device, data: bytes, to: int) -> None:
        words = self._words()
        ctypes.memmove(ctypes.addressof(words), data, len(data))
        with self._on(device):
            self._run("upload", 1, words, np.uint64(to), np.uint32(len(data) // 4))

    def _batch(self, plan: StepPlan, hypers: np.ndarray, live: Live | None, *names: str) -> structs.Batch:
        """The batch of a plan, its hypers derived on the device where steps are counted there.

        names: of kernels that the step will want, which must compile before a counter moves.
        """
        if "upload" not in self._kernels:  # compiles in the first step, though a later one is the first to want it
            with self._on(plan.device):
                self._kernel("upload")
        batch, schedules = marshal.batch_of(plan, hypers, live, partial(self._upload, plan.device))
        if live is not None and schedules is not None:
            with self._on(plan.device):
                for name in names:
                    self._kernel(name)
            rows = batch.hyper_count
            tables = np.uint64(schedules), np.uint64(batch.hypers)
            grid = -(-rows // self._threads)
            self._launch("derive", plan.device, grid, *tables, np.uint32(rows), np.uint32(live.advanced()))
        return batch

    def elementwise(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        name = plan.rule.name.lower()
        batch = self._batch(plan, hypers, live, name, *(("measure", "totals") if has_norm(plan.rule) else ()))
        chunks = batch.chunk_count
        # `group`: how many chunks a block of threads takes at a time; any gives the same bits.
        arguments: tuple[ctypes.Structure | np.generic, ...] = (batch, np.uint32(1))
        with self._on(plan.device):
            if has_norm(plan.rule):
                scratch = np.uint64(marshal.scratch_of(plan, live).data_ptr())
                self._run("measure", -(-chunks * 32 // self._threads), batch, scratch)
                self._run("totals", batch.tensor_count, batch, scratch, np.uint32(0))
                arguments = (batch, scratch, np.uint32(1))
            other = f"{name}_lanes"
            self._run(other if batch.hints and other in _FILES else name, chunks, *arguments)

    def screen(
        self, plan: StepPlan, scale: Tensor | None, found: Tensor, hypers: np.ndarray, live: Live | None = None
    ) -> None:
        batch, _ = marshal.batch_of(plan, hypers, live, partial(self._upload, plan.device))
        addresses = np.uint64(0 if scale is None else scale.data_ptr()), np.uint64(found.data_ptr())
        self._launch("screen", plan.device, batch.chunk_count, batch, *addresses)

    def adafactor(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        self._adafactor(plan, self._batch(plan, hypers, live, *_ADAFACTOR), marshal.scratch_of(plan, live), plan.phases)

    def sums(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> list[tuple[Tensor, Tensor]]:
        factors = plan.factors
        self._adafactor(plan, self._batch(plan, hypers, live, *_ADAFACTOR), plan.scratch, structs.Phase.REDUCE)
        return factors

    def adafactor_scaled(self, plan: StepPlan, hypers: np.ndarray, live: Live | None = None) -> None:
        phases = structs.Phase.NORM | structs.Phase.APPLY
        self._adafactor(plan, self._batch(plan, hypers, live, *_ADAFACTOR), plan.scratch, phases)

    def _adafactor(self, plan: StepPlan, batch: structs.Batch, scratch: Tensor, phases: structs.Phase) -> None:
        """Launches what abi.cu does for these phases."""
        phase = structs.Phase
        tensors, chunks, tiles = batch.tensor_count, batch.chunk_count, batch.tile_count
        factored = batch.factored_chunks or (chunks if tiles else 0)
        full, warps = chunks - batch.factored_chunks, self._threads // 32
        width = 1 if full <= self._few_chunks else warps  # chunks of a block of threads
        factored_groups, full_groups = -(-factored // warps), -(-full // width)
        confidence = (
            (phase.RESIDUAL, "residual"),
            (phase.CONFIDENCE, "confidence"),
            (phase.CONFIDENCE, "confidence_factors"),
        )
        # Which phases want a kernel, its grid (0 is no launch) and what it takes besides the batch and the scratch.
        launches: list[tuple[structs.Phase, str, int, tuple[int, ...]]] = [
            (phase.REDUCE, "adafactor_reduce", tiles, ()),
            (phase.REDUCE | phase.MOMENTS, "adafactor_means", tiles, (int(phases),)),
            (phase.MOMENTS, "adafactor_factors", tiles, ()),
            *((asked, f"adafactor_{name}", tiles, (0,)) for asked, name in confidence),
            (phase.NORM, "adafactor_norm_factored", factored_groups, ()),
            (phase.NORM, "adafactor_norm_full", full_groups, (width,)),
            (phase.NORM, "totals", tensors, (0,)),
            *((asked, f"adafactor_{name}", tiles, (1,)) for asked, name in confidence),
            (phase.LIMIT, "adafactor_limit", chunks, ()),
            (phase.LIMIT, "totals", tensors, (1,)),
            (phase.APPLY, "adafactor_apply_factored", factored_groups, ()),
            (phase.APPLY, "adafactor_apply_full", full_groups, (width,)),
        ]
        with self._on(plan.device):
            for asked, name, grid, more in launches:
                if grid and asked & phases:
                    self._run(name, grid, batch, np.uint64(scratch.data_ptr()), *map(np.uint32, more))

    def draw(self, matrix: Tensor, taken: Tensor, before: Tensor | None, gap: int, seed: int, noise_id: int) -> None:
        array = np.uint64(matrix.data_ptr()), np.int64(matrix.numel()), np.uint32(DTYPES[matrix.dtype])
        counters = np.uint64(taken.data_ptr()), np.uint64(0 if before is None else before.data_ptr())
        numbers = np.int64(gap), np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), np.uint32(noise_id)
        pairs = (matrix.numel() + 1) // 2
        grid = min(-(-pairs // self._threads), _MAX_GRID)
        self._launch("draw", matrix.device, grid, *array, *counters, *numbers)

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
        warps = blocks.shape[0]
        self._launch("quantize", values.device, min(-(-warps * 32 // self._threads), _MAX_GRID), codec)

    def dequantize(self, codes: Tensor, blocks: Tensor, values: Tensor, fmt: StateFormat, block_size: int) -> None:
        codec = marshal.codec_of(values, codes, blocks, fmt, block_size)
        pairs = (values.numel() + 1) // 2
        self._launch("dequantize", values.device, min(-(-pairs // self._threads), _MAX_GRID), codec)

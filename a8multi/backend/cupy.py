"""The CUDA kernels through CuPy: the sources of ``native/cuda`` compiled by NVRTC at first use, cached on disk by CuPy.

For machines where the compiled library is missing or was built for other devices. Nothing is written twice: the text
comes from ``loader.sources``, the structs from ``loader.structs``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.errors import BackendUnavailable
from a8multi.loader import flatten, geometry
from a8multi.plan import StepPlan
from a8multi.quant.formats import StateFormat

from . import marshal
from .base import BackendReport
from .native import require_cuda

# As CMakeLists.txt builds the library, so that the bits are the same.
_OPTIONS = ("--std=c++17", "-fmad=false", "-ftz=true", "-prec-div=true", "-prec-sqrt=true")
_MAX_GRID = 8192  # of the kernels that take any grid


class _TorchStream:
    """A stream of torch's in the CUDA stream protocol, which older versions of torch do not have."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class CupyBackend:
    """The kernels that ``loader.sources`` finds, compiled for each device when it first runs one."""

    name = "cupy"
    ops = ("codec", "adam")

    def __init__(self) -> None:
        require_cuda()
        try:
            import cupy
        except Exception as error:  # CuPy raises other types than ImportError when its own libraries do not load
            raise BackendUnavailable(
                f"CuPy cannot be imported: {error}. Install the one for your CUDA version: pip install cupy-cuda13x"
            ) from error
        self._cupy = cupy

    def report(self) -> BackendReport:
        detail = f"NVRTC {'.'.join(map(str, self._cupy.cuda.nvrtc.getVersion()))}"
        return BackendReport(self.name, True, "", None, self._cupy.__version__, detail, self.ops)

    @cached_property
    def _threads(self) -> int:
        return geometry()["A8_THREADS"]

    @cached_property
    def _kernels(self) -> dict[str, Any]:
        kernels = {}
        for family, names in (("adam", ("adam",)), ("codec", ("quantize", "dequantize"))):
            module = self._cupy.RawModule(code=flatten(f"cuda/kernels/{family}.cuh"), options=_OPTIONS)
            kernels.update({name: module.get_function(f"a8_{name}_kernel") for name in names})
        return kernels

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        pointer = torch.cuda.current_stream(device).cuda_stream
        with self._cupy.cuda.Device(device.index):
            if hasattr(self._cupy.cuda.Stream, "from_external"):
                stream = self._cupy.cuda.Stream.from_external(_TorchStream(pointer))
            else:  # CuPy < 14
                stream = self._cupy.cuda.ExternalStream(pointer, device.index)
            with stream:
                yield

    def _launch(self, name: str, device: torch.device, grid: int, struct: ctypes.Structure, *more: np.uint32) -> None:
        argument = np.frombuffer(bytes(struct), dtype=np.dtype(type(struct)))
        with self._on(device):
            self._kernels[name]((grid,), (self._threads,), (argument, *more))

    def adam(self, plan: StepPlan, hypers: np.ndarray) -> None:
        batch = marshal.batch_of(plan, hypers)
        # The last argument is how many chunks a block of threads takes at a time: any gives the same bits.
        self._launch("adam", plan.device, batch.chunk_count, batch, np.uint32(1))

    def adafactor(self, plan: StepPlan, hypers: np.ndarray) -> None:
        raise BackendUnavailable("the cupy backend offers no adafactor; choose another backend")

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

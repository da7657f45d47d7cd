"""What the checks on a GPU share: the libraries, gradients, comparison of bytes."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loader.structs import Dtype, Exec, Format, Info

CHUNK = 16384
TORCH = {Dtype.F32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.F16: torch.float16}
FORMATS = {"none": Format.NONE, "f32": Format.STATE_F32, "bf16": Format.STATE_BF16, "int8": Format.INT8}
FORMATS |= {"nf4": Format.NF4, "log8": Format.LOG8, "factored": Format.FACTORED}
ARRAYS = ("param", "first", "first_block", "second", "second_block")


class Library:
    """One native library and where its arrays live."""

    def __init__(self, path: str, device: str) -> None:
        self.path, self.device = path, torch.device(device)
        self.native = ctypes.CDLL(os.path.abspath(path))
        self.native.a8_last_error.restype = ctypes.c_char_p
        self.info = Info()
        self.check(self.native.a8_get_info(ctypes.byref(self.info)))

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"{self.path}: status {status}: {self.native.a8_last_error().decode()}")

    def exec(self) -> Exec:
        if self.device.type == "cpu":
            return Exec(device=-1, threads=torch.get_num_threads())
        return Exec(device=self.device.index or 0, stream=torch.cuda.current_stream().cuda_stream)

    def run(self, entry: str, argument: ctypes.Structure, *more: int, scratch: torch.Tensor | None = None) -> None:
        execution = self.exec()
        if scratch is not None:
            execution.scratch, execution.scratch_bytes = scratch.data_ptr(), scratch.numel() * 4
        self.check(getattr(self.native, entry)(ctypes.byref(execution), ctypes.byref(argument), *more))

    def upload(self, table: ctypes.Array) -> torch.Tensor:
        """The table's bytes where this library reads them; keep the result alive until the call has run."""
        return torch.frombuffer(bytearray(bytes(table)), dtype=torch.uint8).to(self.device)


def moment_bytes(name: str, numel: int) -> int:
    """Bytes of the elements of a moment, without headers."""
    per = {"none": 0.0, "factored": 0.0, "f32": 4.0, "bf16": 2.0, "int8": 1.0, "log8": 1.0, "nf4": 0.5}[name]
    return -int(-numel * per // 1)


def random_params(numels: list[int], dtypes: list[Dtype], generator: torch.Generator) -> list[torch.Tensor]:
    """Small normal numbers with zeros of both signs among them."""
    params = []
    for numel, dtype in zip(numels, dtypes, strict=True):
        p = torch.randn(numel, generator=generator) * 0.02
        p[torch.rand(numel, generator=generator) < 0.2] = 0
        p[torch.rand(numel, generator=generator) < 0.1] *= -1  # -0 too
        params.append(p.to(TORCH[dtype]))
    return params


def gradient(numel: int, dtype: Dtype, scale: float, generator: torch.Generator, step: int) -> torch.Tensor:
    """Blocks of very different sizes, some all zero; the last steps of the largest scales hold infinities and NaN."""
    blocks = -(-numel // 64)
    spread = torch.exp(2 * torch.randn(blocks, 1, generator=generator)) * scale
    spread[torch.rand(blocks, 1, generator=generator) < 0.1] = 0
    g = (torch.randn(blocks, 64, generator=generator) * spread).flatten()[:numel].clone()
    if scale == 1e18 and step > 90 and numel > 5000:
        g[3000], g[5000] = float("inf"), float("nan")
    return g.to(TORCH[dtype])


def differences(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None) -> int:
    """Bytes that differ. dtype: of a float array, in which two NaN count as equal, whatever their bits."""
    differ = a != b
    if dtype is not None and differ.any():
        both = a.clone().view(dtype).isnan() & b.clone().view(dtype).isnan()
        differ &= ~both.repeat_interleave(dtype.itemsize)
    return int(differ.sum())


def float_type(name: str, param: Dtype, first: str, second: str) -> torch.dtype | None:
    """Type of the floats of an array of a step; None for codes and integers."""
    if name in ("first", "second"):
        fmt = first if name == "first" else second
        return torch.bfloat16 if fmt == "bf16" else torch.float32 if fmt in ("f32", "factored") else None
    if name == "second_block":
        return torch.float32 if second == "factored" else None
    return TORCH[param] if name == "param" else torch.float32

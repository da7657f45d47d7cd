"""The storage formats by name: what tensors hold a moment, and how they start.

The arithmetic of a format is in native/include/a8/format.h and, for the torch backend, in backend/torch_formats.py;
here is only its shape. A format never changes under its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from a8multi.errors import StateFormatError
from a8multi.loader import geometry
from a8multi.loader.structs import Format


@dataclass(frozen=True)
class StateFormat:
    """How the elements of one moment are stored.

    Attributes:
        name: what users write, such as "int8".
        code: the ABI's number for it.
        dtype: of the tensor of codes (or of values, for "fp32" and "bf16").
        packed: two codes a byte; the codes are then a flat tensor of ceil(numel / 2) bytes, else of the value's shape.
        header: dtype of the block headers, one a block: a scale, or log8's word of lo and step. None without blocks.
        zero_byte: the byte of which an array of zeros consists.
    """

    name: str
    code: Format
    dtype: torch.dtype
    packed: bool = False
    header: torch.dtype | None = None
    zero_byte: int = 0

    @property
    def quantized(self) -> bool:
        return self.header is not None

    def codes_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return ((shape.numel() + 1) // 2,) if self.packed else tuple(shape)

    def blocks_shape(self, numel: int, block_size: int) -> tuple[int, ...]:
        return (block_count(numel, block_size),)

    def allocate(self, shape: torch.Size, block_size: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Codes and block headers of an array of zeros of this shape; no headers when the format has none."""
        codes = torch.full(self.codes_shape(shape), self.zero_byte, dtype=self.dtype, device=device)
        if self.header is None:
            return codes, None
        blocks = torch.zeros(self.blocks_shape(shape.numel(), block_size), dtype=self.header, device=device)
        return codes, blocks


FORMATS = {
    entry.name: entry
    for entry in (
        StateFormat("fp32", Format.STATE_F32, torch.float32),
        StateFormat("bf16", Format.STATE_BF16, torch.bfloat16),
        StateFormat("int8", Format.INT8, torch.int8, header=torch.float32),
        StateFormat("nf4", Format.NF4, torch.uint8, packed=True, header=torch.float32, zero_byte=0x77),
        StateFormat("log8", Format.LOG8, torch.uint8, header=torch.int32),
    )
}


def state_format(name: str) -> StateFormat:
    """The format of that name.

    Raises:
        StateFormatError: for any other; lists the valid ones.
    """
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise StateFormatError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}") from None


def block_count(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def check_block_size(name: str, block_size: object) -> int:
    """``block_size`` if it is one that the kernels take.

    Raises:
        ValueError: naming the parameter, otherwise.
    """
    least, most = geometry()["A8_MIN_BLOCK"], geometry()["A8_MAX_BLOCK"]
    if not isinstance(block_size, int) or not least <= block_size <= most or block_size & (block_size - 1):
        raise ValueError(f"{name} must be a power of two from {least} to {most}, not {block_size!r}")
    return block_size

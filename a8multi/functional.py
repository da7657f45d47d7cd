"""Block-wise quantisation of arrays, on any backend."""

from __future__ import annotations

import torch
from torch import Tensor

from a8multi.backend.registry import backend_for
from a8multi.errors import StateFormatError
from a8multi.plan import plain
from a8multi.plan.step_plan import DTYPES
from a8multi.quant.formats import FORMATS, StateFormat, check_block_size

__all__ = ["dequantize_blockwise", "quantize_blockwise"]


def quantize_blockwise(
    values: Tensor,
    format: str = "log8",  # noqa: A002  (the field's word; nothing here formats strings)
    *,
    block_size: int = 128,
    stochastic: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantise an array in blocks of ``block_size`` consecutive elements of its flattened (row-major) order.

    - "log8", for values >= 0: eight bits of piecewise-linear logarithm between the block's smallest and largest
      non-zero value. Zero is exact. Values below 2**-126 count as zero, NaN as infinity, which does not come back
      finite. With s = step / 2**23 (header below), a value comes back with a relative error of at most s / 2 when
      rounded to nearest inside an octave, s at most.
    - "int8": linear, scaled by the block's largest magnitude, to nearest, ties to even.
    - "nf4": the nearest of the 16 levels of QLoRA, scaled by the block's largest magnitude. Zero is exact.

    In int8 and nf4 a block whose largest magnitude is below 1e-36 becomes zeros, and a block that holds a NaN or an
    infinity becomes NaN throughout. Every backend gives the same codes.

    Args:
        values: float32, bfloat16 or float16, any shape and strides, on any device. Not changed.
        format: "log8", "int8" or "nf4".
        block_size: a power of two from 32 to 4096. The last block may be partial.
        stochastic: log8 only: round to one of the two neighbouring codes so that the expected code is exact. The noise
            follows from ``seed`` and the element's number: the same on every device, and on every call.
        seed: of the noise, 0 to 2**64 - 1.
    Returns:
        ``(codes, blocks)``, new tensors on the device of ``values``. codes: log8 uint8, int8 int8, both of the shape of
        ``values``; nf4 uint8 [ceil(numel / 2)], element 2k in the low half of byte k. blocks, with
        ``B = ceil(numel / block_size)``: log8 int32 [B], ``lo | step >> 8`` with lo the bits of the smallest non-zero
        value, rounded down to a multiple of 2**16, and step the distance of the codes in units of the last place, a
        multiple of 2**8; int8 and nf4 float32 [B], the scale.
    Raises:
        TypeError: ``values`` is not a dense tensor of one of these types.
        ValueError: ``block_size`` or ``seed`` is not valid, ``stochastic`` with another format than log8, or a negative
            value for log8 (looking for one waits for the device).
        StateFormatError: ``format`` is none of the three; also a ValueError.
        BackendUnavailable: the backend that was asked for cannot run here.

    Source: block-wise quantisation: Dettmers et al. 2022, arXiv:2110.02861, section 2; nf4: Dettmers et al. 2023,
    arXiv:2305.14314, appendix E; log8: native/include/a8/format.h.

    Example:
        >>> codes, blocks = quantize_blockwise(torch.rand(1000), "log8")
        >>> values = dequantize_blockwise(codes, blocks, "log8")
    """
    fmt = _block_format(format)
    check_block_size("block_size", block_size)
    _check_tensor("values", values)
    if values.dtype not in DTYPES:
        raise TypeError(f"values must be {_known_dtypes()}, not {values.dtype}")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}")
    if stochastic and fmt.name != "log8":
        raise ValueError(
            f"stochastic: {fmt.name} is always rounded to nearest; only log8 can be rounded stochastically"
        )
    values = values.detach()
    codes, blocks = fmt.allocate(values.shape, block_size, values.device)
    assert blocks is not None  # every format of _block_format has headers
    if values.numel() == 0:
        return codes, blocks
    if fmt.name == "log8" and bool((values < 0).any()):
        raise ValueError(
            'values: log8 stores values >= 0 only, and there are negative ones; use format="int8" or "nf4"'
        )
    backend = backend_for(values.device, "codec")
    backend.quantize(plain(values), codes, blocks, fmt, block_size, bool(stochastic), seed)
    return codes, blocks


def dequantize_blockwise(
    codes: Tensor,
    blocks: Tensor,
    format: str,  # noqa: A002
    *,
    block_size: int = 128,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values that ``quantize_blockwise`` stored, rounded to nearest where ``dtype`` has 16 bits.

    Args:
        codes, blocks: as ``quantize_blockwise`` returns them.
        format, block_size: with which they were made.
        shape: of the result. By default the shape of ``codes``; for nf4 ``(2 * codes.numel(),)``, so give it when the
            array had an odd number of elements or was not one-dimensional.
        dtype: of the result: float32, bfloat16 or float16.
    Returns:
        A new contiguous tensor of that shape and dtype on the device of ``codes``.
    Raises:
        TypeError: ``codes`` or ``blocks`` is not a dense tensor, or ``dtype`` is not one of these types.
        ValueError: ``block_size`` is not valid.
        StateFormatError: ``format`` is none of the three, or shape, dtype or device of ``codes`` or ``blocks`` does not
            fit it; also a ValueError.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    fmt = _block_format(format)
    check_block_size("block_size", block_size)
    _check_tensor("codes", codes)
    _check_tensor("blocks", blocks)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be {_known_dtypes()}, not {dtype}")
    shape = _result_shape(fmt, codes, shape)
    _check_fits(fmt, codes, blocks, block_size, shape)
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    if values.numel():
        backend = backend_for(codes.device, "codec")
        backend.dequantize(codes.contiguous(), blocks.contiguous(), values, fmt, block_size)
    return values


def _known_dtypes() -> str:
    return " or ".join(str(dtype) for dtype in DTYPES)


def _block_format(name: str) -> StateFormat:
    fmt = FORMATS.get(name) if isinstance(name, str) else None
    if fmt is None or not fmt.quantized:
        known = ", ".join(entry.name for entry in FORMATS.values() if entry.quantized)
        raise StateFormatError(f"format must be one of {known}, not {name!r}")
    return fmt


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not one of layout {tensor.layout}; call to_dense() first")


def _result_shape(fmt: StateFormat, codes: Tensor, shape: tuple[int, ...] | None) -> torch.Size:
    if shape is None:
        return torch.Size((2 * codes.numel(),)) if fmt.packed else codes.shape
    if any(not isinstance(size, int) or size < 0 for size in shape):
        raise StateFormatError(f"shape must hold integers >= 0, not {tuple(shape)!r}")
    return torch.Size(shape)


def _check_fits(fmt: StateFormat, codes: Tensor, blocks: Tensor, block_size: int, shape: torch.Size) -> None:
    numel = shape.numel()
    stored = (numel + 1) // 2 if fmt.packed else numel
    if codes.dtype != fmt.dtype or codes.numel() != stored or (fmt.packed and codes.dim() != 1):
        wanted = f"[{stored}]" if fmt.packed else f"with {stored} elements"
        raise StateFormatError(
            f"codes: {fmt.name} of an array of shape {tuple(shape)} has {fmt.dtype} codes {wanted}, "
            f"not {codes.dtype} {list(codes.shape)}; is format or shape the one of the array?"
        )
    expected = fmt.blocks_shape(numel, block_size)
    if blocks.dtype != fmt.header or tuple(blocks.shape) != expected:
        raise StateFormatError(
            f"blocks: {fmt.name} of {numel} elements in blocks of {block_size} has {fmt.header} headers "
            f"{list(expected)}, not {blocks.dtype} {list(blocks.shape)}; is block_size the one of the array?"
        )
    if blocks.device != codes.device:
        raise StateFormatError(f"blocks: on {blocks.device}, but codes on {codes.device}; move them to one device")

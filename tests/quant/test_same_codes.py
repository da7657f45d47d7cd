"""The same bits on every backend and instruction set, on inputs made to tell them apart."""

import math

import pytest
import torch
from oracle.samples import positive, signed

import a8multi
from a8multi.functional import dequantize_blockwise, quantize_blockwise

CASES = [
    (fmt, block_size, stochastic)
    for fmt in ("log8", "int8", "nf4")
    for block_size in (32, 64, 128, 4096)
    for stochastic in (False, True)
    if fmt == "log8" or not stochastic
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beyond two chunks, with a partial block, an odd number of elements.
NUMEL = 2 * 16384 + 4096 + 77


def rough(fmt: str, dtype: torch.dtype) -> torch.Tensor:
    """Every magnitude there is: subnormals, blocks of zeros, of constants, of huge values, infinities and NaNs."""
    make = positive if fmt == "log8" else signed
    values = torch.cat(
        [make(NUMEL - 20480, seed=1, octaves=6.0), make(8192, seed=2, octaves=60.0), make(12288, seed=3)]
    )
    values[4096:8192] *= 2.0**-130
    values[8192:12288] = values[8192:12288].clamp(-2.0, 2.0) * 2.0**126
    values[12288:16384] *= 3e-37
    values[16384:16896] = 0.0
    values[16896:17408] = 0.1
    values = values.to(dtype)
    values[17500], values[17600] = math.nan, math.inf
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fmt", "block_size", "stochastic"), CASES)
def test_codes_headers_and_values(backend, fmt, block_size, stochastic, dtype):
    values = rough(fmt, dtype)
    options = {"block_size": block_size, "stochastic": stochastic, "seed": 0xFEDCBA9876543210}
    with a8multi.use_backend("torch"):
        codes, blocks = quantize_blockwise(values, fmt, **options)
        back = dequantize_blockwise(codes, blocks, fmt, block_size=block_size, shape=values.shape, dtype=dtype)
    got_codes, got_blocks = quantize_blockwise(values.to(backend.device), fmt, **options)
    got = dequantize_blockwise(got_codes, got_blocks, fmt, block_size=block_size, shape=values.shape, dtype=dtype)
    assert torch.equal(got_codes.cpu(), codes)
    assert_same_bits(got_blocks.cpu(), blocks)
    assert_same_bits(got.cpu(), back)
    backend.assert_ran()


@pytest.mark.parametrize("fmt", ["log8", "int8", "nf4"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(backend, fmt, threads):
    values = rough(fmt, torch.float32).to(backend.device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = quantize_blockwise(values, fmt, stochastic=fmt == "log8")
        torch.set_num_threads(threads)
        got = quantize_blockwise(values, fmt, stochastic=fmt == "log8")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, the sign of a zero included; one NaN is like another."""
    assert got.dtype == expected.dtype
    if got.dtype.is_floating_point:
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = got.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf)
    assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))

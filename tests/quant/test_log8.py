"""log8 on every backend, against the brute-force oracle."""

import math

import numpy as np
import pytest
import torch
from oracle import formats as oracle
from oracle.samples import blocks_of, positive

from a8multi.functional import dequantize_blockwise, quantize_blockwise

# At and around the edges of blocks (128) and chunks (16384).
SIZES = (1, 2, 31, 127, 128, 129, 255, 16383, 16384, 16385, 32769)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_nearest(values: torch.Tensor, block_size: int, device: str) -> None:
    codes, headers = quantize_blockwise(values.to(device), "log8", block_size=block_size)
    assert codes.shape == values.shape
    for block, code, header in zip(
        blocks_of(values, block_size), blocks_of(codes.cpu(), block_size), headers.tolist(), strict=True
    ):
        plain = block.float().numpy()
        assert oracle.log8_parts(header) == oracle.log8_header(plain)
        positions = oracle.log8_positions(plain)
        chosen = code.numpy().astype(np.float64)
        assert np.abs(chosen - positions).max() <= 0.5 + oracle.TIE
        assert ((chosen == 0) == (positions == 0)).all()


@pytest.mark.parametrize("numel", SIZES)
def test_every_code_is_the_nearest(backend, numel):
    check_nearest(positive(numel, seed=numel), 128, backend.device)
    backend.assert_ran()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(backend, block_size):
    check_nearest(positive(3 * block_size + 1, seed=block_size), block_size, backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_16_bits(backend, dtype):
    check_nearest(positive(1000, dtype=dtype, octaves=4.0), 128, backend.device)


def test_narrow_blocks_lose_nothing_that_the_least_step_holds(backend):
    # Multiples of the least step, 256, above a multiple of 2^16.
    values = (0x3F800000 + torch.arange(128, dtype=torch.int32) * 512).view(torch.float32)
    codes, headers = quantize_blockwise(values.to(backend.device), "log8")
    assert headers.tolist() == [0x3F800000 + 1]
    assert torch.equal(dequantize_blockwise(codes, headers, "log8").cpu(), values)


def test_zeros_constants_and_single_elements(backend):
    blocks = [torch.zeros(32), torch.full((32,), 0.37), torch.tensor([3.0])]
    values = torch.cat(blocks).to(backend.device)
    codes, headers = quantize_blockwise(values, "log8", block_size=32)
    assert oracle.log8_parts(headers.tolist()[0]) == (0, 256)
    assert codes[:32].eq(0).all()
    back = dequantize_blockwise(codes, headers, "log8", block_size=32)
    assert back[:32].eq(0).all()
    assert ((back - values).abs() <= values * 2.0**-15).all()


def test_what_counts_as_zero(backend):
    tiny = torch.tensor([-0.0, 0.0, 2.0**-127, 2.0**-149, 2.0**-126, 1.0], device=backend.device)
    codes, headers = quantize_blockwise(tiny, "log8")
    assert codes.tolist() == [0, 0, 0, 0, 1, 255]
    assert dequantize_blockwise(codes, headers, "log8").tolist()[:5] == [0, 0, 0, 0, 2.0**-126]


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["nan", "negative-nan"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_nan_stays_non_finite_and_in_its_block(backend, sign, stochastic):
    # The sign matters: x86 makes NaNs with the sign bit set, GPUs without.
    values = positive(96, octaves=2.0)
    values[40] = math.copysign(math.nan, sign)
    codes, headers = quantize_blockwise(values.to(backend.device), "log8", block_size=32, stochastic=stochastic)
    back = dequantize_blockwise(codes, headers, "log8", block_size=32).cpu()
    assert not back[40].isfinite()
    assert back[:32].isfinite().all()
    assert back[64:].isfinite().all()
    assert oracle.log8_parts(headers.tolist()[1]) == oracle.log8_header(values[32:64].numpy())


def test_infinity_stays_non_finite(backend):
    values = torch.tensor([1.0, math.inf, 2.0], device=backend.device)
    back = dequantize_blockwise(*quantize_blockwise(values, "log8"), "log8")
    assert back.isfinite().tolist() == [True, False, True]


def test_all_codes_decode_to_their_levels(backend):
    lo, step = 0x00810000, 8355840
    codes = torch.arange(256, dtype=torch.uint8, device=backend.device)
    headers = torch.tensor([oracle.log8_word(lo, step)], dtype=torch.int32, device=backend.device)
    back = dequantize_blockwise(codes, headers, "log8", block_size=256)
    assert back.tolist() == [oracle.log8_value(code, lo, step) for code in range(256)]


def test_relative_error(backend):
    values = positive(4096, octaves=3.0)
    codes, headers = quantize_blockwise(values.to(backend.device), "log8")
    back = dequantize_blockwise(codes, headers, "log8").cpu().double()
    bound = ((headers.cpu() & 0xFFFF) << 8).double().repeat_interleave(128) * 2.0**-23
    assert ((back - values.double()).abs() <= bound * values.double()).all()


@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_survive_a_round_trip(backend, stochastic):
    # Where the smallest and the largest value are on the grid the header is the same again, and so is every code.
    lo, step = 0x3F810000, 60 << 8
    levels = (lo + torch.arange(255, dtype=torch.int32) * step).view(torch.float32)
    picks = torch.randint(0, 255, (5000,), generator=torch.Generator().manual_seed(1))
    picks[0::128], picks[1::128] = 0, 254
    values = levels[picks[:4992]].to(backend.device)
    codes, headers = quantize_blockwise(values, "log8", stochastic=stochastic)
    assert headers.tolist() == [oracle.log8_word(lo, step)] * 39
    assert torch.equal(codes.cpu().long(), picks[:4992] + 1)
    assert torch.equal(dequantize_blockwise(codes, headers, "log8"), values)


def test_stochastic_codes_are_neighbours(backend):
    values = positive(16385, seed=3)
    codes, headers = quantize_blockwise(values.to(backend.device), "log8", stochastic=True, seed=5)
    for block, code, header in zip(blocks_of(values, 128), blocks_of(codes.cpu(), 128), headers.tolist(), strict=True):
        plain = block.numpy()
        assert oracle.log8_parts(header) == oracle.log8_header(plain)
        positions = oracle.log8_positions(plain)
        chosen = code.numpy().astype(np.float64)
        assert np.abs(chosen - positions).max() < 1.0 + oracle.TIE
        assert (chosen[positions == 0] == 0).all()
        assert (chosen[positions > 0] >= 1).all()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(backend, fraction):
    # Blocks of 1.0, two octaves above it, and 126 equal values inside an octave, `fraction` of a step above a code.
    count = 2048
    lo, step = oracle.log8_header(np.array([1.0, 4.0], np.float32))
    bits = lo + 60 * step + round(fraction * step)
    block = torch.full((128,), bits, dtype=torch.int32)
    block[0], block[1] = lo, lo + (2 << 23)
    values = block.repeat(count).view(torch.float32)
    codes, headers = quantize_blockwise(values.to(backend.device), "log8", stochastic=True, seed=11)
    assert int(headers[0]) == oracle.log8_word(lo, step)
    drawn = codes.view(count, 128)[:, 2:].double()
    exact = 1 + (bits - lo) / step
    # Five standard deviations of the mean of independent draws, and the 2^-17 of noise that has 16 bits.
    bound = 5 * math.sqrt(fraction * (1 - fraction) / drawn.numel()) + 2.0**-16
    assert abs(float(drawn.mean()) - exact) <= bound
    # Bits are linear inside an octave, so the mean of the values is right too, in units of a step of the value.
    back = dequantize_blockwise(codes, headers, "log8").view(count, 128)[:, 2:].double()
    value = float(values[2].double())
    step_of_value = value - float((block[2:3] - step).view(torch.float32).double())
    assert abs(float(back.mean()) - value) <= bound * step_of_value

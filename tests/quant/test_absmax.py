"""int8 and nf4 on every backend, against the brute-force oracle."""

import math

import numpy as np
import pytest
import torch
from oracle import formats as oracle
from oracle.samples import blocks_of, signed

from a8multi.functional import dequantize_blockwise, quantize_blockwise

SIZES = (1, 2, 31, 127, 128, 129, 255, 16383, 16384, 16385, 32769)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("int8", "nf4")


def unpacked(codes: torch.Tensor, fmt: str, numel: int) -> torch.Tensor:
    if fmt == "int8":
        return codes.cpu().reshape(-1)
    packed = codes.cpu()
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:numel]


def check_nearest(values: torch.Tensor, fmt: str, block_size: int, device: str) -> None:
    codes, scales = quantize_blockwise(values.to(device), fmt, block_size=block_size)
    flat = unpacked(codes, fmt, values.numel())
    for block, code, scale in zip(
        blocks_of(values, block_size), blocks_of(flat, block_size), scales.tolist(), strict=True
    ):
        plain = block.float().numpy()
        chosen = code.numpy().astype(np.int64)
        if fmt == "int8":
            assert scale == np.float32(oracle.absmax(plain) / 127)
            assert np.abs(chosen - oracle.int8_positions(plain)).max() <= 0.5 + oracle.TIE
        else:
            assert scale == oracle.absmax(plain)
            distances = oracle.nf4_distances(plain)
            excess = distances[np.arange(len(chosen)), chosen] - distances.min(axis=1)
            assert excess.max() <= 2.0**-20


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("numel", SIZES)
def test_every_code_is_the_nearest(backend, fmt, numel):
    check_nearest(signed(numel, seed=numel), fmt, 128, backend.device)
    backend.assert_ran()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size(backend, fmt, block_size):
    check_nearest(signed(3 * block_size + 1, seed=block_size), fmt, block_size, backend.device)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_16_bits(backend, fmt, dtype):
    check_nearest(signed(1000, dtype=dtype), fmt, 128, backend.device)


def test_ties_go_to_the_even_int8_code(backend):
    # The scale is exactly 1, so these are exact halves.
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], device=backend.device)
    codes, scales = quantize_blockwise(values, "int8")
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_all_int8_codes_decode(backend):
    codes = torch.arange(-127, 128, dtype=torch.int8, device=backend.device)
    scale = torch.tensor([0.0123], device=backend.device)
    back = dequantize_blockwise(codes, scale, "int8", block_size=256)
    assert back.tolist() == [float(np.float32(code * float(scale.cpu()))) for code in range(-127, 128)]


def test_all_nf4_codes_decode_to_the_quantiles(backend):
    low = torch.arange(16, dtype=torch.uint8)
    codes = (low | (15 - low) << 4).to(backend.device)
    back = dequantize_blockwise(codes, torch.ones(1, device=backend.device), "nf4").cpu().double().numpy()
    # The published levels are the quantiles to six digits.
    assert np.abs(back[0::2] - oracle.nf4_levels()).max() < 1e-6
    assert np.abs(back[1::2] - oracle.nf4_levels()[::-1]).max() < 1e-6


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_constants_and_single_elements(backend, fmt):
    values = torch.cat([torch.zeros(32), torch.full((32,), -0.37), torch.tensor([3.0])]).to(backend.device)
    codes, scales = quantize_blockwise(values, fmt, block_size=32)
    back = dequantize_blockwise(codes, scales, fmt, block_size=32, shape=(65,))
    assert scales[0] == 0
    assert back[:32].eq(0).all()
    assert torch.allclose(back, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_decodes_to_exactly_zero(backend, fmt):
    values = signed(1000)
    back = dequantize_blockwise(*quantize_blockwise(values.to(backend.device), fmt), fmt).cpu()
    assert (values == 0).sum() > 50
    assert back[values == 0].eq(0).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("largest", [9e-37, 1e-40, 2.0**-149])
def test_blocks_too_small_to_scale_become_zeros(backend, fmt, largest):
    values = torch.linspace(-largest, largest, 32, device=backend.device)
    codes, scales = quantize_blockwise(values, fmt, block_size=32)
    assert scales.tolist() == [0.0]
    assert dequantize_blockwise(codes, scales, fmt, block_size=32).eq(0).all()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
def test_a_non_finite_value_makes_its_block_nan_and_no_other(backend, fmt, wrong):
    values = signed(96)
    values[40] = wrong
    codes, scales = quantize_blockwise(values.to(backend.device), fmt, block_size=32)
    back = dequantize_blockwise(codes, scales, fmt, block_size=32).cpu()
    assert back[32:64].isnan().all()
    assert back[:32].isfinite().all()
    assert back[64:].isfinite().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_survive_a_round_trip(backend, fmt):
    values = signed(5000).to(backend.device)
    codes, scales = quantize_blockwise(values, fmt)
    again, new_scales = quantize_blockwise(dequantize_blockwise(codes, scales, fmt), fmt)
    assert torch.equal(again, codes)
    # 127 * (absmax / 127) may be one unit in the last place off.
    assert torch.allclose(new_scales, scales, rtol=2.0**-22, atol=0)


def test_odd_nf4_arrays_end_with_a_zero_code(backend):
    codes, _ = quantize_blockwise(torch.ones(33, device=backend.device), "nf4", block_size=32)
    assert codes.shape == (17,)
    assert codes.tolist() == [0xFF] * 16 + [0x7F]

"""Snapshots of the formats: checkpoints hold these bytes. A format never changes under its name; a different one gets a
new name (pitfall 8). The values were checked against the oracle when they were written down."""

import pytest
import torch
from torch import Tensor

from a8multi.functional import dequantize_blockwise, quantize_blockwise
from a8multi.quant.formats import FORMATS


def positive() -> Tensor:
    """Forty values over 22 octaves, two of them zeros, from integers alone: one whole block of 32 and a part."""
    number = torch.arange(1, 41)
    fraction = 0.5 + (number * 2654435761 % (1 << 32)).double() / 2**32
    values = torch.ldexp(fraction.float(), (number % 23).int() - 11)
    values[7], values[31] = 0.0, -0.0
    return values


def signed() -> Tensor:
    values = positive()
    values[2::3] *= -1
    return values


SNAPSHOTS = {
    "log8": (
        positive,
        {},
        "14182d34364d52006d70868c8fa6aabfc6c9dfe4f8ff01161d1f363b4f5659000109515e9db2baff",
        [968231790, 1055196095],
    ),
    "log8 stochastic": (
        positive,
        {"stochastic": True, "seed": 2024},
        "14182d33364d52006d70868c8fa6aabfc6c9dfe5f8ff02161d1f363b4f5759000109515d9eb2baff",
        [968231790, 1055196095],
    ),
    "int8": (
        signed,
        {},
        "0000000000000000000000000001ff0304fb1219aa7f00000000000000000000ff0104fb121ae17f",
        [1099791669, 1058902179],
    ),
    "nf4": (signed, {}, "77777777777777777799f17777777777777799f4", [1158439483, 1117541762]),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_codes_and_headers(backend, name):
    make, options, codes, headers = SNAPSHOTS[name]
    got, blocks = quantize_blockwise(make().to(backend.device), name.split()[0], block_size=32, **options)
    assert got.cpu().view(torch.uint8).numpy().tobytes().hex() == codes
    assert blocks.cpu().view(torch.int32).tolist() == headers


def test_log8_values(backend):
    codes = torch.tensor([0, 1, 2, 128, 255], dtype=torch.uint8, device=backend.device)
    headers = torch.tensor([0x39B70000 + 2925], dtype=torch.int32, device=backend.device)
    bits = dequantize_blockwise(codes, headers, "log8", block_size=32).view(torch.int32)
    assert bits.tolist() == [0, 968294400, 969043200, 1063392000, 1158489600]


def test_nf4_levels(backend):
    codes = torch.arange(16, dtype=torch.uint8, device=backend.device)
    back = dequantize_blockwise(codes, torch.ones(1, device=backend.device), "nf4", block_size=32)
    # The low half of each byte is the code, the high half -1.
    expected = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    assert back[0::2].tolist() == expected
    assert back[1::2].eq(-1.0).all()


def test_the_formats_are_these():
    described = {f.name: (int(f.code), f.dtype, f.packed, f.header, f.zero_byte) for f in FORMATS.values()}
    assert described == {
        "fp32": (1, torch.float32, False, None, 0),
        "bf16": (2, torch.bfloat16, False, None, 0),
        "int8": (3, torch.int8, False, torch.float32, 0),
        "nf4": (4, torch.uint8, True, torch.float32, 0x77),
        "log8": (5, torch.uint8, False, torch.int32, 0),
    }


@pytest.mark.parametrize("name", ["log8", "int8", "nf4"])
def test_fresh_state_is_zero(backend, name):
    shape = torch.Size((5, 67))
    codes, blocks = FORMATS[name].allocate(shape, 32, torch.device(backend.device))
    assert dequantize_blockwise(codes, blocks, name, block_size=32, shape=shape).eq(0).all()

"""quantize_blockwise and dequantize_blockwise: what they accept, return and refuse."""

import pytest
import torch
from oracle.samples import positive

import a8multi
from a8multi.errors import StateFormatError
from a8multi.functional import dequantize_blockwise, quantize_blockwise

FORMATS = ("log8", "int8", "nf4")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (2, 3, 4, 5), (1, 4097)], ids=str)
def test_shapes_and_dtypes(backend, fmt, shape):
    values = positive(torch.Size(shape).numel(), octaves=1.0).view(shape).to(backend.device)
    codes, blocks = quantize_blockwise(values, fmt, block_size=64)
    count = -(-values.numel() // 64)
    assert codes.dtype == (torch.int8 if fmt == "int8" else torch.uint8)
    assert codes.shape == ((-(-values.numel() // 2),) if fmt == "nf4" else shape)
    assert blocks.dtype == (torch.int32 if fmt == "log8" else torch.float32)
    assert blocks.shape == (count,)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        back = dequantize_blockwise(codes, blocks, fmt, block_size=64, shape=shape, dtype=dtype)
        assert back.shape == shape
        assert back.dtype == dtype
        assert back.device == values.device


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_are_the_rounded_float32_ones(backend, fmt, dtype):
    stored = quantize_blockwise(positive(1000, octaves=5.0).to(backend.device), fmt)
    exact = dequantize_blockwise(*stored, fmt)
    assert torch.equal(dequantize_blockwise(*stored, fmt, dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty_arrays(backend, fmt, shape):
    codes, blocks = quantize_blockwise(torch.empty(shape, device=backend.device), fmt)
    assert codes.numel() == 0
    assert blocks.numel() == 0
    assert dequantize_blockwise(codes, blocks, fmt, shape=shape).shape == shape


@pytest.mark.parametrize("fmt", FORMATS)
def test_strides_do_not_matter(backend, fmt):
    values = positive(6 * 5 * 4 * 3).view(6, 5, 4, 3).to(backend.device)
    expected = quantize_blockwise(values, fmt)
    for strided in (
        values.to(memory_format=torch.channels_last),
        values.transpose(0, 2).contiguous().transpose(0, 2),
        torch.stack((values, values), dim=-1)[..., 0],
    ):
        assert not strided.is_contiguous()
        got = quantize_blockwise(strided, fmt)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    if fmt != "nf4":
        codes = torch.stack((expected[0], expected[0]), dim=-1)[..., 0]
        assert torch.equal(dequantize_blockwise(codes, expected[1], fmt), dequantize_blockwise(*expected, fmt))


def test_an_array_that_does_not_start_at_the_storage(backend):
    storage = positive(300).to(backend.device)
    for offset in (1, 2, 3):
        expected = quantize_blockwise(storage[offset:].clone(), "log8")
        got = quantize_blockwise(storage[offset:], "log8")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_are_not_tracked(backend):
    values = positive(64).to(backend.device).requires_grad_()
    codes, blocks = quantize_blockwise(values, "int8")
    assert not blocks.requires_grad
    assert not dequantize_blockwise(codes, blocks, "int8").requires_grad


def test_values_are_not_changed(backend):
    values = positive(1000).to(backend.device)
    before = values.clone()
    quantize_blockwise(values, "log8", stochastic=True)
    assert torch.equal(values, before)


VALUES = torch.ones(64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([1.0],), {}, TypeError, "values must be a torch.Tensor"),
        ((VALUES.double(),), {}, TypeError, "values must be .*float32.*not torch.float64"),
        ((VALUES.to(torch.complex64),), {}, TypeError, "values must be .*complex64"),
        ((VALUES.to_sparse(),), {}, TypeError, "values must be a dense tensor"),
        ((VALUES, "log9"), {}, StateFormatError, "format must be one of int8, nf4, log8, not 'log9'"),
        ((VALUES, "fp32"), {}, StateFormatError, "format must be"),
        ((VALUES, None), {}, StateFormatError, "format must be"),
        ((VALUES,), {"block_size": 100}, ValueError, "block_size must be"),
        ((VALUES,), {"block_size": 16}, ValueError, "block_size must be"),
        ((VALUES,), {"block_size": 8192}, ValueError, "block_size must be"),
        ((VALUES,), {"block_size": 128.0}, ValueError, "block_size must be"),
        ((VALUES,), {"seed": -1}, ValueError, "seed must be"),
        ((VALUES,), {"seed": 1 << 64}, ValueError, "seed must be"),
        ((VALUES,), {"seed": 0.5}, ValueError, "seed must be"),
        ((VALUES, "int8"), {"stochastic": True}, ValueError, "stochastic: int8"),
        ((VALUES, "nf4"), {"stochastic": True}, ValueError, "stochastic: nf4"),
        ((-VALUES,), {}, ValueError, "values: log8 stores values >= 0"),
    ],
)
def test_quantize_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        quantize_blockwise(*arguments, **options)


CODES = torch.zeros(64, dtype=torch.int8)
BLOCKS = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([1], BLOCKS, "int8"), {}, TypeError, "codes must be a torch.Tensor"),
        ((CODES, 1.0, "int8"), {}, TypeError, "blocks must be a torch.Tensor"),
        ((CODES, BLOCKS, "int9"), {}, StateFormatError, "format must be"),
        ((CODES, BLOCKS, "int8"), {"dtype": torch.int32}, TypeError, "dtype must be"),
        ((CODES, BLOCKS, "int8"), {"block_size": 7}, ValueError, "block_size must be"),
        ((CODES, BLOCKS, "log8"), {}, StateFormatError, "codes: log8 .*torch.uint8"),
        ((CODES.to(torch.uint8), BLOCKS, "log8"), {}, StateFormatError, "blocks: log8"),
        ((CODES, BLOCKS.double(), "int8"), {}, StateFormatError, "blocks: int8"),
        ((CODES, torch.ones(2), "int8"), {}, StateFormatError, "blocks: int8 of 64 elements in blocks of 128"),
        ((CODES, BLOCKS, "int8"), {"block_size": 32}, StateFormatError, "blocks: int8"),
        ((CODES, BLOCKS, "int8"), {"shape": (65,)}, StateFormatError, "codes: int8 of an array of shape"),
        ((CODES, BLOCKS, "int8"), {"shape": (-64, -1)}, StateFormatError, "shape must hold"),
        ((CODES.to(torch.uint8), BLOCKS, "nf4"), {"shape": (126,)}, StateFormatError, "codes: nf4"),
        ((CODES.to(torch.uint8).view(8, 8), BLOCKS, "nf4"), {}, StateFormatError, "codes: nf4"),
    ],
)
def test_dequantize_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        dequantize_blockwise(*arguments, **options)


@pytest.mark.parametrize("fmt", ["int8", "nf4", "log8"])
def test_values_whose_memory_holds_their_negatives(backend, fmt):
    values = torch.rand(1000, device=backend.device)
    expected, found = (quantize_blockwise(one, fmt) for one in (values, torch._neg_view(-values)))
    assert all(map(torch.equal, expected, found))


def test_it_is_exported():
    assert a8multi.functional.quantize_blockwise is quantize_blockwise

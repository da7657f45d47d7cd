"""The torch backend beside the compiled CPU library: Adam to the bit, Adafactor up to the order of its sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import a8multi
from a8multi.backend import torch_formats as formats
from a8multi.backend import torch_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A partial block, an odd number of elements, one past a chunk, less than a block.
SHAPES = ((129, 131), (5000,), (16385,), (3, 7), (33,))


def tensors(scale: float, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        spread = torch.exp2(8 * torch.randn(shape, generator=generator))
        values = (torch.randn(shape, generator=generator) * spread * scale).clamp(-6e4, 6e4)
        made.append(values.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype))
    return made


def train(
    backend: str,
    kind: str,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    wrong: float | None = None,
    steps: int = 3,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Parameter and state tensors of every parameter after some steps."""
    params = [torch.nn.Parameter(values) for values in tensors(scale, param_dtype, 0)]
    optimizer = getattr(a8multi, kind)(params, lr=1e-2, **options)
    with a8multi.use_backend(backend):
        for step in range(steps):
            for param, gradient in zip(params, tensors(scale, grad_dtype or param_dtype, step + 1), strict=True):
                if gradient.dtype != param.dtype:
                    param.grad_dtype = None  # the gradient may have another type
                if wrong is not None and step == 1:
                    gradient.view(-1)[20] = wrong
                param.grad = gradient
            optimizer.step()
    states = [{k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)} for p in params]
    return [{"param": param.detach(), **state} for param, state in zip(params, states, strict=True)]


def assert_same_bits(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """The sign of a zero counts; one NaN is like another."""
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(comparable(ours[name]), comparable(theirs[name])), f"parameter {number}: {name}"


def comparable(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), 0.125)
    return tensor.contiguous().view(torch.uint8)


VARIANTS = {
    "adamw": {"kind": "AdamW8bit"},
    "adam-l2": {"kind": "Adam8bit", "weight_decay": 0.1, "maximize": True, "seed": (1 << 63) + 5},
    "nearest": {"kind": "AdamW8bit", "stochastic_rounding": False},
    "writeback": {"kind": "AdamW8bit", "stochastic_rounding_writeback": True, "seed": 9},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_adam_has_the_bits_of_the_library_for_every_dtype(variant, param_dtype, grad_dtype):
    options = {"param_dtype": param_dtype, "grad_dtype": grad_dtype, "min_quantized_numel": 0, **VARIANTS[variant]}
    assert_same_bits(train("torch", **options), train("cpu", **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("second", ["log8", "fp32"])
@pytest.mark.parametrize("first", ["int8", "nf4", "bf16", "fp32"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_adam_has_the_bits_of_the_library_for_every_format(variant, first, second, block_size):
    options = {"first_moment": first, "second_moment": second, "block_size": block_size, **VARIANTS[variant]}
    assert_same_bits(train("torch", **options), train("cpu", **options))


@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e-37, 1e-42, 1e30])
def test_adam_has_the_bits_of_the_library_near_the_ends_of_the_range(scale):
    # Subnormals are flushed, in parameters, gradients, moments and everything between.
    options = {"scale": scale, "min_quantized_numel": 0, **VARIANTS["adam-l2"]}
    assert_same_bits(train("torch", **options), train("cpu", **options))
    options["first_moment"] = options["second_moment"] = "fp32"
    assert_same_bits(train("torch", **options), train("cpu", **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_adam_has_the_bits_of_the_library_for_non_finite_gradients(variant, wrong):
    options = {"wrong": wrong, "param_dtype": torch.bfloat16, **VARIANTS[variant]}
    assert_same_bits(train("torch", **options), train("cpu", **options))


ADAFACTOR = {
    "factored": {},
    "full": {"factored": False},
    "nf4": {"beta1": 0.9},
    "int8": {"beta1": 0.9, "first_moment": "int8", "factored": False},
    "fp32": {"beta1": 0.9, "quantize": False, "weight_decay": 0.1},
    "plain": {"relative_step": False, "scale_parameter": False, "d": 0.0, "maximize": True},
}


@pytest.mark.parametrize("variant", ADAFACTOR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adafactor_agrees_with_the_library(variant, dtype):
    scale = 1e-6  # the step is as large as the largest parameters, and float16 must hold the result
    start = tensors(scale, dtype, 0)
    options = {"kind": "Adafactor8bit", "param_dtype": dtype, "scale": scale, "steps": 1, **ADAFACTOR[variant]}
    for before, ours, theirs in zip(start, train("torch", **options), train("cpu", **options), strict=True):
        assert theirs["param"].isfinite().all()
        step = (theirs["param"].float() - before.float()).abs()
        # Sums of n float32 numbers in two orders, then at most a unit in the last place of the parameter.
        allowed = step.max() * 1e-5 + theirs["param"].float().abs() * torch.finfo(dtype).eps
        assert ((ours["param"].float() - theirs["param"].float()).abs() <= allowed).all()
        assert step.max() > 0
        for name in ours.keys() - {"param"}:
            if ours[name].is_floating_point():
                assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-5, atol=0), name
            elif name.endswith("_block"):
                assert torch.equal(ours[name], theirs[name]), name
            else:
                assert (ours[name] == theirs[name]).float().mean() > 0.999, name


@pytest.mark.parametrize("kind", ["AdamW8bit", "Adafactor8bit"])
def test_slices_do_not_matter(kind, monkeypatch):
    options = {"kind": kind, "param_dtype": torch.bfloat16, "stochastic_rounding_writeback": True}
    # Without clipping Adafactor's only sums across slices are the means of the columns.
    options |= {"beta1": 0.9, "d": 0.0, "scale_parameter": False, "factored": False} if kind == "Adafactor8bit" else {}
    expected = train("torch", **options)
    monkeypatch.setattr(torch_step, "SLICE", 4096)
    assert_same_bits(train("torch", **options), expected)


def test_factored_slices_that_cut_rows(monkeypatch):
    start = tensors(1.0, torch.float32, 0)
    expected = train("torch", "Adafactor8bit", steps=1)
    monkeypatch.setattr(torch_step, "SLICE", 4096)
    for before, ours, theirs in zip(start, train("torch", "Adafactor8bit", steps=1), expected, strict=True):
        step = float((theirs["param"] - before).abs().max())
        assert torch.allclose(ours["param"], theirs["param"], rtol=1e-6, atol=1e-5 * step)


# Both halves of the 16-bit types' ranges, their subnormals and the numbers that overflow them.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.001, -3.0017, 3e-6, -7.3e-8, 65519.0, -70000.0, 3.39e38, 0.0])
def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_probability(dtype, value):
    count = 1 << 16
    x = torch.full((count,), value)
    target = torch.empty(count, dtype=dtype)
    formats.store(x, target, 0, formats.noise_key(3, 1, 0))
    lower, upper = neighbours(float(x[0].double()), dtype)
    drawn = target.double().abs()
    assert ((drawn == lower) | (drawn == upper)).all()
    assert (torch.signbit(target) == torch.signbit(x)).all()
    if math.isfinite(upper) and upper > lower:
        p = (abs(float(x[0].double())) - lower) / (upper - lower)
        up = float((drawn == upper).double().mean())
        assert abs(up - p) <= 5 * math.sqrt(p * (1 - p) / count) + 2.0**-12


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The magnitudes of ``dtype`` around that of ``value``, by the type's definition; infinity past the largest."""
    info = torch.finfo(dtype)
    magnitude = abs(value)
    if magnitude >= info.max:
        return (math.inf, math.inf) if magnitude >= info.max * (1 + info.eps / (2 - info.eps)) else (info.max, math.inf)
    exponent = math.floor(math.log2(max(magnitude, info.tiny)))
    unit = 2.0**exponent * info.eps
    lower = math.floor(magnitude / unit) * unit
    return lower, lower if lower == magnitude else lower + unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_keeps_nan_and_infinity(dtype):
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf]).repeat(1000)
    target = torch.empty(4000, dtype=dtype)
    formats.store(x, target, 0, formats.noise_key(3, 1, 0))
    assert target.view(-1, 4)[:, :2].isnan().all()
    assert target.view(-1, 4)[:, 2].eq(math.inf).all()
    assert target.view(-1, 4)[:, 3].eq(-math.inf).all()


def test_roots_are_correctly_rounded():
    # Every mantissa, with an even and an odd exponent: torch's own float32 root is not (MKL).
    for exponent in (126, 127):
        x = (torch.arange(0, 1 << 23, 37, dtype=torch.int32) | exponent << 23).view(torch.float32)
        root = formats.sqrt(x).double()
        half_unit = torch.exp2(torch.floor(torch.log2(root))) * 2.0**-24
        # The exact root lies within half a unit: (r - h)^2 <= x <= (r + h)^2, and float64 holds such squares.
        assert ((root - half_unit).square() <= x.double() * (1 + 1e-15)).all()
        assert ((root + half_unit).square() >= x.double() * (1 - 1e-15)).all()

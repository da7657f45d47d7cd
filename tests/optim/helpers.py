"""What the optimizer tests share: parameters, gradients, steps, and decoders of the state that are the tests' own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# At and just past the edges of a vector, a block, the least quantised size and a chunk; every kind of shape.
SMALL_SHAPES = ((), (0,), (1,), (31,), (32,), (33,), (127,), (128,), (129,), (1, 70), (70, 1), (3, 5, 7), (8, 4, 3, 3))
EDGE_SHAPES = (*SMALL_SHAPES, (4095,), (4096,), (4097,), (16383,), (16384,), (16385,), (65, 300))
# One row and one column past a tile of 512 x 1024.
TILE_SHAPE = (513, 1025)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Distance from 1 to the next number.
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
_LEAST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def normal(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale


def gradient(shape: Sequence[int], seed: int, scale: float = 1e-2) -> Tensor:
    """Heavy-tailed, so that the elements of a block differ by orders of magnitude."""
    return normal(shape, seed) * normal(shape, seed + 7919).exp() * scale


def parameters(
    shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0
) -> list[Parameter]:
    return [Parameter(normal(s, seed + 31 * i, 0.1).to(device, dtype)) for i, s in enumerate(shapes)]


def gradients(
    params: Sequence[Tensor], step: int, dtype: torch.dtype | None = None, seed: int = 1, scale: float = 1e-2
) -> list[Tensor]:
    """The gradients of one step; the same for the same arguments on every device."""
    made = [gradient(p.shape, seed + 1009 * step + 31 * i, scale) for i, p in enumerate(params)]
    return [g.to(p.device, dtype or p.dtype) for g, p in zip(made, params, strict=True)]


def apply(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


def run(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    steps: Iterable[int],
    dtype: torch.dtype | None = None,
    scale: float = 1e-2,
) -> None:
    for step in steps:
        apply(optimizer, params, gradients(params, step, dtype, scale=scale))


def raw(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def snapshot(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Parameters and state of each, tensors as their dtype, shape and bytes: what 'the same bits' compares."""
    result = []
    for param in params:
        held = {"param": param, **optimizer.state.get(param, {})}
        result.append({k: (v.dtype, tuple(v.shape), raw(v)) if isinstance(v, Tensor) else v for k, v in held.items()})
    return result


def counted(optimizer: Any, params: Any) -> list[dict[str, Any]]:
    """The snapshot, with the steps of both kinds as integers."""
    found = snapshot(optimizer, params)
    for held, param in zip(found, params, strict=True):
        if "step" in held:
            held["step"] = int(optimizer.state[param]["step"])
    return found


def differences(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[str]:
    """Where two snapshots differ, in words; empty when they are the same bits."""
    found = [] if len(a) == len(b) else [f"{len(a)} against {len(b)} parameters"]
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        found += [f"parameter {i}: {name}" for name in sorted({*x, *y}) if x.get(name) != y.get(name)]
    return found


# --- Decoders of the state, from the description of the formats. ---

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Half of the widest gap, between -1 and -0.696.
NF4_HALF_GAP = (1 - 0.6961928009986877) / 2


def spread(headers: Tensor, numel: int, block_size: int) -> Tensor:
    """A number a block as a number an element."""
    return headers.repeat_interleave(block_size)[:numel]


def decoded(state: dict[str, Any], name: str, shape: Sequence[int], block_size: int) -> Tensor:
    """A moment as float64 of the parameter's shape, on the CPU."""
    codes = state[name].cpu()
    if f"{name}_block" not in state:
        return codes.double().reshape(tuple(shape))
    headers = state[f"{name}_block"].cpu()
    numel = math.prod(shape)
    if headers.dtype == torch.int32:  # log8: the code times the step, added to the bits of the smallest
        word = spread(headers.long(), numel, block_size)
        lo, step = word & ~0xFFFF, (word & 0xFFFF) << 8
        code = codes.reshape(-1).long()
        bits = torch.where(code == 0, 0, lo + (code - 1) * step).to(torch.int32)
        values = bits.view(torch.float32).double()
    elif codes.dtype == torch.int8:
        values = codes.reshape(-1).double() * spread(headers.double(), numel, block_size)
    else:
        pair = torch.stack((codes & 15, codes >> 4), dim=1).reshape(-1)[:numel].long()
        values = torch.tensor(NF4, dtype=torch.float64)[pair] * spread(headers.double(), numel, block_size)
    return values.reshape(tuple(shape))


def code_spacing(state: dict[str, Any], name: str, value: Tensor, block_size: int) -> Tensor:
    """How far storing ``value`` (float64, what should be stored) to nearest may move each element. Half a code."""
    numel = value.numel()
    codes = state[name]
    if f"{name}_block" not in state:
        return value.abs() * (EPSILON[codes.dtype] / 2)
    headers = state[f"{name}_block"].cpu()
    if headers.dtype == torch.int32:
        # One code is `step` units of the last place, and a unit is worth 2^-23 of the power of two below the value.
        steps = spread(((headers & 0xFFFF) << 8).double(), numel, block_size).reshape(value.shape)
        return steps / 2 * 2.0**-23 * value.abs()
    if codes.dtype == torch.int8:
        return spread(headers.double(), numel, block_size).reshape(value.shape) / 2
    return spread(headers.double(), numel, block_size).reshape(value.shape) * NF4_HALF_GAP


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between the numbers of ``dtype`` around a float64 value."""
    _, exponent = torch.frexp(value.abs())
    return torch.ldexp(torch.full_like(value, EPSILON[dtype] / 2), exponent).clamp(min=_LEAST[dtype])


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """|actual - expected| <= bound, element by element, in float64."""
    actual, expected = actual.detach().cpu().double(), expected.cpu().double()
    assert actual.shape == expected.shape, what
    if not actual.numel():
        return
    excess = (actual - expected).abs() - bound
    assert not excess.isnan().any(), f"{what}: not a number"
    worst = int(excess.reshape(-1).argmax())
    assert float(excess.reshape(-1)[worst]) <= 0, (
        f"{what}: element {worst} is {float(actual.reshape(-1)[worst])!r}, "
        f"expected {float(expected.reshape(-1)[worst])!r} +- "
        f"{float(torch.as_tensor(bound).expand(actual.shape).reshape(-1)[worst])!r}"
    )


Make = Callable[..., torch.optim.Optimizer]

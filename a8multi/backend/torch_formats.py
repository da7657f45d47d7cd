"""float32 arithmetic, noise and storage formats in plain torch operations, for the torch backend.

The readable twin of native/include/a8/math.h and format.h: the same operations in the same order, each rounded once
and with subnormals flushed, so that the codes are the libraries' own. Receives and returns flat tensors on any device;
never reads a value back to the host.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from a8multi.quant.formats import StateFormat, block_count

# --- Arithmetic. Nothing here may fuse two operations into one rounding (no lerp, addcmul, addcdiv). ---

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def flush_(x: Tensor) -> Tensor:
    """Turns subnormals into zeros of their sign, in place; NaN and infinity stay."""
    return x.mul_(x.abs().ge_(SMALLEST_NORMAL))


def mul(a: Tensor, b: Tensor | float) -> Tensor:
    return flush_(torch.mul(a, b))


def add(a: Tensor, b: Tensor | float) -> Tensor:
    return flush_(torch.add(a, b))


def sub(a: Tensor, b: Tensor) -> Tensor:
    return flush_(torch.sub(a, b))


def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b. Both are tensors on purpose: with a number torch may multiply by its reciprocal, which rounds twice."""
    return flush_(torch.div(a, b))


def sqrt(x: Tensor) -> Tensor:
    # torch's CPU builds call MKL, whose float32 root is one unit off in a fifth of the cases (measured, torch 2.13). A
    # float64 root has enough bits that rounding it again gives the correctly rounded one. CUDA's is correctly rounded.
    return x.double().sqrt_().to(torch.float32) if x.device.type == "cpu" else x.sqrt()


def constant(value: float, like: Tensor) -> Tensor:
    """A 0-d float32 tensor on the device of ``like``."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def load(values: Tensor, start: int, stop: int) -> Tensor:
    """Elements start to stop of the flattened tensor as float32, in a new tensor."""
    x = values.view(-1)[start:stop].to(torch.float32, copy=True)
    return flush_(x)


# --- Noise: math.h's counter hash and phases, on 32-bit words held in int64. ---

STREAM_SECOND, STREAM_WRITE = 1, 2
_WORD = 0xFFFFFFFF
_PHASE_STRIDE = 0x3504F3


class Noise(NamedTuple):
    """``a8_noise``: the key of one parameter's write-back noise at one step."""

    first: int
    second: int


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _WORD
    x ^= x >> 15
    x = x * 0x846CA68B & _WORD
    return x ^ x >> 16


def _key(seed: int, step: int, noise_id: int, stream: int) -> int:
    key = _mix((seed & _WORD) + 0x9E3779B9 & _WORD)
    for part in (seed >> 32, step, noise_id, stream):
        key = _mix(key ^ part)
    return key


def noise_key(seed: int, step: int, noise_id: int) -> Noise:
    """``a8_noise_key`` of a 64-bit seed."""
    key = _key(seed, step, noise_id, STREAM_WRITE)
    return Noise(key, _mix(key ^ 0x85EBCA6B))


def phase_key(seed: int, step: int, noise_id: int) -> int:
    """``a8_phase_key`` of a 64-bit seed."""
    return _key(seed, 0, noise_id, STREAM_SECOND) + step * 0x4F1BBD & _WORD


def noise_halves(key: Noise, start: int, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of ``count`` elements from number ``start`` (even) on: int32 [count].

    The range must not cross a multiple of 2^33 elements, where the high half of the pair's number changes.
    """
    pair = start // 2
    second = key.second + (pair >> 32) * 0x9E3779B9 & _WORD
    x = torch.arange((count + 1) // 2, dtype=torch.int64, device=device).add_(key.first + pair & _WORD)
    x.bitwise_and_(_WORD)
    x ^= x >> 16
    # Products may exceed 63 bits: they wrap, and the low 32 bits are right.
    x.mul_(0x7FEB352D).bitwise_and_(_WORD)
    x ^= x >> 15
    x ^= second
    x.mul_(0x846CA68B).bitwise_and_(_WORD)
    x ^= x >> 16
    return torch.stack(((x & 0xFFFF).to(torch.int32), (x >> 16).to(torch.int32)), dim=-1).view(-1)[:count]


def random_integers(seed: int, interval: int, noise_id: int, count: int, device: torch.device) -> Tensor:
    """``a8_draw_pair``: nearly normal integers from -8 to 8, of variance 4, int32 [count].

    Each is the number of ones in 16 random bits, less 8.
    """
    halves = noise_halves(noise_key(seed, interval, noise_id), 0, count, device)
    halves = halves - (halves >> 1 & 0x5555)
    halves = (halves & 0x3333) + (halves >> 2 & 0x3333)
    halves = halves + (halves >> 4) & 0x0F0F
    return (halves + (halves >> 8) & 0x1F) - 8


def offsets(phase: int, start: int, count: int, device: torch.device) -> Tensor:
    """``a8_offset`` of ``count`` elements from number ``start`` on: numbers in [1, 2), float32 [count]."""
    elements = torch.arange(count, dtype=torch.int64, device=device)
    phases = elements.mul_(_PHASE_STRIDE).add_(phase + start * _PHASE_STRIDE & 0x7FFFFF).bitwise_and_(0x7FFFFF)
    return phases.to(torch.int32).bitwise_or_(0x3F800000).view(torch.float32)


# --- 16-bit floats. To nearest, torch's own conversion is the libraries'. ---


def stochastic_bf16(x: Tensor, halves: Tensor) -> Tensor:
    """x rounded up in magnitude with the probability of the dropped fraction: float32 values that bfloat16 holds."""
    rounded = (x.view(torch.int32) + halves).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def stochastic_f16(x: Tensor, halves: Tensor) -> Tensor:
    """As ``stochastic_bf16`` for float16, its subnormals included."""
    magnitude = x.abs()
    normal = (magnitude.view(torch.int32) + (halves & 0x1FFF)).bitwise_and_(-0x2000).view(torch.float32)
    # Below 2^-14 float16 is a fixed-point number of 2^-24.
    is_small = magnitude < 2.0**-14
    units = torch.where(is_small, magnitude, 0.0).mul_(2.0**24).add_(halves.to(torch.float32).mul_(2.0**-16))
    rounded = torch.where(is_small, units.trunc_().mul_(2.0**-24), normal)
    return torch.where(x.isfinite(), torch.copysign(rounded, x), x)


def write(x: Tensor, target: Tensor, skip: Tensor | None) -> None:
    """Copies x, in the target's type; where the bool 0-d ``skip`` is true the target stays, without a look at it."""
    target.copy_(x if skip is None else torch.where(skip, target, x.to(target.dtype)))


def store(x: Tensor, target: Tensor, start: int, noise: Noise | None = None, skip: Tensor | None = None) -> None:
    """``write``, over elements ``start`` on of ``target``; rounds stochastically when given noise."""
    if noise is not None and target.dtype != torch.float32:
        halves = noise_halves(noise, start, x.numel(), x.device)
        x = stochastic_bf16(x, halves) if target.dtype == torch.bfloat16 else stochastic_f16(x, halves)
    write(x, target.view(-1)[start : start + x.numel()], skip)


# --- log8. ---

_LOG8_SMALLEST, _LOG8_INFINITY = 0x00800000, 0x7F800000
_LOG8_KEEP, _LOG8_ROOM = 3, 6


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[n] as [blocks, block_size], a partial last block padded with zeros, which no header notices."""
    missing = -x.numel() % block_size
    return (F.pad(x, (0, missing)) if missing else x).view(-1, block_size)


def _unpacked(words: Tensor) -> tuple[Tensor, Tensor]:
    """``a8_log8_unpack``: lo and step."""
    return words & ~0xFFFF, (words & 0xFFFF) << 8


def _log8_tight(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    low = low & ~0xFFFF
    units = (high - low + (254 * 256 - 1)).div_(254 * 256, rounding_mode="floor").clamp_(min=1)
    return low, units << 8


def _log8_header(low: Tensor, high: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """``a8_log8_header_of``: lo and step of each block; before: the headers that the blocks have, int32 [blocks]."""
    tight_low, tight_step = _log8_tight(low, high)
    if before is None:
        return tight_low, tight_step
    old_low, old_step = _unpacked(before)
    fits = (low >= old_low) & (high <= old_low + 254 * old_step) & (old_step - tight_step <= old_step >> _LOG8_KEEP)
    room = (high - low) >> _LOG8_ROOM
    roomy = (low - room >= _LOG8_SMALLEST) & (high < _LOG8_INFINITY - room)
    room = torch.where(roomy & (low != 0) & (old_low != 0), room, 0)
    new_low, new_step = _log8_tight(low - room, high + room)
    keep = fits & (low != 0) & (old_low != 0)
    return torch.where(keep, old_low, new_low), torch.where(keep, old_step, new_step)


def encode_log8(
    x: Tensor, block_size: int, offsets: Tensor | None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32).clamp(0, _LOG8_INFINITY).masked_fill_(x.isnan(), _LOG8_INFINITY)
    bits = _in_blocks(bits.mul_(bits >= _LOG8_SMALLEST), block_size)
    high = bits.amax(1)
    # Where a block has nothing but zeros its smallest value stays at the filling.
    low = bits.masked_fill(bits == 0, _LOG8_INFINITY + 1).amin(1)
    low.masked_fill_(low > _LOG8_INFINITY, 0)
    low, step = _log8_header(low, high, before)
    origin = low.masked_fill(low == 0, 0x40000000)
    inverse = div(constant(1.0, x), step.to(torch.float32))
    position = (bits - origin[:, None]).to(torch.float32).mul_(inverse[:, None])
    # 1 + a fraction: 1.5 rounds to nearest; noise is spread over [1, 2).
    position.add_(1.5 if offsets is None else _in_blocks(offsets, block_size))
    codes = position.to(torch.int32).clamp_(0, 255).to(torch.uint8)
    return codes.view(-1)[: x.numel()], low | step >> 8


def decode_log8(codes: Tensor, blocks: Tensor, block_size: int, count: int) -> Tensor:
    code = _in_blocks(codes, block_size).to(torch.int32)
    low, step = (part[:, None] for part in _unpacked(blocks))
    bits = code * step
    bits.add_(low - step).masked_fill_(code == 0, 0)
    return bits.view(torch.float32).view(-1)[:count]


# --- int8 and nf4, scaled by the block's largest magnitude. ---

_ABSMAX_SMALLEST = 1e-36
_INT8_LEVELS = 127.0
# QLoRA (Dettmers et al. 2023), appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_ZERO = 7


@cache
def _nf4_levels(device: torch.device) -> Tensor:
    """Kept for each device: the copy to a GPU waits for it."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def _absmax(x: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [blocks, block_size]: the factor to code units, the header, and which blocks are not finite, [blocks]."""
    # On the bits, where a NaN is larger than infinity: every device's maximum then agrees about it.
    bits = x.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(1)
    broken = bits >= _LOG8_INFINITY
    absmax = bits.view(torch.float32)
    small = absmax < _ABSMAX_SMALLEST
    inverse = div(constant(levels, x), absmax).masked_fill_(small, 0.0)
    scale = div(absmax, constant(levels, x)).masked_fill_(small, 0.0).masked_fill_(broken, torch.nan)
    return inverse, scale, broken


def encode_int8(x: Tensor, block_size: int, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    values = _in_blocks(x, block_size)
    inverse, scale, broken = _absmax(values, _INT8_LEVELS)
    codes = (values * inverse[:, None]).masked_fill_(broken[:, None], 0.0)
    if offsets is not None:
        codes.add_(_in_blocks(offsets - 1.5, block_size)).clamp_(-_INT8_LEVELS, _INT8_LEVELS)
        codes.masked_fill_(broken[:, None], 0.0)
    codes = codes.round_().to(torch.int8)
    return codes.view(-1)[: x.numel()], scale


def decode_int8(codes: Tensor, scale: Tensor, block_size: int, count: int) -> Tensor:
    values = _in_blocks(codes, block_size).to(torch.float32)
    return mul(values, scale[:, None]).view(-1)[:count]


def encode_nf4(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    values = _in_blocks(x, block_size)
    inverse, scale, broken = _absmax(values, 1.0)
    levels = _nf4_levels(x.device)
    middles = (levels[:-1] + levels[1:]) * 0.5
    codes = torch.bucketize(values * inverse[:, None], middles, out_int32=True)
    codes.masked_fill_(broken[:, None], _NF4_ZERO)
    even, odd = codes.view(-1, 2).unbind(1)
    return (even | odd << 4).to(torch.uint8)[: (x.numel() + 1) // 2], scale


def decode_nf4(codes: Tensor, scale: Tensor, block_size: int, count: int) -> Tensor:
    packed = _in_blocks(codes, block_size // 2).to(torch.int32)
    index = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, block_size)
    return mul(_nf4_levels(codes.device)[index], scale[:, None]).view(-1)[:count]


# --- Any format, elements [start, start + n) of a tensor; start lies on a block's edge. ---


def _headers(blocks: Tensor, block_size: int, start: int, count: int) -> Tensor:
    return blocks[start // block_size : start // block_size + block_count(count, block_size)]


def _codes(codes: Tensor, fmt: StateFormat, start: int, count: int) -> Tensor:
    if fmt.packed:
        return codes.view(-1)[start // 2 : start // 2 + (count + 1) // 2]
    return codes.view(-1)[start : start + count]


def encode(
    fmt: StateFormat,
    x: Tensor,
    codes: Tensor,
    blocks: Tensor | None,
    block_size: int,
    start: int,
    phase: int | None,
    keep_grid: bool = False,
    skip: Tensor | None = None,
) -> None:
    """Writes float32 [n] into the codes and headers from element ``start`` on.

    phase: of the tensor's first element, for log8 and int8; None: to nearest. keep_grid: log8 headers stay while they
    fit. skip: as in ``write``.
    """
    if blocks is None:
        store(x, codes, start, skip=skip)
        return
    wanted = phase if fmt.name != "nf4" else None
    drawn = None if wanted is None else offsets(wanted, start, x.numel(), x.device)
    if fmt.name == "log8":
        before = _headers(blocks, block_size, start, x.numel()) if keep_grid else None
        new_codes, new_blocks = encode_log8(x, block_size, drawn, before)
    elif fmt.name == "int8":
        new_codes, new_blocks = encode_int8(x, block_size, drawn)
    else:
        new_codes, new_blocks = encode_nf4(x, block_size)
    write(new_codes, _codes(codes, fmt, start, x.numel()), skip)
    write(new_blocks, _headers(blocks, block_size, start, x.numel()), skip)


def decode(fmt: StateFormat, codes: Tensor, blocks: Tensor | None, block_size: int, start: int, stop: int) -> Tensor:
    """Elements start to stop as a new float32 tensor [stop - start]."""
    if blocks is None:
        return load(codes, start, stop)
    count = stop - start
    decoder = {"log8": decode_log8, "int8": decode_int8, "nf4": decode_nf4}[fmt.name]
    return decoder(_codes(codes, fmt, start, count), _headers(blocks, block_size, start, count), block_size, count)

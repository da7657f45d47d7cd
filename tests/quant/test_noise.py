"""The noise of stochastic rounding: what decides it, and that no two elements share it (pitfall 14)."""

import math

import pytest
import torch

from a8multi.backend.torch_formats import STREAM_SECOND, STREAM_WRITE, Noise, noise_halves, noise_key, noise_offsets
from a8multi.functional import quantize_blockwise

CHUNK = 16384
WORD = 0xFFFFFFFF


def draws(numel: int, device: str, seed: int = 0) -> torch.Tensor:
    """Whether each element was rounded up: a fair coin, halfway between two codes, but for the ends of a block."""
    lo, step = 0x3F800000, (2 << 23) // (254 * 256) * 256 + 256
    block = torch.full((128,), lo + 60 * step + step // 2, dtype=torch.int32)
    block[0], block[1] = lo, lo + (2 << 23)
    values = block.repeat(-(-numel // 128))[:numel].view(torch.float32)
    codes, _ = quantize_blockwise(values.to(device), "log8", stochastic=True, seed=seed)
    return (codes.cpu() == 62).double()


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Standard deviations by which two sequences of fair coins agree more, or less, often than by chance."""
    keep = torch.arange(a.numel()) % 128 >= 66  # leaves the ends of blocks out at every lag below
    same = (a == b)[keep].double()
    return abs(float(same.mean()) - 0.5) / (0.5 / math.sqrt(same.numel()))


def test_the_same_call_gives_the_same_codes(backend):
    assert torch.equal(draws(1000, backend.device, 7), draws(1000, backend.device, 7))


@pytest.mark.parametrize("seeds", [(0, 1), (1, 1 + (1 << 32)), (5, (1 << 64) - 1)], ids=str)
def test_every_bit_of_the_seed_counts(backend, seeds):
    first, second = (draws(4 * CHUNK, backend.device, seed) for seed in seeds)
    assert agreement(first, second) < 5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, CHUNK // 2, CHUNK, 2 * CHUNK])
def test_elements_do_not_share_noise(backend, lag):
    coins = draws(8 * CHUNK, backend.device)
    assert agreement(coins[lag:], coins[:-lag]) < 5


def test_a_longer_array_starts_with_the_same_noise(backend):
    assert torch.equal(draws(3 * CHUNK + 5, backend.device)[: CHUNK + 1], draws(CHUNK + 1, backend.device))


def mixed(x: int) -> int:
    """The finaliser lowbias32 on Python integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & WORD
    return x ^ x >> 16


def half_of(key: Noise, element: int) -> int:
    """The noise of one element, from the definition in math.h."""
    pair = element // 2
    x = key.first + pair & WORD
    x = (x ^ x >> 16) * 0x7FEB352D & WORD
    x = (x ^ x >> 15) ^ (key.second + (pair >> 32) * 0x9E3779B9 & WORD)
    x = x * 0x846CA68B & WORD
    x ^= x >> 16
    return x >> 16 if element % 2 else x & 0xFFFF


@pytest.mark.parametrize("start", [0, 2, CHUNK, (1 << 31) - 2, (1 << 32), (1 << 33) - 8, 1 << 33, 3 << 33])
def test_torch_noise_follows_the_definition(start):
    key = noise_key((1 << 63) + 12345, 1000, 3, STREAM_WRITE)
    got = noise_halves(key, start, 7, torch.device("cpu")).tolist()
    assert got == [half_of(key, start + k) for k in range(7)]


def test_torch_key_follows_the_definition():
    # Only the noise of write-back is drawn anew at every step.
    for stream, step in ((STREAM_SECOND, 0), (STREAM_WRITE, 17)):
        key = mixed(0xFFFFFFFE + 0x9E3779B9 & WORD)
        for part in (0x12345678, step, 4, stream):
            key = mixed(key ^ part)
        turn = 17 * 0x4F1BBD + 0x40 & WORD
        assert noise_key(0x12345678_FFFFFFFE, 17, 4, stream) == (key, mixed(key ^ 0x85EBCA6B), turn)


def offsets_at(step):
    """The offsets of a thousand elements at one step, in [1, 2)."""
    return noise_offsets(noise_key(5, step, 1, STREAM_SECOND), 0, 1000, torch.device("cpu")).double()


def test_the_noise_of_an_element_is_spread_evenly_over_time():
    # Of 89 steps (a Fibonacci number) every eighth of [1, 2) gets its share but for less than two; chance would be off
    # by more than five for one of a thousand elements.
    steps = torch.stack([offsets_at(step) for step in range(1000, 1089)])
    for part in range(8):
        inside = ((steps >= 1 + part / 8) & (steps < 1 + (part + 1) / 8)).sum(0)
        assert float((inside - 89 / 8).abs().max()) < 2


def test_the_noise_turns_by_the_golden_ratio():
    turned = (offsets_at(8) - offsets_at(7)) % 1.0
    assert torch.allclose(turned, torch.full_like(turned, (math.sqrt(5) - 1) / 2), rtol=0, atol=2**-22)


def test_noise_is_uniform():
    halves = noise_halves(noise_key(1, 2, 3, STREAM_SECOND), 0, 1 << 18, torch.device("cpu"))
    counts = torch.bincount(halves >> 8, minlength=256).double()
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6

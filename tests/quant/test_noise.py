"""The noise of stochastic rounding: what decides it, and that no two elements share it (pitfall 14)."""

import math

import pytest
import torch

from a8multi.backend.torch_formats import Noise, noise_halves, noise_key, offsets, phase_key
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


def test_the_same_call_gives_the_same_codes(backend):
    assert torch.equal(draws(1000, backend.device, 7), draws(1000, backend.device, 7))


@pytest.mark.parametrize("seeds", [(0, 1), (1, 1 + (1 << 32)), (5, (1 << 64) - 1)], ids=str)
def test_every_bit_of_the_seed_counts(backend, seeds):
    first, second = (draws(4 * CHUNK, backend.device, seed) for seed in seeds)
    assert float((first != second).double().mean()) > 0.01


def test_the_draws_of_neighbours_are_spread_evenly(backend):
    # Of 126 equal elements of a block half are rounded up, but for a few; independent coins are often off by ten.
    ups = draws(64 * 128, backend.device).view(-1, 128)[:, 2:].sum(1)
    assert float((ups - 63).abs().max()) <= 4


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
    key = noise_key((1 << 63) + 12345, 1000, 3)
    got = noise_halves(key, start, 7, torch.device("cpu")).tolist()
    assert got == [half_of(key, start + k) for k in range(7)]


def key_of(seed: int, step: int, noise_id: int, stream: int) -> int:
    key = mixed((seed & WORD) + 0x9E3779B9 & WORD)
    for part in (seed >> 32, step, noise_id, stream):
        key = mixed(key ^ part)
    return key


def test_torch_keys_follow_the_definition():
    seed = 0x12345678_FFFFFFFE
    key = key_of(seed, 17, 4, 2)
    assert noise_key(seed, 17, 4) == (key, mixed(key ^ 0x85EBCA6B))
    # The phase of a moment does not draw anew at every step: it turns.
    assert phase_key(seed, 17, 4) == key_of(seed, 0, 4, 1) + 17 * 0x4F1BBD & WORD


@pytest.mark.parametrize("start", [0, 3, CHUNK, (1 << 31) - 2, (1 << 33) + 5])
def test_torch_offsets_follow_the_definition(start):
    got = offsets(WORD - 2, start, 7, torch.device("cpu")).double()
    assert got.tolist() == [1 + (WORD - 2 + (start + k) * 0x3504F3) % 2**23 / 2**23 for k in range(7)]


def test_no_two_elements_of_eight_million_share_a_phase():
    drawn = offsets(123, 0, 1 << 23, torch.device("cpu"))
    assert len(torch.unique(drawn)) == 1 << 23


def offsets_at(step):
    """The offsets of a thousand elements at one step, in [1, 2)."""
    return offsets(phase_key(5, step, 1), 0, 1000, torch.device("cpu")).double()


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
    halves = noise_halves(noise_key(1, 2, 3), 0, 1 << 18, torch.device("cpu"))
    counts = torch.bincount(halves >> 8, minlength=256).double()
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6

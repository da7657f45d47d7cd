"""The storage formats by brute force, in float64 and Python integers. One block at a time.

``*_positions`` gives the place of every value on the format's own scale of codes as a real number; a correct encoder
takes the nearest code or, rounding stochastically, one of the two neighbours. Positions carry no rounding of their own,
so a test allows TIE for the float32 arithmetic of the implementations: at a tie either neighbour is right.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

# Four float32 roundings of a number up to 256, in units of a code.
TIE = 256 * 4 * 2.0**-24

SMALLEST_NORMAL = 2.0**-126
INFINITY_BITS = 0x7F800000

Floats = NDArray[np.float64]


def bits_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """What log8 takes a value for: the bits of a positive float, 0 for anything below 2^-126, infinity for NaN."""
    bits = np.where(values >= SMALLEST_NORMAL, values.view(np.int32), 0)
    return np.where(np.isnan(values), INFINITY_BITS, bits).astype(np.int64)


def log8_header(values: NDArray[np.float32]) -> tuple[int, int]:
    """(lo, step): bits of the smallest non-zero value, rounded down to a multiple of 2^16; the least multiple of 2^8 of
    which 254 reach the largest from there. (0, 256) for zeros alone."""
    present = [int(bits) for bits in bits_of(values) if bits > 0]
    if not present:
        return 0, 256
    lo, hi = min(present) // 65536 * 65536, max(present)
    least = (hi - lo) // 254 // 256
    step = next(256 * units for units in range(max(1, least), least + 2) if lo + 254 * 256 * units >= hi)
    return lo, step


def log8_parts(word: int) -> tuple[int, int]:
    """(lo, step) of a stored header."""
    return word // 65536 * 65536, word % 65536 * 256


def log8_word(lo: int, step: int) -> int:
    return lo + step // 256


def log8_levels(lo: int, step: int) -> list[int]:
    """The bits that codes 1 to 255 stand for."""
    return [lo + k * step for k in range(255)]


def log8_positions(values: NDArray[np.float32]) -> Floats:
    """Code of every value as a real number: 0 for zeros, else 1 + its distance from ``lo`` in steps."""
    lo, step = log8_header(values)
    bits = bits_of(values)
    return np.where(bits == 0, 0.0, 1.0 + (bits - lo) / step)


def log8_value(code: int, lo: int, step: int) -> float:
    """The float that a code stands for."""
    bits = 0 if code == 0 else log8_levels(lo, step)[code - 1]
    return float(np.array([bits], np.int32).view(np.float32)[0])


def absmax(values: NDArray[np.float32]) -> float:
    """The block's largest magnitude: NaN if it holds a NaN or infinity, 0 below 1e-36, where nothing is stored."""
    if not np.isfinite(values).all():
        return float("nan")
    largest = float(np.abs(values.astype(np.float64)).max())
    return 0.0 if largest < 1e-36 else largest


def int8_positions(values: NDArray[np.float32]) -> Floats:
    """127 * x / absmax as real numbers; all zero for a block without a usable scale."""
    scale = absmax(values)
    return values.astype(np.float64) / scale * 127.0 if scale > 0 else np.zeros(len(values))


def nf4_levels() -> Floats:
    """QLoRA's construction (Dettmers et al. 2023, section 3): quantiles of N(0, 1) scaled to [-1, 1], eight of the
    positive side, seven of the negative one and an exact zero; the outermost is that of the mean of 1 - 1/30, 1 - 1/32.
    """
    outermost = 1.0 - 0.5 * (1 / 30 + 1 / 32)
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]))
    return levels / levels.max()


def nf4_distances(values: NDArray[np.float32]) -> Floats:
    """|x / absmax - level| of every value to each of the 16 levels, [n, 16]."""
    scale = absmax(values)
    scaled = values.astype(np.float64) / scale if scale > 0 else np.zeros(len(values))
    return np.abs(scaled[:, None] - nf4_levels())

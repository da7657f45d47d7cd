"""How a tensor of more than two dimensions becomes a matrix."""

from __future__ import annotations

import itertools
import math

import pytest

from a8multi.plan import matrix_shape


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 7), (5, 7)),
        ((1, 9), (1, 9)),
        ((9, 1), (9, 1)),
        ((64, 64, 3, 3), (64, 576)),
        ((384, 3, 16, 16), (384, 768)),
        ((1, 197, 384), (197, 384)),
        ((2, 3, 4), (6, 4)),
        ((1, 1, 384), (1, 384)),
        ((1, 1, 1), (1, 1)),
        ((3, 1000, 1000), (1000, 3000)[::-1]),
    ],
)
def test_known_shapes(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_shape(shape) == expected


def test_no_split_holds_less() -> None:
    """Brute force: rows * cols is everything, and no other place to cut gives a smaller rows + cols."""
    for shape in itertools.product((1, 2, 3, 5, 16), repeat=4):
        rows, cols = matrix_shape(shape)
        assert rows * cols == math.prod(shape)
        cuts = [math.prod(shape[:k]) + math.prod(shape[k:]) for k in range(1, 4)]
        assert rows + cols == min(cuts)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_fewer_than_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        matrix_shape(shape)

"""One parameter of a step: its tensors and how its moments are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from a8multi.loader.structs import Format
from a8multi.quant.formats import StateFormat


@dataclass(frozen=True)
class MomentSpec:
    """How one moment of one parameter is to be stored. format None: as row and column means (factored).

    start: what every element of it is before the first step; of an element-wise one.
    """

    format: StateFormat | None
    block_size: int = 0
    start: float = 0.0

    @property
    def code(self) -> Format:
        return self.format.code if self.format is not None else Format.FACTORED


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns under which a tensor of two or more dimensions is factored.

    Two dimensions stay as they are. More are split where rows + columns is least: a convolution 64x64x3x3 becomes
    64 x 576, so that the two vectors hold 1.7% of the full state; factoring its last two dimensions, as
    torch.optim.Adafactor does, holds 67%.
    """
    if len(shape) < 2:
        raise ValueError(f"a shape of {len(shape)} dimensions has no rows and columns")
    splits = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]
    return min(splits, key=sum)


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds its elements in their order, and not their negatives, as of a conjugate's gradient."""
    return tensor.is_contiguous() and not tensor.is_neg()


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself if it ``is_plain``, else a copy that is."""
    return tensor.resolve_neg().contiguous()


@dataclass(frozen=True)
class Moments:
    """What is kept of one parameter between steps: the format of each moment, None where there is none.

    Attributes:
        first, second, third: moments; ``native/include/a8/abi.h`` (a8_tensor) says what each rule keeps in which.
        limiter: whether the norm of the last update is kept, to limit its growth.
        shape: of the moments, where it is not the parameter's (a projected gradient's).
    """

    first: MomentSpec | None = None
    second: MomentSpec | None = None
    third: MomentSpec | None = None
    limiter: bool = False
    shape: torch.Size | None = None

    def shape_of(self, param: Tensor) -> torch.Size:
        return param.shape if self.shape is None else self.shape

    @property
    def factored(self) -> bool:
        return self.second is not None and self.second.format is None


@dataclass(eq=False)
class Item:
    """One parameter with its state, all contiguous and on one device: what a kernel works on.

    Attributes:
        param: float32, bfloat16 or float16.
        grad_dtype: of its gradients, one of these types too. The gradients themselves are the plan's for one step.
        state: the optimizer's state dictionary of this parameter, which owns the tensors below.
        moments: their formats.
        first, first_block: codes and headers of the first moment; None without one.
        second, second_block: codes and headers of the second moment, or its row and column means when factored.
        third, third_block: of the third, likewise.
        limiter: norm of the last update, float32 0-d; None: it is not limited.
        rows, cols: of the matrix when factored, else 0.
        hyper: row of the hyper-parameter table.
        noise_id: number of the parameter in the optimizer, which seeds its noise.
        name: for messages.
    """

    param: Tensor
    grad_dtype: torch.dtype
    state: dict[str, Any]
    moments: Moments
    first: Tensor | None
    first_block: Tensor | None
    second: Tensor | None
    second_block: Tensor | None
    third: Tensor | None
    third_block: Tensor | None
    limiter: Tensor | None
    rows: int
    cols: int
    hyper: int
    noise_id: int
    name: str

"""What the state of another optimizer is read into, and how reading it fails.

A source (``from_*.py``) takes every entry out of ``Fields``; what is left is refused, so that nothing is lost silently.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a8multi.errors import StateFormatError
from a8multi.plan import plain

# Of torch and torchao: name -> why it cannot be carried, and what to do.
AMSGRAD = {
    "max_exp_avg_sq": (
        "amsgrad's maximum of the second moment has no place in our optimizers",
        "Set amsgrad=False in the groups of the state dict and delete max_exp_avg_sq of every parameter: the step will "
        "use the average alone.",
    )
}

INTACT = "Is the state dict intact?"
_COMPLETE = "Is the state dict complete, and `source` the package that wrote it?"


@dataclass(frozen=True)
class Place:
    """Where in a state dict we are, for messages."""

    source: str
    what: str

    def error(self, key: str, why: str, do: str) -> StateFormatError:
        return StateFormatError(f"convert_state_dict(source={self.source!r}): {self.what}: {key}: {why}. {do}")

    def required(self, entries: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The entries of these names, all of which have to be there."""
        for name in names:
            if name not in entries:
                raise self.error(name, f"is not there, only {', '.join(map(str, entries)) or 'nothing'}", _COMPLETE)
        return {name: entries[name] for name in names}


class Factors(NamedTuple):
    """Means of a moment over the last dimension, [..., rows, 1], and over the one before it, [..., 1, cols]."""

    row: Tensor
    col: Tensor


@dataclass
class Held:
    """State of one parameter, float32. Which moment is which: a8multi.plan.Moments."""

    step: int
    first: Tensor | None = None
    second: Tensor | Factors | None = None
    third: Tensor | Factors | None = None
    limiter: Tensor | None = None


@dataclass
class Options:
    """Hyper-parameters of a group.

    Attributes:
        values: in the names of our optimizer.
        read: names of the source's group that are dealt with: carried, or of no meaning to ours.
        decoupled: whether the source's weight decay is apart from the gradient (AdamW) or part of it (L2); None: that
            cannot be known, or does not matter.
    """

    values: dict[str, Any]
    read: set[str] = field(default_factory=set)
    decoupled: bool | None = None


class Fields:
    """The state of one parameter, from which a source takes what it knows."""

    def __init__(self, entries: Mapping[str, Any], place: Place) -> None:
        self._left = {name: value for name, value in entries.items() if value is not None}
        self.place = place

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Any:
        self.place.required(self._left, (name,))
        return self._left.pop(name)

    def drop(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def refuse(self, reasons: Mapping[str, tuple[str, str]]) -> None:
        """Raise if one of these is there. reasons: name -> why it cannot be carried, and what to do."""
        for name, (why, do) in reasons.items():
            if name in self._left:
                raise self.place.error(name, why, do)

    def steps(self) -> int:
        number = self.number("step")
        if number < 0 or number != int(number):
            raise self.place.error("step", f"{number!r} is not a number of steps", INTACT)
        return int(number)

    def number(self, name: str) -> float:
        value = self.take(name)
        number = as_number(value)
        if number is None or not math.isfinite(number):
            raise self.place.error(name, f"{value!r} is not a finite number", INTACT)
        return number

    def codes(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of exactly this type. Codes are read in the order of memory: anything but contiguous is refused."""
        value = self.take(name)
        if not isinstance(value, Tensor) or value.dtype is not dtype or not value.is_contiguous():
            raise self.place.error(
                name,
                f"{_words(value)} where {dtype} in the order of memory is expected",
                "Save the state of a parameter that is contiguous, in the types in which the optimizer keeps it.",
            )
        return value.detach()

    def values(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Numbers of this shape in float32, None when the name is not there."""
        if name not in self._left:
            return None
        return self.shaped(name, self.dense(name), shape)

    def dense(self, name: str) -> Tensor:
        value = self.take(name)
        if hasattr(value, "full_tensor"):
            raise self.place.error(
                name,
                "is a DTensor, a part of the whole",
                "Gather it first: get_optimizer_state_dict(full_state_dict=True)",
            )
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise self.place.error(
                name,
                f"{_words(value)} cannot be read",
                "Is `source` the package that wrote it? Sparse state is not supported.",
            )
        if not value.is_floating_point():
            raise self.place.error(name, f"{_words(value)} holds no numbers", "Is `source` the package that wrote it?")
        return plain(value.detach().float())

    def shaped(self, name: str, values: Tensor, shape: Sequence[int]) -> Tensor:
        if tuple(values.shape) != tuple(shape):
            raise self.place.error(
                name,
                f"has shape {tuple(values.shape)}, the parameter wants {tuple(shape)}",
                "Build the optimizer over the same parameters, in the same order.",
            )
        return values

    def done(self) -> None:
        if self._left:
            raise self.place.error(
                ", ".join(self._left),
                "is nothing that can be carried over",
                "Is `source` the package that wrote it? Delete what you do not need from the state dict.",
            )


def factor_shapes(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of ``Factors``."""
    return (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])


def as_number(value: Any) -> float | None:
    """Of a number or a tensor of one; None: it is neither."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, numbers.Real) else None


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "tensor" if type(value) is Tensor else type(value).__name__
        return f"a {kind} of {value.dtype}, {value.layout}, shape {list(value.shape)}"
    return f"a {type(value).__name__}"

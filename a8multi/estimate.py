"""How much memory an optimizer's state will take, from the optimizer's own description of it.

Receives shapes, in whatever form they come; makes the optimizer of tensors without memory and asks it for the layout
of its state, so that the answer is what a step would allocate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from a8multi import optim
from a8multi.optim import state as state_of
from a8multi.optim.base import LowBitOptimizer
from a8multi.plan import Moments


@dataclass(frozen=True)
class StateEstimate:
    """Memory of an optimizer's state.

    Attributes:
        optimizer: name of its class.
        total_bytes: of all tensors in the state.
        parameters: elements that are optimized.
        bytes_by_format: of the moments by their format with its block headers ("int8", "log8", "nf4", "bf16", "fp32");
            "factored": of row and column means; "scalars": of norms and counters.
    """

    optimizer: str
    total_bytes: int
    parameters: int
    bytes_by_format: dict[str, int]

    @property
    def bytes_per_parameter(self) -> float:
        return self.total_bytes / self.parameters if self.parameters else 0.0


def estimate_state_bytes(
    model_or_shapes: nn.Module | Iterable[Any],
    optimizer: str | type[torch.optim.Optimizer] = "adamw8bit",
    **options: Any,
) -> StateEstimate:
    """Bytes of the state that an optimizer will have after its first step. Exact, and nothing is allocated.

    Args:
        model_or_shapes: a model (its parameters that require gradients); or an iterable of shapes, of tensors, of pairs
            of name and either, or of groups (``build_param_groups``) whose ``params`` are any of these. A tensor that
            occurs twice counts once. Sharded parameters count as a whole.
        optimizer: a class of a8multi, or its name in upper or lower case, such as "adamw8bit".
        options: of the optimizer, such as ``first_moment="nf4"``.

    Raises:
        TypeError: an entry is none of these, or the optimizer does not have an option.
        ValueError: an unknown optimizer, an option that is not valid, or a tensor that cannot be optimized.

    Example:
        >>> a8multi.estimate_state_bytes([(4096, 4096)], "adamw8bit", first_moment="nf4").total_bytes
        26214400
    """
    kind = optimizer_class(optimizer)
    # A learning rate has no memory, and some optimizers want one.
    built = kind(_Reader().groups(model_or_shapes), **{"lr": 0.0, **options})
    bytes_by_format: dict[str, int] = {}
    parameters = 0
    for group in built.param_groups:
        for param in group["params"]:
            parameters += param.numel()
            # What has no elements takes no step, so it gets no state.
            if param.numel():
                for name, count in _bytes_by_format(built, group, param):
                    bytes_by_format[name] = bytes_by_format.get(name, 0) + count
    return StateEstimate(kind.__name__, sum(bytes_by_format.values()), parameters, bytes_by_format)


def optimizers() -> dict[str, type[LowBitOptimizer]]:
    """Every optimizer by its name in lower case."""
    found = {name.lower(): getattr(optim, name) for name in sorted(optim.__all__)}
    return {n: kind for n, kind in found.items() if isinstance(kind, type) and issubclass(kind, LowBitOptimizer)}


def optimizer_class(optimizer: str | type[torch.optim.Optimizer]) -> type[LowBitOptimizer]:
    """The class of that name, or the class itself.

    Raises:
        ValueError: it is not one of a8multi's.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, LowBitOptimizer):
        return optimizer
    known = optimizers()
    if not isinstance(optimizer, str) or optimizer.lower() not in known:
        raise ValueError(f"optimizer must be a class of a8multi or one of {', '.join(known)}, not {optimizer!r}")
    return known[optimizer.lower()]


class _Reader:
    """Turns what the user has into groups of parameters without memory."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def groups(self, given: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
        entries = list(given.parameters() if isinstance(given, nn.Module) else given)
        if entries and all(isinstance(entry, Mapping) for entry in entries):
            dropped = ("params", "param_names")
            return [
                {"params": list(self._params(e["params"])), **{k: v for k, v in e.items() if k not in dropped}}
                for e in entries
            ]
        return [{"params": list(self._params(entries))}]

    def _params(self, entries: Iterable[Any]) -> Iterator[Parameter]:
        for number, entry in enumerate([entries] if isinstance(entries, Tensor) else entries):
            named = isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)
            value = entry[1] if named else entry
            if isinstance(value, Tensor):
                if id(value) not in self._seen and (value.requires_grad or not isinstance(value, Parameter)):
                    self._seen.add(id(value))
                    yield _weightless(tuple(value.shape), value.dtype)
            elif isinstance(value, (tuple, list)) and all(isinstance(n, int) and n >= 0 for n in value):
                yield _weightless(tuple(value), torch.float32)
            else:
                raise TypeError(
                    f"entry {number} of the shapes is {value!r}, which is neither a tensor nor a shape such as "
                    f"(4096, 4096); a single shape goes into a list"
                )


def _weightless(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    return Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=dtype.is_floating_point)


def _bytes_by_format(optimizer: LowBitOptimizer, group: dict[str, Any], param: Tensor) -> Iterator[tuple[str, int]]:
    moments = optimizer._moments(group, param)
    bare = replace(moments, first=None, second=None, third=None)
    scalars = _layout_bytes(param, bare)
    for name in ("first", "second", "third"):
        if spec := getattr(moments, name):
            moment = _layout_bytes(param, replace(bare, **{name: spec})) - scalars
            yield "factored" if spec.format is None else spec.format.name, moment
    if state_of.counts_on_device(group):
        scalars += torch.int64.itemsize
    if scalars:
        yield "scalars", scalars


def _layout_bytes(param: Tensor, moments: Moments) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in state_of.layout(param, moments).values())

"""What the element-wise optimizers share: options of the state, their checks, formats of the moments, constant fields.

The rules are in native/include/a8/rules.h. A subclass names its rule and the moments that it has, checks its own
options, and says in ``_fields`` and ``_schedule`` what of ``a8_hyper`` follows from them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from a8multi.loader.structs import Flag
from a8multi.plan import Moments, MomentSpec
from a8multi.quant.formats import FORMATS, check_block_size

from .base import LowBitOptimizer
from .checks import check_flags, check_lr, check_number, check_seed
from .roster import Group

# The options that name a moment's format, in the order of ``Moments``, and the formats of each.
MOMENT_FORMATS = {
    "first_moment": ("int8", "nf4", "bf16", "fp32"),
    "second_moment": ("log8", "fp32"),
    "third_moment": ("int8", "nf4", "bf16", "fp32"),
}
# The other options that decide how state is stored.
SIZES = ("block_size", "min_quantized_numel")


class ElementwiseOptimizer(LowBitOptimizer):
    """Base of the element-wise optimizers; not for use by itself."""

    _op = "elementwise"
    # Flag.L2_DECAY where weight decay is added to the gradient; else the rule has its own place for it.
    _decay_flag: ClassVar[int] = 0

    # --- For subclasses. ---

    def _fields(self, group: Group) -> dict[str, Any]:
        """Fields of ``a8_hyper`` of the rule, but for weight decay, flags and what ``_hyper`` leaves out."""
        raise NotImplementedError

    def _flags(self, group: Group) -> int:
        return common_flags(group) | (self._decay_flag if group["weight_decay"] else 0)

    def _format_of(self, group: Group, moment: str) -> str | None:
        """The format of a moment, by the name of its option; None: the rule with these options does without it."""
        return str(group[moment]) if moment in self._format_options else None

    # --- LowBitOptimizer. ---

    def _check_group(self, group: Group) -> None:
        check_lr(group["lr"])
        check_number("weight_decay", group["weight_decay"], 0.0)
        check_number("min_quantized_numel", group["min_quantized_numel"], 0)
        check_seed(group["seed"])
        check_flags(group)
        check_block_size("block_size", group["block_size"])
        for name, known in MOMENT_FORMATS.items():
            if name in self._format_options and group[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {group[name]!r}")

    def _moments(self, group: Group, param: Tensor) -> Moments:
        size, least = group["block_size"], group["min_quantized_numel"]
        formats = [self._format_of(group, name) for name in MOMENT_FORMATS]
        numel = param.numel()
        first, second, third = (None if form is None else moment_spec(form, size, numel, least) for form in formats)
        return Moments(first, second, third)

    def _hyper(self, group: Group, dtype: torch.dtype) -> dict[str, Any]:
        return {**self._fields(group), "weight_decay": group["weight_decay"], "flags": self._flags(group)}


def options(arguments: dict[str, Any]) -> Group:
    """The options of a group, from ``locals()`` at the beginning of a constructor."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


def check_betas(betas: Any, count: int) -> None:
    """Raise ValueError unless ``betas`` are so many numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"betas must be {('two', 'three')[count - 2]} numbers, not {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, 0.0, 1.0)


def averages(*betas: float) -> dict[str, float]:
    """Fields of ``a8_hyper`` for moving averages with these decays."""
    fields = {f"beta{i}": beta for i, beta in enumerate(betas, 1)}
    return {**fields, **{f"one_minus_{name}": 1.0 - beta for name, beta in fields.items()}}


def moment_spec(name: str, block_size: int, numel: int, min_numel: int) -> MomentSpec:
    """The format of that name, or float32 for fewer elements than are worth it."""
    fmt = FORMATS[name]
    if not fmt.quantized:
        return MomentSpec(fmt)
    return MomentSpec(fmt, block_size) if numel >= min_numel else MomentSpec(FORMATS["fp32"])


def common_flags(group: Group) -> int:
    """Bits of ``a8_hyper.flags`` that every optimizer has."""
    flags = Flag.MAXIMIZE if group["maximize"] else 0
    flags |= Flag.STOCHASTIC_STATE if group["stochastic_rounding"] else 0
    flags |= Flag.STOCHASTIC_WRITE if group["stochastic_rounding_writeback"] else 0
    return int(flags)

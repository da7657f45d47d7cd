"""State of torchao's Adam and AdamW: tensor subclasses (8-bit, 4-bit, fp8), which know how to dequantise themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .held import AMSGRAD, Fields, Held, Options, Place


def options(group: Mapping[str, Any], kind: str, place: Place) -> Options:
    if kind != "adam" or "betas" not in group:
        raise place.error(
            f"options {', '.join(name for name in group if name != 'params')}",
            f"torchao's 8-bit optimizers are Adam and AdamW, and the optimizer to load is of the kind {kind}",
            "Build an AdamW8bit or Adam8bit.",
        )
    values = place.required(group, ("lr", "betas", "eps", "weight_decay", "amsgrad"))
    return Options(values, {*values})


def moments(fields: Fields, shape: Sequence[int], kind: str) -> Held | None:
    fields.refuse(AMSGRAD)
    return Held(fields.steps(), _values(fields, "exp_avg", shape), _values(fields, "exp_avg_sq", shape))


def _values(fields: Fields, name: str, shape: Sequence[int]) -> Tensor:
    value = fields.take(name)
    if type(value).__module__.startswith("torchao."):
        value = value.dequantize()
    plain = Fields({name: value}, fields.place)
    return plain.shaped(name, plain.dense(name), shape)

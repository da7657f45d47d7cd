"""State of torch.optim: AdamW, Adam, Adafactor, SGD, RMSprop, Adagrad. The options of a group tell which it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .held import AMSGRAD, Factors, Fields, Held, Options, Place, factor_shapes


class _Rule(NamedTuple):
    """marks: options that this optimizer alone has. moments: first, second, third. fixed: ours that it always has."""

    marks: tuple[str, ...]
    moments: tuple[str, str, str]
    options: tuple[str, ...]
    fixed: Mapping[str, Any] = {}


_RULES = {
    "adam": _Rule(("betas", "amsgrad"), ("exp_avg", "exp_avg_sq", ""), ("betas", "eps", "amsgrad")),
    "adafactor": _Rule(
        ("beta2_decay", "d"),
        ("", "variance", ""),
        ("beta2_decay", "eps", "d"),
        {
            "beta1": None,
            "beta2": None,
            "beta3": None,
            "relative_step": True,
            "scale_parameter": True,
            "scale_weight_decay": False,
        },
    ),
    "sgd": _Rule(("dampening", "nesterov"), ("momentum_buffer", "", ""), ("momentum", "dampening", "nesterov")),
    "rmsprop": _Rule(
        ("alpha", "centered"), ("momentum_buffer", "square_avg", "grad_avg"), ("alpha", "eps", "momentum", "centered")
    ),
    "adagrad": _Rule(
        ("lr_decay", "initial_accumulator_value"), ("", "sum", ""), ("lr_decay", "eps", "initial_accumulator_value")
    ),
}
_OF_THE_RUN = {"foreach", "fused", "capturable", "differentiable"}


def options(group: Mapping[str, Any], kind: str, place: Place) -> Options:
    found = [name for name, rule in _RULES.items() if all(mark in group for mark in rule.marks)]
    if found != [kind]:
        what = f"options of {found[0]}" if found else "options of no optimizer of torch that can be carried over"
        raise place.error(
            f"options {', '.join(name for name in group if name != 'params')}",
            f"these are {what}, and the optimizer to load is of the kind {kind}",
            f"Known: {', '.join(_RULES)}. Build the optimizer of ours that follows the same rule.",
        )
    rule = _RULES[kind]
    values = place.required(group, ("lr", "weight_decay", *rule.options))
    values.update({name: group[name] for name in ("maximize",) if name in group})
    decoupled = group.get("decoupled_weight_decay") if kind == "adam" else kind == "adafactor"
    read = {*values, *_OF_THE_RUN, "decoupled_weight_decay"}
    return Options({**values, **rule.fixed}, read, decoupled)


def moments(fields: Fields, shape: Sequence[int], kind: str) -> Held | None:
    fields.refuse(AMSGRAD)
    # torch does not count SGD's steps; ours asks only whether one was taken.
    step = fields.steps() if kind != "sgd" else 1
    held = Held(step, *(fields.values(name, shape) if name else None for name in _RULES[kind].moments))
    if kind == "sgd" and held.first is None:
        return None
    if kind == "adafactor" and held.second is None and len(shape) >= 2:
        shapes = factor_shapes(shape)
        row, col = (
            fields.shaped(name, fields.dense(name), want)
            for name, want in zip(("row_var", "col_var"), shapes, strict=True)
        )
        held.second = Factors(row, col)
    return held

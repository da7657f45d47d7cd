"""Every element-wise rule, Adafactor with CAME and the limiter, with options for the kernels and the references.

Some steps of each, on any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from oracle import adam, rules
from torch import Tensor

from a8multi.loader.structs import Flag, RuleKind, ScheduleRule
from a8multi.plan import Schedule, StepPlan
from a8multi.plan.step_plan import has_norm

from .plans import backend_named, hypers_of, plan_of, run, spread, tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A partial block, an odd number of elements, one past a chunk, less than a block.
SHAPES = ((129, 131), (5000,), (16385,), (33,))


class Case(NamedTuple):
    """One rule with its options, as the hyper-parameter table and as the reference have them."""

    kind: RuleKind
    formats: dict[str, str]
    schedule: Schedule
    fields: dict[str, Any]
    reference: Callable[..., Any]
    options: dict[str, Any]

    def hypers(self, step: int, **more: Any) -> np.ndarray:
        flags = int(self.fields.get("flags", 0)) | int(more.pop("flags", 0))
        return hypers_of(step, self.schedule, **self.fields | more | {"flags": flags})


def case(
    kind: RuleKind,
    formats: str,
    reference: Callable[..., Any],
    rule: ScheduleRule = ScheduleRule.UNBIASED,
    decays: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    """formats: names of the moments. decays: more of the schedule; fields: more of ``a8_hyper``."""
    held = {name: {"second": "log8"}.get(name, "int8") for name in formats.split()}
    shared = {name: options[name] for name in ("lr", "eps", "weight_decay") if name in options}
    given = {**shared, **(fields or {})}
    betas = {name: given.get(name, 0.0) for name in ("beta1", "beta2")}
    return Case(kind, held, Schedule(rule, **{**betas, **(decays or {})}), given, reference, options)


L2 = {"flags": Flag.L2_DECAY}
AVERAGES = {"beta1": 0.9, "beta2": 0.99}
CASES = {
    "adam": case(
        RuleKind.ADAM,
        "first second",
        adam.adam,
        ScheduleRule.ADAM_BIAS,
        fields=AVERAGES | L2,
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.1,
    ),
    "lion": case(RuleKind.LION, "first", rules.lion, fields=AVERAGES, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": case(RuleKind.RMSPROP, "second", rules.rmsprop, fields={"beta2": 0.99}, lr=1e-2, eps=1e-8),
    "rmsprop-all": case(
        RuleKind.RMSPROP,
        "first second third",
        rules.rmsprop,
        fields={"beta1": 0.9, "one_minus_beta1": 1.0, "beta2": 0.9, "beta3": 0.9} | L2,
        lr=1e-2,
        alpha=0.9,
        eps=1e-6,
        momentum=0.9,
        centered=True,
        weight_decay=0.1,
    ),
    "sgd": case(RuleKind.SGD, "", rules.sgd, fields={"beta1": 0.0} | L2, lr=1e-2, weight_decay=0.1),
    "sgd-dampened": case(
        RuleKind.SGD,
        "first",
        rules.sgd,
        ScheduleRule.UNBIASED | ScheduleRule.FIRST_WHOLE,
        {"decay": 0.3},
        {"beta1": 0.9},
        lr=1e-2,
        momentum=0.9,
        dampening=0.3,
    ),
    "sgd-nesterov": case(
        RuleKind.SGD,
        "first",
        rules.sgd,
        fields={"beta1": 0.9, "one_minus_beta1": 1.0, "flags": Flag.NESTEROV},
        lr=1e-2,
        momentum=0.9,
        nesterov=True,
    ),
    "adagrad": case(
        RuleKind.ADAGRAD,
        "second",
        rules.adagrad,
        ScheduleRule.UNBIASED | ScheduleRule.LR_DECAYS,
        {"decay": 0.1},
        L2,
        lr=1e-2,
        lr_decay=0.1,
        eps=1e-10,
        weight_decay=0.1,
    ),
    "ademamix": case(
        RuleKind.ADEMAMIX,
        "first second third",
        rules.ademamix,
        ScheduleRule.ADAM_BIAS | ScheduleRule.MIX_WARMS_UP | ScheduleRule.BETA3_WARMS_UP,
        {"beta3": 0.999, "mix": 5.0, "mix_steps": 10.0, "beta3_steps": 8.0},
        AVERAGES,
        lr=1e-2,
        betas=(0.9, 0.99, 0.999),
        alpha=5.0,
        t_alpha=10,
        t_beta3=8,
        eps=1e-8,
        weight_decay=0.1,
    ),
    "ademamix-constant": case(
        RuleKind.ADEMAMIX,
        "first second third",
        rules.ademamix,
        ScheduleRule.ADAM_BIAS,
        fields=AVERAGES | {"beta3": 0.999, "mix": 5.0},
        lr=1e-2,
        betas=(0.9, 0.99, 0.999),
        alpha=5.0,
        eps=1e-8,
    ),
    "lamb": case(
        RuleKind.LAMB,
        "first second",
        rules.lamb,
        ScheduleRule.ADAM_BIAS,
        fields=AVERAGES,
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-6,
        weight_decay=0.1,
    ),
    "lars": case(
        RuleKind.LARS,
        "first",
        rules.lars,
        fields={"beta1": 0.9, "one_minus_beta1": 1.0, "trust": 0.1, "flags": Flag.NESTEROV},
        lr=1.0,
        momentum=0.9,
        trust_coefficient=0.1,
        nesterov=True,
        eps=1e-8,
        weight_decay=0.1,
    ),
}
EXACT = [name for name, one in CASES.items() if not has_norm(one.kind)]
SUMMED = [name for name in CASES if name not in EXACT]


def trained(
    backend: str,
    one: Case,
    *,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    formats: dict[str, str] | None = None,
    block_size: int = 128,
    wrong: float | None = None,
    **fields: Any,
) -> list[dict[str, Tensor]]:
    """Parameters and state after three steps."""
    params = [spread(shape, i, param_dtype, scale) for i, shape in enumerate(SHAPES)]
    grad_dtype = grad_dtype or param_dtype
    options = {"rule": one.kind, "block_size": block_size, "grad_dtype": grad_dtype}
    plan = plan_of(params, one.formats if formats is None else formats, **options)
    for step in range(1, 4):
        grads = [spread(shape, 10 * step + i, grad_dtype, scale) for i, shape in enumerate(SHAPES)]
        if wrong is not None and step == 2:
            for grad in grads:
                grad.view(-1)[20] = wrong
        run(backend_named(backend, "elementwise"), "elementwise", plan, grads, one.hypers(step, **fields))
    return tensors_of(plan)


# --- CAME and the limiter. ---

CAME_SHAPES = ((65, 256), (40, 31), (7, 3, 5), (5, 1), (1, 9), (700,))
FACTORED = {"first": "fp32", "second": "factored", "third": "factored"}
# Flags, moments, whether the norm's growth is limited, and hyper-parameters.
CAME = {
    "paper": (Flag.AVERAGE_UPDATE, FACTORED, False, {}),
    "paper-limited": (Flag.AVERAGE_UPDATE, FACTORED, True, {}),
    "paper-unclipped": (Flag.AVERAGE_UPDATE, FACTORED, True, {"clip": 0.0}),
    "gradient": (Flag(0), FACTORED, False, {}),
    "gradient-limited": (Flag.SCALE_PARAMETER | Flag.SCALE_DECAY, FACTORED, True, {"eps2": 1e-3}),
    "limited": (Flag(0), {"second": "factored"}, True, {}),
    "limited-unclipped": (Flag(0), {"second": "factored"}, True, {"clip": 0.0}),
}
CAME_FIELDS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.99,
    "beta3": 0.999,
    "eps": 1e-15,
    "eps3": 1e-16,
    "weight_decay": 0.1,
    "clip": 1.0,
    "growth": 1.01,
}


def came_hypers(variant: str, step: int, **more: Any) -> np.ndarray:
    flags, _, _, fields = CAME[variant]
    table = hypers_of(step, Schedule(ScheduleRule(0)), **CAME_FIELDS | fields | more)
    table["flags"] |= int(flags)
    return table


def came_grads(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Growing, so that the limiter has something to do; those of the second parameter begin with zeros."""
    grads = [spread(shape, 10 * step + i, dtype, 2.0 ** (step - 8)) for i, shape in enumerate(CAME_SHAPES)]
    grads[1] *= step > 1
    return grads


def came_steps(
    backend: str, variant: str, dtype: torch.dtype = torch.float32, first: str = "fp32", steps: int = 3
) -> StepPlan:
    params = [spread(shape, i, scale=1e-3).clamp_(-1, 1).to(dtype) for i, shape in enumerate(CAME_SHAPES)]
    _, formats, limiter, _ = CAME[variant]
    formats = {name: first if name == "first" else held for name, held in formats.items()}
    plan = plan_of(params, formats, limiter=limiter)
    for step in range(1, steps + 1):
        grads = came_grads(step, dtype)
        run(backend_named(backend, "adafactor"), "adafactor", plan, grads, came_hypers(variant, step))
    return plan

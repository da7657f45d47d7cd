"""Plans built by hand, to drive a backend's operations without an optimizer; and how results are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a8multi.backend.base import Backend
from a8multi.backend.registry import backend_for, use_backend
from a8multi.loader import geometry
from a8multi.loader.structs import RuleKind
from a8multi.plan import Item, Moments, MomentSpec, Schedule, StepPlan, matrix_shape
from a8multi.plan.step_plan import HYPER
from a8multi.quant.formats import FORMATS

NAMES = ("first", "second", "third")


def spread(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values over some twenty octaves, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.exp2(4 * torch.randn(shape, generator=generator))
    values = (torch.randn(shape, generator=generator) * octaves * scale).clamp(-6e4, 6e4)
    return values.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype)


def plan_of(
    params: Sequence[Tensor],
    formats: Mapping[str, str],
    *,
    rule: RuleKind = RuleKind.ADAM,
    block_size: int = 128,
    limiter: bool = False,
    grad_dtype: torch.dtype | None = None,
) -> StepPlan:
    """A plan whose moments are zero. formats: of each moment that there is; "factored" needs two dimensions, and
    parameters of one have float32 values in the place of a factored second moment and no factored third."""
    items = []
    for number, param in enumerate(params):
        specs: dict[str, MomentSpec | None] = {}
        state: dict[str, Tensor | None] = {name + end: None for name in NAMES for end in ("", "_block")}
        rows, cols = matrix_shape(param.shape) if param.ndim > 1 and "factored" in formats.values() else (0, 0)
        for name, held in formats.items():
            fmt = FORMATS["fp32" if held == "factored" else held]
            if held == "factored" and not rows:
                if name == "third":
                    continue
            elif held == "factored":
                specs[name] = MomentSpec(None)
                state[name] = torch.zeros(rows, device=param.device)
                state[f"{name}_block"] = torch.zeros(cols, device=param.device)
                continue
            specs[name] = MomentSpec(fmt, block_size if fmt.quantized else 0)
            state[name], state[f"{name}_block"] = fmt.allocate(param.shape, block_size, param.device)
        items.append(
            Item(
                param=param,
                grad_dtype=grad_dtype or param.dtype,
                state={},
                moments=Moments(**specs, limiter=limiter),
                limiter=torch.zeros((), device=param.device) if limiter else None,
                rows=rows,
                cols=cols,
                hyper=0,
                noise_id=number,
                name=f"parameter {number}",
                **state,
            )
        )
    return StepPlan(params[0].device, items, rule=rule)


def hypers_of(step: int, schedule: Schedule, **fields: Any) -> np.ndarray:
    """One row of hyper-parameters. ``one_minus_beta*`` follow from the betas that are given."""
    table = np.zeros(1, HYPER)
    for name in ("beta1", "beta2", "beta3"):
        if name in fields:
            fields.setdefault(f"one_minus_{name}", 1.0 - fields[name])
    for name, value in (fields | schedule.derived(step)).items():
        table[name] = value
    return table


def run(backend: Backend, op: str, plan: StepPlan, grads: Sequence[Tensor], hypers: np.ndarray) -> None:
    plan.grads = list(grads)
    try:
        getattr(backend, op)(plan, hypers)
    finally:
        plan.grads = []


def tensors_of(plan: StepPlan) -> list[dict[str, Tensor]]:
    """Parameter and state of every item, by name."""
    names = ["param", *(name + end for name in NAMES for end in ("", "_block")), "limiter"]
    held = [{name: getattr(item, name) for name in names} for item in plan.items]
    return [{name: tensor for name, tensor in one.items() if tensor is not None} for one in held]


def backend_named(name: str, op: str) -> Backend:
    with use_backend(name):
        return backend_for(torch.device("cpu"), op)


# --- Sums, as every compiled backend makes them. ---


def canonical_sum(values: np.ndarray) -> np.ndarray:
    """In the canonical order (docs/decisions/0004): 256 accumulators, folded in halves."""
    lanes = geometry()["A8_LANES"]
    padded = np.zeros(-(-len(values) // lanes) * lanes, np.float32)
    padded[: len(values)] = values
    total = np.zeros(lanes, np.float32)
    for row in padded.reshape(-1, lanes):
        total = total + row
    while len(total) > 1:
        half = len(total) // 2
        total = total[:half] + total[half:]
    return total[0]


# --- Comparisons. ---


def assert_same_bits(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """The sign of a zero counts; one NaN is like another."""
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            a, b = (x[name].masked_fill(x[name].isnan(), 0.125).reshape(-1) for x in (ours, theirs))
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"parameter {number}: {name}"


def assert_close(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """As far as two orders of a float32 sum may lead; a code may fall on the other side of a boundary."""
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            what = f"parameter {number}: {name}"
            if not ours[name].is_floating_point():
                assert (ours[name] == theirs[name]).float().mean() > 0.998, what
                continue
            a, b = ours[name].double(), theirs[name].double()
            assert b.isfinite().all(), what
            unit = torch.finfo(ours[name].dtype).eps
            assert ((a - b).abs() <= 2e-5 * b.abs() + 1e-6 * float(b.abs().max()) + unit * b.abs()).all(), what


def relative_error(got: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """Of the largest number; start: of what has moved from there, but for the rounding of the place in float32."""
    origin = torch.zeros_like(expected) if start is None else start
    error = (got.double() - expected).abs() - 16 * 2.0**-24 * origin.abs()
    return float(error.max() / (expected - origin).abs().max())

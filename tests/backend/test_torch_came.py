"""CAME in both orders and the norm-growth limiter on the torch backend: against float64, and beside the CPU library.

The library adds its sums in another order, so the two agree in all but the last places.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import adafactor
from torch import Tensor

from a8multi.backend import torch_step
from a8multi.backend.torch import TorchBackend
from a8multi.loader.structs import Flag
from a8multi.plan import StepPlan

from .plans import assert_close, backend_named, plan_of, relative_error, run, spread, tensors_of
from .rule_cases import CAME, CAME_FIELDS, CAME_SHAPES, DTYPES, came_grads, came_hypers, came_steps


@pytest.mark.parametrize("variant", CAME)
def test_came_is_the_papers(variant):
    flags, _, limiter, fields = CAME[variant]
    for number, held in enumerate(tensors_of(came_steps("torch", variant))):
        exact = spread(CAME_SHAPES[number], number, scale=1e-3).clamp_(-1, 1).double()
        start = exact

        def zeros(name: str, held: dict[str, Tensor] = held) -> Any:
            factored = f"{name}_block" in held
            means = [torch.zeros_like(held[n]).double() for n in (name, f"{name}_block") if n in held]
            return tuple(means) if factored else (means or [None])[0]

        old = adafactor.Moments(zeros("first"), zeros("second"), zeros("third"), 0.0 if limiter else None)
        options = CAME_FIELDS | fields
        for step in range(1, 4):
            grad = came_grads(step)[number].double()
            shared = {name: options[name] for name in ("lr", "weight_decay", "growth")} | {"d": options["clip"]}
            if flags & Flag.AVERAGE_UPDATE:
                betas, eps = (0.9, 0.99, 0.999), (options["eps"], options["eps3"])
                exact, old = adafactor.came(exact, grad, old, betas=betas, eps=eps, **shared)
                continue
            exact, old = adafactor.adafactor(
                exact,
                grad,
                old,
                step,
                beta1=0.9 if old.first is not None else None,
                beta2=0.99,
                beta3=0.999,
                eps1=options["eps"],
                eps2=options.get("eps2", 0.0),
                eps3=options["eps3"],
                relative_step=True,  # no bias corrections; its bound is far above lr here
                scale_parameter=bool(flags & Flag.SCALE_PARAMETER),
                scale_weight_decay=bool(flags & Flag.SCALE_DECAY),
                **shared,
            )
        what = f"{variant}: {CAME_SHAPES[number]}"
        assert relative_error(held["param"], exact, start) < 2e-5, what
        if limiter:
            assert float(held["limiter"]) == pytest.approx(old.norm, rel=1e-5), what
        if old.confidence is not None:
            for name, means in zip(("third", "third_block"), old.confidence, strict=True):
                assert relative_error(held[name], means) < 1e-5, what


@pytest.mark.parametrize("variant", CAME)
@pytest.mark.parametrize("first", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_came_agrees_with_the_library(variant, first, dtype):
    options = {"first": first, "dtype": dtype, "steps": 1 if first == "nf4" else 2}
    ours, theirs = (tensors_of(came_steps(backend, variant, **options)) for backend in ("torch", "cpu"))
    assert_close(ours, theirs)


@pytest.mark.parametrize("variant", ["paper-limited", "gradient-limited"])
def test_came_in_slices_that_cut_rows(variant, monkeypatch):
    expected = tensors_of(came_steps("torch", variant, first="int8"))
    monkeypatch.setattr(torch_step, "SLICE", 4096)
    assert_close(tensors_of(came_steps("torch", variant, first="int8")), expected)


def test_a_confidence_needs_row_and_column_means():
    plan = plan_of([torch.ones(4, 4)], {"first": "fp32", "second": "fp32", "third": "factored"})
    with pytest.raises(ValueError, match="parameter 0: CAME's confidence needs a factored second moment"):
        run(TorchBackend(), "adafactor", plan, [torch.ones(4, 4)], came_hypers("paper", 1))


def test_sums_and_given_factors_agree_with_the_library():
    """APOLLO's way: row and column sums alone, and a step with scales of its own in the place of 1 / sqrt(v)."""

    def plan() -> StepPlan:
        params = [spread(shape, i, scale=1e-3) for i, shape in enumerate(CAME_SHAPES[:4])]
        made = plan_of(params, {"second": "factored"}, limiter=True)
        made.grads = came_grads(1)[:4]
        return made

    results = []
    for backend in (backend_named("torch", "adafactor"), backend_named("cpu", "adafactor")):
        hypers = came_hypers("limited", 1)
        held = [{"row": rows.clone(), "col": cols.clone()} for rows, cols in backend.sums(plan(), hypers)]
        scaled = plan()
        for rows, _ in scaled.factors:
            rows.copy_(torch.rand(len(rows), generator=torch.Generator().manual_seed(1)))
        for growth in (1.0, 3.0):
            scaled.grads = [grad * growth for grad in came_grads(1)[:4]]
            backend.adafactor_scaled(scaled, hypers)
        results.append(held + tensors_of(scaled))
    for grad, sums in zip(came_grads(1)[:4], results[0][:4], strict=True):
        assert torch.allclose(sums["row"], grad.square().reshape(len(sums["row"]), -1).sum(1), rtol=1e-5)
    assert_close(*results)
    assert any(held["limiter"] > 0 for held in results[0][4:])

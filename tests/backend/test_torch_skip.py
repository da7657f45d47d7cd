"""Steps that are skipped and gradients that are looked at, on the torch backend; screening on the CPU library too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from a8multi.backend import torch_adafactor, torch_rules, torch_step
from a8multi.backend.torch import TorchBackend
from a8multi.loader.structs import Flag, RuleKind
from a8multi.plan import StepPlan

from .plans import assert_same_bits, backend_named, plan_of, run, spread, tensors_of
from .rule_cases import CAME, CASES, DTYPES, SHAPES, came_grads, came_hypers, came_steps

# --- Skipping. ---


def quantised_steps(name: str) -> tuple[StepPlan, list[Tensor], np.ndarray]:
    """A plan whose state is not zero any more, with the gradients and hyper-parameters of its next step."""
    if name in CAME:
        plan = came_steps("torch", name, torch.bfloat16, "int8")
        return plan, came_grads(4, torch.bfloat16), came_hypers(name, 4)
    params = [spread(shape, i) for i, shape in enumerate(SHAPES)]
    plan = plan_of(params, CASES[name].formats, rule=CASES[name].kind)
    grads = [spread(shape, 10 + i) for i, shape in enumerate(SHAPES)]
    run(TorchBackend(), "elementwise", plan, grads, CASES[name].hypers(1))
    return plan, grads, CASES[name].hypers(2)


def copied(plan: StepPlan) -> list[dict[str, Tensor]]:
    return [{name: tensor.clone() for name, tensor in held.items()} for held in tensors_of(plan)]


@pytest.mark.parametrize("name", ["ademamix", "lars", "paper-limited", "gradient-limited"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_that_is_skipped_writes_nothing(name, found):
    op = "adafactor" if name in CAME else "elementwise"
    plan, grads, hypers = quantised_steps(name)
    before = copied(plan)
    grads[0].view(-1)[5] = math.nan if found else 1.0
    plan.skip = torch.tensor(found)
    run(TorchBackend(), op, plan, grads, hypers)
    taken = tensors_of(plan)

    # As on a device that is not read: the same outcome without a look at the flag on the host.
    other, _, _ = quantised_steps(name)
    hyper = torch_step.Hyper.of(hypers[0])
    for item, grad in zip(other.items, grads, strict=True):
        if op == "adafactor":
            torch_adafactor.update(item, grad, hyper, torch.tensor(bool(found)))
        else:
            torch_rules.update(item, grad, hyper, other.rule, torch.tensor(bool(found)))
    assert_same_bits(tensors_of(other), taken)
    changed = [not torch.equal(ours[n], theirs[n]) for ours, theirs in zip(taken, before, strict=True) for n in ours]
    assert any(changed) == (found == 0.0)


@pytest.mark.parametrize("name", ["adam", "ademamix", "rmsprop-all", "lamb", "lars", *CAME])
def test_nothing_is_read_back(name):
    """Tensors without values: to read one raises."""
    formats = CAME[name][1] if name in CAME else CASES[name].formats
    limiter = name in CAME and CAME[name][2]
    params = [torch.empty(130, 40, device="meta"), torch.empty(5000, device="meta", dtype=torch.bfloat16)]
    kind = RuleKind.ADAM if name in CAME else CASES[name].kind
    plan = plan_of(params, formats, rule=kind, limiter=limiter)
    plan.skip = torch.empty((), device="meta")
    flags = int(Flag.STOCHASTIC_STATE | Flag.STOCHASTIC_WRITE)
    if name in CAME:
        run(TorchBackend(), "adafactor", plan, params, came_hypers(name, 1, flags=flags))
    else:
        run(TorchBackend(), "elementwise", plan, params, CASES[name].hypers(1, flags=flags))
    plan.grads = params
    TorchBackend().screen(plan, plan.skip, torch.empty((), device="meta"), CASES["adam"].hypers(1))


# --- Screening. ---


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_gradients_are_divided_and_looked_at(backend, dtype, scale):
    grads = [spread(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    # float32 arithmetic, rounded once more to the type.
    expected = [
        grad if scale is None else (grad.float() / torch.tensor(scale)).to(dtype) for grad in map(torch.clone, grads)
    ]
    plan = plan_of([torch.zeros_like(grad) for grad in grads], {})
    plan.grads = grads
    found, divisor = torch.zeros(()), None if scale is None else torch.tensor(scale)
    arguments = plan, divisor, found, CASES["adam"].hypers(1)
    backend_named(backend, "elementwise").screen(*arguments)
    assert float(found) == 0.0
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact)
    for place, wrong in ((0, math.nan), (SHAPES[-1][0] - 1, -math.inf)):
        found.zero_()
        grads[-1][place] = wrong
        backend_named(backend, "elementwise").screen(*arguments)
        assert float(found) == 1.0
        grads[-1][place] = 0.0
    backend_named(backend, "elementwise").screen(*arguments)
    assert float(found) == 1.0, "what was found before stays"


def test_a_gradient_that_overflows_when_divided_is_found():
    grads = [torch.full((100,), 1e30)]
    plan = plan_of([torch.zeros(100)], {})
    plan.grads = grads
    found = torch.zeros(())
    TorchBackend().screen(plan, torch.tensor(1e-20), found, CASES["adam"].hypers(1))
    assert float(found) == 1.0

"""The element-wise rules in the compiled library, driven by hand-made plans.

With float32 state against numpy, operation for operation, to the bit; with every other against itself: other
instruction sets, other numbers of threads, the fast path and the general one. What the numbers mean is
judged by tests/optim.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from a8multi.backend.native import NativeBackend
from a8multi.loader import geometry
from a8multi.loader.structs import Flag, Phase, RuleKind
from a8multi.plan.step_plan import has_norm

from .native_cases import CASES, DTYPES, SIZES, Case, bytes_of, differences, hypers_of, params_of, plan_for
from .plans import canonical_sum, run, spread, tensors_of

# --- With float32 state: numpy's float32 is the same arithmetic. ---

ONE = np.float32(1)


def norm_of(values: np.ndarray) -> np.ndarray:
    size = geometry()["A8_CHUNK"]
    chunks = [canonical_sum(values[k : k + size] ** 2) for k in range(0, len(values), size)]
    return np.sqrt(canonical_sum(np.array(chunks, np.float32)))


def expected_step(case: Case, h: np.ndarray, p: np.ndarray, g: np.ndarray, m: dict[str, np.ndarray]) -> np.ndarray:
    """The new parameter; puts the new moments into ``m``."""
    zero = np.zeros_like(p)
    first, second, third = (m.get(name, zero) for name in ("first", "second", "third"))
    rule, flags, decay, size = case.rule, case.flags, ONE - h["lr"] * h["weight_decay"], h["lr"]
    if flags & Flag.MAXIMIZE:
        g = -g
    if has_norm(rule):
        decay = ONE
    elif flags & Flag.L2_DECAY:
        g, decay = g + h["weight_decay"] * p, ONE
    if rule is RuleKind.LARS:
        weight, slope = norm_of(p), norm_of(g)
        local = h["trust"] * weight / (slope + h["weight_decay"] * weight + h["eps"])
        g = (local if weight > 0 and slope > 0 else ONE) * (g + h["weight_decay"] * p if h["weight_decay"] else g)
    averaged = h["beta1"] * first + h["one_minus_beta1"] * g
    second = second + g * g if rule is RuleKind.ADAGRAD else h["beta2"] * second + h["one_minus_beta2"] * g * g
    third = h["beta3"] * third + h["one_minus_beta3"] * g
    centered = np.maximum(second - third * third, zero) if rule is RuleKind.RMSPROP else second
    root = np.sqrt(centered) * h["bias2"] + h["eps"]
    if rule is RuleKind.ADAM:
        first, u, size = averaged, averaged / root, h["lr"] * h["bias1"]
    elif rule is RuleKind.LION:
        first, u = h["beta2"] * first + h["one_minus_beta2"] * g, np.sign(averaged)
    elif rule is RuleKind.RMSPROP:
        first = u = h["beta1"] * first + g / root
    elif rule is RuleKind.ADAGRAD:
        u, size = g / root, h["lr"] * h["bias1"]
    elif rule is RuleKind.ADEMAMIX:
        first, u = averaged, (averaged * h["bias1"] + h["mix"] * third) / root
    elif rule is RuleKind.LAMB:
        with np.errstate(invalid="ignore"):  # 0 / 0 with eps = 0
            first, u = averaged, averaged * h["bias1"] / root
        u = u + h["weight_decay"] * p if h["weight_decay"] else u
        weight, length = norm_of(p), norm_of(u)
        size = h["lr"] * (weight / length if weight > 0 and length > 0 else ONE)
    else:  # SGD, LARS
        first, u = averaged, g + h["beta1"] * averaged if flags & Flag.NESTEROV else averaged
    m.update(first=first, second=second, third=third)
    return p * decay - size * u


@pytest.mark.parametrize("name", CASES)
def test_float32_state_is_numpys(name: str, native: NativeBackend) -> None:
    case = CASES[name]
    params = params_of(SIZES)
    exact = [param.numpy().copy() for param in params]
    plan = plan_for(case, params)
    moments: list[dict[str, np.ndarray]] = [{} for _ in params]
    for step in range(3):
        grads = [spread((n,), 100 * step + i).clamp_(-100, 100) for i, n in enumerate(SIZES)]
        if case.fields.get("eps") == 0.0:
            for grad in grads:
                grad[grad == 0] = 0.5  # else 0 / 0, in the reference too
        hypers = hypers_of(case)
        run(native, "elementwise", plan, grads, hypers)
        for i, grad in enumerate(grads):
            exact[i] = expected_step(case, hypers[0], exact[i], grad.numpy(), moments[i])
    for i, held in enumerate(tensors_of(plan)):
        assert np.isfinite(exact[i]).all()
        for moment, tensor in held.items():
            wanted = exact[i] if moment == "param" else moments[i][moment]
            assert (tensor.numpy() == wanted).all(), f"{moment} of {SIZES[i]} elements"


@pytest.mark.parametrize("rule", [RuleKind.LAMB, RuleKind.LARS])
@pytest.mark.parametrize("zeros", ["param", "grad"])
def test_a_zero_norm_gives_the_plain_step(rule: RuleKind, zeros: str, native: NativeBackend) -> None:
    param, grad = torch.ones(300), torch.full((300,), 0.25)
    (param if zeros == "param" else grad).zero_()
    case = Case(rule, "first second" if rule is RuleKind.LAMB else "first", {"weight_decay": 0.0})
    plan = plan_for(case, [param])
    run(native, "elementwise", plan, [grad], hypers_of(case))
    assert param.isfinite().all()
    assert bool((param != (0.0 if zeros == "param" else 1.0)).all()) == (zeros == "param")


def test_norm_and_apply_may_be_called_one_by_one(native: NativeBackend) -> None:
    case, results = CASES["lamb"], []
    for parts in ([Phase.ALL_PHASES], [Phase.NORM, Phase.APPLY]):
        plan = plan_for(case, params_of(SIZES), "int8 log8")
        plan.grads = params_of(SIZES)
        for phases in parts:
            native._step("a8_elementwise", plan, hypers_of(case), None, int(phases), scratch=plan.scratch)
        results.append(bytes_of(plan))
    assert not differences(*results)


# --- The same bits on every way. ---

FORMATS = {"int8 log8": 128, "nf4 fp32": 64, "bf16 log8": 2048, "fp32 fp32": 128}


def trained(native: NativeBackend, case: Case, formats: str, block_size: int, dtype: torch.dtype) -> Any:
    plan = plan_for(case, params_of(SIZES, dtype), formats, block_size=block_size)
    stochastic = int(Flag.STOCHASTIC_STATE | Flag.STOCHASTIC_WRITE)
    for step in range(2):
        grads = [spread((n,), 100 * step + i, dtype) for i, n in enumerate(SIZES)]
        grads[-1][700], grads[-1][1200] = math.nan, math.inf
        grads[-1][2048:4096] = 0.0
        run(native, "elementwise", plan, grads, hypers_of(case, step=step, flags=stochastic))
    return bytes_of(plan)


@pytest.mark.parametrize("name", CASES)
def test_every_variant_and_thread_count(name: str, native: NativeBackend, variants: Any) -> None:
    wanted = [
        (formats, size, dtype)
        for i, (formats, size) in enumerate(FORMATS.items())
        for dtype in (DTYPES if i == 0 else DTYPES[i % 3 : i % 3 + 1])
    ]
    expected: list[Any] = []
    for isa in variants():
        found = [trained(native, CASES[name], *one) for one in wanted]
        assert native.isa_ran == isa, "the forced variant did not run"
        expected = expected or found
        for one, ours, theirs in zip(wanted, found, expected, strict=True):
            assert not differences(ours, theirs), f"{isa} with {torch.get_num_threads()} threads: {one}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("write", [Flag(0), Flag.STOCHASTIC_WRITE], ids=["nearest", "stochastic"])
def test_the_fast_path_has_the_bits_of_the_general_one(
    name: str, dtype: torch.dtype, write: Flag, native: NativeBackend, variants: Any
) -> None:
    """float16 gradients go the general way; all three types hold these."""
    case, sizes = CASES[name], (128, 500, 16640)
    flags = int(Flag.STOCHASTIC_STATE | write)
    for isa in variants():
        if torch.get_num_threads() > 1:
            continue
        found = {}
        for grad_dtype in DTYPES:
            plan = plan_for(case, params_of(sizes, dtype), "int8 log8", grad_dtype=grad_dtype)
            for step in range(2):
                grads = [spread((n,), 100 * step + i, torch.bfloat16).clamp_(-8, 8) for i, n in enumerate(sizes)]
                for grad in grads:
                    grad[grad.abs() < 2.0**-6] = 0.0
                grads[-1][130], grads[-1][300] = math.nan, -math.inf  # in one block each
                grads[-1][512:1024] = 0.0
                assert all(torch.equal(grad.half().bfloat16().nan_to_num(), grad.nan_to_num()) for grad in grads)
                run(
                    native,
                    "elementwise",
                    plan,
                    [g.to(grad_dtype) for g in grads],
                    hypers_of(case, step=step, flags=flags),
                )
            found[grad_dtype] = bytes_of(plan)
        for grad_dtype in DTYPES[:2]:
            assert not differences(found[grad_dtype], found[torch.float16]), f"{isa}, {grad_dtype} gradients"

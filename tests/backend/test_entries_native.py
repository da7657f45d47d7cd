"""What the entries of the compiled library do besides stepping: skip, screen gradients, refuse arguments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from a8multi.backend import marshal
from a8multi.backend.native import NativeBackend
from a8multi.errors import NativeError
from a8multi.loader.structs import Format, Phase, RuleKind
from a8multi.plan import StepPlan

from .native_cases import CASES, DTYPES, SIZES, bytes_of, differences, hypers_of, params_of, plan_for
from .plans import plan_of, run, spread

# --- Skipping and screening. ---


@pytest.mark.parametrize("op", ["elementwise", "adafactor"])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_a_skipped_step_writes_nothing(op: str, skip: float, native: NativeBackend) -> None:
    case = CASES["lamb"]
    params = [spread((130, 70), 0), spread((5000,), 1)]
    formats = {"first": "int8", "second": "log8" if op == "elementwise" else "factored"}
    plan = plan_of(params, formats, rule=case.rule, limiter=op == "adafactor")
    before = bytes_of(plan)
    plan.skip = torch.tensor(skip)
    run(native, op, plan, [spread(param.shape, 7) for param in params], hypers_of(case, growth=1.0, bias2=1.0))
    changed = [new[name] != old[name] for new, old in zip(bytes_of(plan), before, strict=True) for name in old]
    assert not any(changed) if skip else all(changed)


def screened(native: NativeBackend, grads: Sequence[Tensor], scale: float | None, found: float = 0.0) -> float:
    plan = plan_of([torch.zeros_like(grad) for grad in grads], {})
    plan.grads = list(grads)
    flag = torch.tensor(found)
    native.screen(plan, None if scale is None else torch.tensor(scale), flag, hypers_of(CASES["sgd"]))
    return float(flag)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 3.0, 65536.0])
def test_gradients_are_divided_once(
    dtype: torch.dtype, scale: float | None, native: NativeBackend, variants: Any
) -> None:
    for isa in variants():
        grads = [spread((n,), i, dtype) for i, n in enumerate(SIZES)]
        for grad in grads:
            grad[grad.abs() < 1e-2] = 0.0  # else subnormal when divided, which are flushed
        exact = [grad.clone() if scale is None else (grad.float() / scale).to(dtype) for grad in grads]
        assert screened(native, grads, scale) == 0.0
        assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True)), isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_wrong_gradient_is_found_anywhere(
    dtype: torch.dtype, wrong: float, native: NativeBackend, variants: Any
) -> None:
    places = [(i, at) for i, n in enumerate(SIZES) for at in sorted({0, n // 2, n - 1})]
    for number, isa in enumerate(variants()):
        for i, at in places[number::3] if number else places:
            grads = [torch.ones(n, dtype=dtype) for n in SIZES]
            grads[i][at] = wrong
            assert screened(native, grads, 2.0 if number else None) == 1.0, f"{isa}: {at} of {SIZES[i]}"
            assert sum(int((grad == (0.5 if number else 1.0)).sum()) for grad in grads) == sum(SIZES) - 1


def test_what_overflows_in_the_division_is_found(native: NativeBackend) -> None:
    for grad in (torch.full((200,), 1e30), torch.full((200,), 1e30).bfloat16(), torch.full((200,), 6e4).half()):
        assert screened(native, [grad], 1e-10) == 1.0
        assert grad.isinf().all()
    assert screened(native, [torch.full((200,), 6e4).half()], 0.9) == 1.0, "finite in float32, not in float16"
    assert screened(native, [torch.ones(200)], 2.0, found=1.0) == 1.0, "what was found before stays"


# --- Arguments. ---

FACTORED = {"first": "fp32", "second": "factored", "third": "factored"}
# A field of the second tensor, a value that it must not have, and the message.
WRONG = {
    "param": ("adam", 0, "param is null"),
    "grad": ("adam", 2, "grad is null or not aligned"),
    "param_dtype": ("adam", 3, "unknown param_dtype 3"),
    "grad_dtype": ("adam", 3, "unknown grad_dtype 3"),
    "numel": ("adam", 0, "numel is 0"),
    "hyper": ("adam", 1, "hyper 1 of 1"),
    "chunks": ("adam", 2, "chunks do not match numel"),
    "limiter": ("adam", 64, "limiter is not null, but element-wise rules have none"),
    "first_format": ("adam", int(Format.NONE), "rule 0 has no first_format 0"),
    "second_format": ("adam", int(Format.INT8), "rule 0 has no second_format 3"),
    "third_format": ("adam", int(Format.STATE_F32), "rule 0 has no third_format 1"),
    "first_block": ("ademamix", 0, "first_block is null"),
    "second": ("ademamix", 0, "second is null"),
    "third": ("ademamix", 0, "third is null"),
    "third_block": ("ademamix", 2, "third_block is null or not aligned"),
    "third_block_size": ("ademamix", 100, "third_block_size 100 is not a power of two"),
    "second_block_size": ("ademamix", 16, "second_block_size 16 is not a power of two"),
    "sum_at": ("lamb", 1 << 20, "the sums at sum_at 1048576 are outside the scratch"),
}
WRONG_FACTORED = {
    "limiter": (2, "limiter is not aligned"),
    "first_format": (int(Format.FACTORED), "Adafactor has no first_format 6"),
    "second_format": (int(Format.NONE), "Adafactor has no second_format 0"),
    "third_format": (int(Format.INT8), "Adafactor has no third_format 3"),
    "second_block": (0, "second_block is null"),
    "third": (2, "third is null or not aligned"),
    "third_block": (0, "third_block is null"),
    "residual_at": (-4, "the sums at residual_at -4 are outside the scratch"),
    "row_at": (1 << 40, "the sums at row_at 1099511627776 are outside the scratch"),
    "rows": (3, "rows 3 x cols 70 is not numel"),
}


def refused(native: NativeBackend, op: str, plan: StepPlan, field: str, value: int) -> str:
    """The message, after an assertion that nothing was written."""
    plan.grads = [spread(item.param.shape, 5) for item in plan.items]
    plan.address()
    assert plan.scratch.numel(), "made for the right fields"
    plan.tensors[field][1] = value
    before = bytes_of(plan)
    with pytest.raises(NativeError) as caught:
        getattr(native, op)(plan, hypers_of(CASES["adam"]))
    assert not differences(bytes_of(plan), before)
    return str(caught.value)


@pytest.mark.parametrize("field", WRONG)
def test_wrong_fields_are_named(field: str, native: NativeBackend) -> None:
    name, value, words = WRONG[field]
    message = refused(native, "elementwise", plan_for(CASES[name], params_of((40, 300)), "int8 log8"), field, value)
    assert f"tensor 1: {words}" in message


@pytest.mark.parametrize("field", WRONG_FACTORED)
def test_wrong_fields_of_a_factored_tensor_are_named(field: str, native: NativeBackend) -> None:
    value, words = WRONG_FACTORED[field]
    plan = plan_of([spread((30, 50), 0), spread((30, 70), 1)], FACTORED, limiter=True)
    assert f"tensor 1: {words}" in refused(native, "adafactor", plan, field, value)


NEEDED = {
    RuleKind.ADAM: "first second",
    RuleKind.LION: "first",
    RuleKind.RMSPROP: "second",
    RuleKind.SGD: "",
    RuleKind.ADAGRAD: "second",
    RuleKind.ADEMAMIX: "first second third",
    RuleKind.LAMB: "first second",
    RuleKind.LARS: "",
}
OPTIONAL = {RuleKind.RMSPROP: "first third", RuleKind.SGD: "first", RuleKind.LARS: "first"}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_takes_the_moments_that_it_has(name: str, native: NativeBackend) -> None:
    """With every set of moments: run where the rule has them or can do without, else refused."""
    needed = set(NEEDED[CASES[name].rule].split())
    rule = CASES[name].rule
    allowed = needed | set(OPTIONAL.get(rule, "").split())
    for bits in range(8):
        moments = {moment for i, moment in enumerate(("first", "second", "third")) if bits >> i & 1}
        plan = plan_of([torch.ones(10)], {m: "log8" if m == "second" else "int8" for m in sorted(moments)}, rule=rule)
        if needed <= moments <= allowed:
            run(native, "elementwise", plan, [torch.ones(10)], hypers_of(CASES[name]))
        else:
            with pytest.raises(NativeError, match=rf"tensor 0: rule {int(rule)} has no (first|second|third)_format"):
                run(native, "elementwise", plan, [torch.ones(10)], hypers_of(CASES[name]))


def test_wrong_batches_are_refused(native: NativeBackend) -> None:
    plan = plan_for(CASES["lamb"], params_of((40, 300)))
    plan.grads = params_of((40, 300))
    hypers, found = hypers_of(CASES["lamb"]), torch.zeros(2)

    def call(entry: str, *more: Any, scratch: Tensor | None = plan.scratch, **fields: Any) -> None:
        batch, _ = marshal.batch_of(plan, hypers)
        for name, value in fields.items():
            setattr(batch, name, value)
        native._call(entry, native._where(plan.device, scratch), ctypes.byref(batch), *more)

    call("a8_elementwise", int(Phase.ALL_PHASES))
    call("a8_screen", None, found.data_ptr(), hypers=None, rule=99)
    call("a8_elementwise", int(Phase.ALL_PHASES), tensor_count=0, chunk_count=0)
    for words, entry, arguments, fields in (
        ("rule 8 is unknown", "a8_elementwise", (1,), {"rule": 8}),
        ("phases 0x80", "a8_elementwise", (128,), {}),
        ("outside the scratch", "a8_elementwise", (1,), {"scratch": None}),
        ("skip is not aligned", "a8_elementwise", (1,), {"skip": found.data_ptr() + 1}),
        ("a table of the batch is null", "a8_elementwise", (1,), {"hypers": None}),
        ("a table of the batch is null", "a8_elementwise", (1,), {"chunks": None}),
        ("chunk 0 is outside its tensor", "a8_elementwise", (1,), {"tensor_count": 0}),
        ("found is null", "a8_screen", (None, None), {}),
        ("not aligned to 4 bytes", "a8_screen", (found.data_ptr() + 2, found.data_ptr()), {}),
        ("a table of the batch is null", "a8_screen", (None, found.data_ptr()), {"tensors": None}),
        ("chunk 1 is outside its tensor", "a8_screen", (None, found.data_ptr()), {"tensor_count": 1}),
    ):
        with pytest.raises(NativeError, match=words):
            call(entry, *arguments, **fields)

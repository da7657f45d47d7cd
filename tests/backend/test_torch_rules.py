"""The torch backend's element-wise rules: against float64 references, and beside the compiled CPU library.

To the bit, but for rules whose sums over a tensor the two add in another order.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import adam, rules
from torch import Tensor

from a8multi.backend import torch_step
from a8multi.backend.torch import TorchBackend
from a8multi.loader.structs import Flag, RuleKind

from .plans import assert_close, assert_same_bits, plan_of, relative_error, run, tensors_of
from .rule_cases import CASES, DTYPES, EXACT, SUMMED, trained


@pytest.mark.parametrize("name", CASES)
def test_a_rule_with_float32_state_is_the_papers(name):
    one = CASES[name]
    param = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    start = param.double()
    plan = plan_of([param], dict.fromkeys(one.formats, "fp32"), rule=one.kind)
    exact: Tensor = start
    moments: Any = rules.zeros(start) if one.kind != RuleKind.ADAM else adam.Moments(start * 0, start * 0)
    for step in range(1, 13):
        grad = torch.randn(3000, generator=torch.Generator().manual_seed(step)) * 0.1
        run(TorchBackend(), "elementwise", plan, [grad], one.hypers(step))
        exact, moments = one.reference(exact, grad.double(), moments, step, **one.options)
    # The centered variance is a difference: it loses a few bits.
    assert relative_error(param, exact, start) < (3e-5 if one.options.get("centered") else 1e-5)
    held = tensors_of(plan)[0]
    for moment in one.formats:
        assert relative_error(held[moment], getattr(moments, moment)) < 1e-5, moment


# --- Beside the library. ---


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("flags", [Flag(0), Flag.MAXIMIZE | Flag.STOCHASTIC_STATE | Flag.STOCHASTIC_WRITE], ids=int)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rule_has_the_bits_of_the_library(name, flags, dtype):
    grad_dtype = torch.bfloat16 if dtype is torch.float32 else dtype
    options = {"param_dtype": dtype, "grad_dtype": grad_dtype, "flags": int(flags), "seed_high": 1 << 31}
    assert_same_bits(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("format_name", ["nf4", "bf16", "fp32"])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_a_rule_has_the_bits_of_the_library_for_every_format(name, format_name, block_size):
    second = "fp32" if format_name == "fp32" else "log8"
    formats = {moment: second if moment == "second" else format_name for moment in CASES[name].formats}
    options = {"formats": formats, "block_size": block_size}
    assert_same_bits(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("scale", [1e-18, 1e-37, 1e-42, 1e30])
def test_a_rule_has_the_bits_of_the_library_near_the_ends_of_the_range(name, scale):
    for formats in (None, dict.fromkeys(CASES[name].formats, "fp32")):
        options = {"formats": formats, "scale": scale}
        assert_same_bits(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_rule_has_the_bits_of_the_library_for_non_finite_gradients(name, wrong):
    options = {"wrong": wrong, "flags": int(Flag.STOCHASTIC_STATE)}
    assert_same_bits(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rule_with_norms_agrees_with_the_library(name, dtype):
    options = {"param_dtype": dtype, "formats": dict.fromkeys(CASES[name].formats, "fp32"), "scale": 1e-2}
    assert_close(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))
    options |= {"formats": None, "flags": int(Flag.MAXIMIZE)}
    assert_close(trained("torch", CASES[name], **options), trained("cpu", CASES[name], **options))


@pytest.mark.parametrize("name", CASES)
def test_slices_do_not_matter(name, monkeypatch):
    expected = trained("torch", CASES[name], flags=int(Flag.STOCHASTIC_STATE))
    monkeypatch.setattr(torch_step, "SLICE", 4096)
    check = assert_same_bits if name in EXACT else assert_close
    check(trained("torch", CASES[name], flags=int(Flag.STOCHASTIC_STATE)), expected)


def test_a_factored_moment_is_refused():
    plan = plan_of([torch.ones(4, 4)], {"first": "fp32", "second": "factored"})
    with pytest.raises(ValueError, match="parameter 0: an element-wise step takes no factored moment"):
        run(TorchBackend(), "elementwise", plan, [torch.ones(4, 4)], CASES["adam"].hypers(1))

"""Element-wise rules with their hyper-parameters, and the compiled CPU library to run them.

For the tests that drive it with hand-made plans. The fixtures reach the tests through conftest.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import a8multi
from a8multi import settings
from a8multi.backend.native import NativeBackend
from a8multi.loader.structs import Flag, RuleKind
from a8multi.plan import StepPlan
from a8multi.plan.step_plan import HYPER

from .plans import plan_of, spread, tensors_of

# Less than a block, one block and its neighbours, a chunk and its neighbours, two. None so large that torch makes the
# data with several threads: its last place would depend on their number.
SIZES = (1, 33, 127, 128, 129, 4096, 16383, 16384, 16385, 32700)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """A rule with its moments and what of ``a8_hyper`` is not as in ``FIELDS``."""

    rule: RuleKind
    moments: str
    fields: Mapping[str, float] = MappingProxyType({})
    flags: Flag = Flag(0)


FIELDS = {
    "lr": 0.02,
    "beta1": 0.9,
    "one_minus_beta1": 0.1,
    "beta2": 0.95,
    "one_minus_beta2": 0.05,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "bias1": 1.25,
    "bias2": 1.125,
    "mix": 2.0,
    "trust": 0.5,
    "step": 3,
    "seed_low": 1,
    "seed_high": 2,
}
NO_MOMENTUM = {"beta1": 0.0, "one_minus_beta1": 1.0}
SLOW = {"beta3": 0.99, "one_minus_beta3": 0.01}
CASES = {
    "adam": Case(RuleKind.ADAM, "first second"),
    "adam l2": Case(RuleKind.ADAM, "first second", flags=Flag.L2_DECAY),
    "lion": Case(RuleKind.LION, "first"),
    "lion maximize": Case(RuleKind.LION, "first", flags=Flag.MAXIMIZE),
    "rmsprop": Case(RuleKind.RMSPROP, "second", NO_MOMENTUM, Flag.L2_DECAY | Flag.MAXIMIZE),
    "rmsprop momentum": Case(RuleKind.RMSPROP, "first second"),
    "rmsprop centered": Case(RuleKind.RMSPROP, "first second third", SLOW, Flag.L2_DECAY),
    "sgd": Case(RuleKind.SGD, "", NO_MOMENTUM),
    "sgd momentum": Case(RuleKind.SGD, "first", flags=Flag.L2_DECAY),
    "sgd nesterov": Case(RuleKind.SGD, "first", {"one_minus_beta1": 1.0}, Flag.NESTEROV | Flag.MAXIMIZE),
    "adagrad": Case(RuleKind.ADAGRAD, "second", {}, Flag.MAXIMIZE),
    "ademamix": Case(RuleKind.ADEMAMIX, "first second third", SLOW, Flag.MAXIMIZE),
    "lamb": Case(RuleKind.LAMB, "first second", {}, Flag.MAXIMIZE),
    "lamb no decay": Case(RuleKind.LAMB, "first second", {"weight_decay": 0.0, "eps": 0.0}),
    "lars": Case(RuleKind.LARS, "first"),
    "lars nesterov": Case(RuleKind.LARS, "first", {"weight_decay": 0.0}, Flag.NESTEROV),
    "lars no momentum": Case(RuleKind.LARS, "", NO_MOMENTUM),
}


@pytest.fixture
def native() -> Iterator[NativeBackend]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with a8multi.use_backend("cpu"):
        backend = a8multi.backend_for("cpu")
        assert isinstance(backend, NativeBackend)
        yield backend
    torch.set_num_threads(threads)


@pytest.fixture
def variants(native: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Iterator[str]]:
    """Every usable instruction set, or the forced one, with 1, 2 and 3 threads; each is set up while it is yielded."""

    def each() -> Iterator[str]:
        forced = settings.cpu_isa()
        for isa in native.library.info.isa_usable if forced == "auto" else [forced]:
            with monkeypatch.context() as patch:
                patch.setenv(settings.CPU_ISA.name, isa)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    yield isa

    return each


def hypers_of(case: Case, **more: float) -> np.ndarray:
    table = np.zeros(1, HYPER)
    for name, value in {**FIELDS, **case.fields, **more}.items():
        table[name] = value
    table["flags"] = int(case.flags | int(more.get("flags", 0)))
    return table


def plan_for(case: Case, params: Sequence[Tensor], formats: str = "fp32 fp32", **options: Any) -> StepPlan:
    """formats: of the first and third moment, and of the second."""
    linear, square = formats.split()
    held = {name: square if name == "second" else linear for name in case.moments.split()}
    return plan_of(params, held, rule=case.rule, **options)


def params_of(sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [spread((n,), i, dtype).clamp_(-100, 100) for i, n in enumerate(sizes)]


def bytes_of(plan: StepPlan) -> list[dict[str, bytes]]:
    """Of parameters and states; one NaN is like another."""

    def data(tensor: Tensor) -> bytes:
        if tensor.is_floating_point():
            tensor = tensor.masked_fill(tensor.isnan(), math.nan)
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    return [{name: data(tensor) for name, tensor in one.items()} for one in tensors_of(plan)]


def differences(ours: list[dict[str, bytes]], theirs: list[dict[str, bytes]]) -> list[str]:
    """Which tensors differ."""
    pairs = list(zip(ours, theirs, strict=True))
    return [
        f"{name} of parameter {i}" for i, (a, b) in enumerate(pairs) for name in a | b if a.get(name) != b.get(name)
    ]

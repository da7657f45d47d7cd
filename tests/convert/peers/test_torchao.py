"""From torchao itself: its moments by its own dequantiser, and its own next step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchao.optim
from convert.jobs import FP32, ROUNDING, STEPS, Job, assert_moment, carried, trained, update_error
from optim.helpers import parameters

import a8multi

NAMES = ("exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    """Its step is compiled for every shape, which takes minutes; the arithmetic is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _assert_moments(job: Job) -> None:
    for number, param in enumerate(job.params):
        theirs = job.peer.state[param]
        assert job.ours.state[job.twins[number]]["step"] == STEPS
        for name in NAMES:
            value = theirs[name]
            assert_moment(job, number, name, value.dequantize() if hasattr(value, "block_size") else value)


RULES: dict[str, tuple[Any, Any]] = {
    "8-bit adamw": (torchao.optim.AdamW8bit, a8multi.AdamW8bit),
    "8-bit adam": (torchao.optim.Adam8bit, a8multi.Adam8bit),
    "4-bit adamw": (torchao.optim.AdamW4bit, a8multi.AdamW8bit),
    "fp8 adamw": (torchao.optim.AdamWFp8, a8multi.AdamW8bit),
}
OPTIONS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


@pytest.mark.parametrize(("theirs", "ours"), RULES.values(), ids=RULES.keys())
def test_float32_state_is_the_same_and_so_is_the_next_update(theirs: Any, ours: Any) -> None:
    job = carried("torchao", lambda params: theirs(params, **OPTIONS), lambda params: ours(params, **FP32))
    assert type(job.peer.state[job.params[0]]["exp_avg"]).__module__.startswith("torchao.")
    assert type(job.ours.param_groups[0]["lr"]) is float
    _assert_moments(job)
    assert update_error(job) <= ROUNDING


def test_eight_bits() -> None:
    job = carried("torchao", torchao.optim.AdamW8bit, a8multi.AdamW8bit)
    _assert_moments(job)
    assert update_error(job) <= 0.04


def test_parameters_in_sixteen_bits() -> None:
    """Those that are not quantised have their moments in the parameter's type."""
    job = carried(
        "torchao", torchao.optim.AdamW8bit, lambda params: a8multi.AdamW8bit(params, **FP32), dtype=torch.bfloat16
    )
    assert job.peer.state[job.params[3]]["exp_avg"].dtype is torch.bfloat16
    _assert_moments(job)


def test_amsgrad_is_refused() -> None:
    peer, params = trained(lambda params: torchao.optim.AdamW8bit(params, amsgrad=True), [(129,)])
    with pytest.raises(a8multi.StateFormatError, match=r"parameter 0, .*max_exp_avg_sq: amsgrad"):
        a8multi.convert_state_dict(peer.state_dict(), "torchao", optimizer=a8multi.AdamW8bit(params))


def test_as_torch_it_is_refused() -> None:
    peer, _ = trained(torchao.optim.AdamW8bit, [(4096,)])
    with pytest.raises(a8multi.StateFormatError, match=r"OptimState8bit.*cannot be read.*source"):
        a8multi.convert_state_dict(peer.state_dict(), "torch", optimizer=a8multi.AdamW8bit(parameters([(4096,)])))

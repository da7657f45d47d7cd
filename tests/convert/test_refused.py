"""What cannot be carried over is named: which parameter, which entry, why, and what to do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from convert.jobs import trained
from convert.refusals import SHAPES, assert_says, refusal, saved_by
from optim.helpers import parameters
from torch import Tensor

import a8multi


def test_amsgrad() -> None:
    message = refusal(saved_by(lambda params: torch.optim.AdamW(params, amsgrad=True)))
    assert_says(message, "max_exp_avg_sq", "param_groups[0]['params'][0]", "(129,)", "amsgrad=False")


def test_amsgrad_without_state() -> None:
    saved = torch.optim.AdamW(parameters(SHAPES), amsgrad=True).state_dict()
    assert_says(refusal(saved), "param_groups[0]", "amsgrad=True", "AdamW8bit has no such option")


@pytest.mark.parametrize(
    ("make", "ours", "words"),
    [
        (torch.optim.AdamW, a8multi.Adafactor8bit, ("options of adam", "adafactor")),
        (torch.optim.Adafactor, a8multi.AdamW8bit, ("options of adafactor", "adam")),
        (torch.optim.RAdam, a8multi.AdamW8bit, ("no optimizer of torch that can be carried", "Known: adam")),
        (torch.optim.NAdam, a8multi.AdamW8bit, ("no optimizer of torch",)),
        (torch.optim.Adamax, a8multi.AdamW8bit, ("no optimizer of torch",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_rule(make: Any, ours: Any, words: tuple[str, ...]) -> None:
    assert_says(refusal(saved_by(make), ours=ours), "param_groups[0]", *words)


@pytest.mark.parametrize(
    ("make", "ours"),
    [(torch.optim.Adam, a8multi.AdamW8bit), (torch.optim.AdamW, a8multi.Adam8bit)],
    ids=["L2", "decoupled"],
)
def test_another_weight_decay(make: Any, ours: Any) -> None:
    assert_says(refusal(saved_by(lambda params: make(params, weight_decay=0.1)), ours=ours), "weight_decay=0.1", "L2")
    saved = saved_by(lambda params: make(params, weight_decay=0.0))
    assert a8multi.convert_state_dict(saved, "torch", optimizer=ours(parameters(SHAPES)))["state"]


def test_an_option_that_is_not_valid_here() -> None:
    saved = saved_by(torch.optim.AdamW)
    saved["param_groups"][0]["betas"] = (0.9, 1.5)
    assert_says(refusal(saved), "param_groups[0]", "betas[1]", "1.5")


def _an_unknown_entry(state: Any) -> None:
    state["history"] = torch.zeros(3)


def _a_step_that_is_none(state: Any) -> None:
    state["step"] = torch.tensor(2.5)


def _a_step_of_words(state: Any) -> None:
    state["step"] = "3"


def _a_step_not_a_number(state: Any) -> None:
    state["step"] = math.nan


def _an_infinite_step(state: Any) -> None:
    state["step"] = torch.tensor(math.inf)


def _no_step(state: Any) -> None:
    del state["step"]


def _another_shape(state: Any) -> None:
    state["exp_avg"] = state["exp_avg"].t()


def _sparse(state: Any) -> None:
    state["exp_avg"] = state["exp_avg"].to_sparse()


def _no_first_moment(state: Any) -> None:
    del state["exp_avg"]


def _negative(state: Any) -> None:
    state["exp_avg_sq"] = -state["exp_avg_sq"]


def _nan_squares(state: Any) -> None:
    state["exp_avg_sq"][3, 4] = math.nan


def _an_infinite_average(state: Any) -> None:
    state["exp_avg"][3, 4] = -math.inf


class _Subclass(Tensor):
    """As another package's state."""


def _a_subclass(state: Any) -> None:
    state["exp_avg"] = state["exp_avg"].as_subclass(_Subclass)


class _Distributed(Tensor):
    def full_tensor(self) -> Tensor:
        raise NotImplementedError


def _a_part(state: Any) -> None:
    state["exp_avg"] = state["exp_avg"].as_subclass(_Distributed)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_an_unknown_entry, ("history", "nothing that can be carried")),
        (_a_step_that_is_none, ("step", "2.5")),
        (_a_step_of_words, ("step", "'3'", "not a finite number")),
        (_a_step_not_a_number, ("step", "nan", "not a finite number")),
        (_an_infinite_step, ("step", "inf", "not a finite number")),
        (_no_step, ("step", "is not there", "exp_avg")),
        (_another_shape, ("exp_avg", "(9, 8)")),
        (_sparse, ("exp_avg", "torch.sparse_coo", "Sparse")),
        (_no_first_moment, ("first moment", "there is none")),
        (_negative, ("second moment", "negative")),
        (_nan_squares, ("second moment", "not finite", "starts anew")),
        (_an_infinite_average, ("first moment", "not finite")),
        (_a_subclass, ("exp_avg", "_Subclass", "source")),
        (_a_part, ("exp_avg", "DTensor", "full_state_dict")),
    ],
)
def test_state_that_cannot_be_read(spoil: Any, words: tuple[str, ...]) -> None:
    saved = saved_by(torch.optim.AdamW)
    spoil(saved["state"][1])
    assert_says(refusal(saved), "parameter 1", "(8, 9)", *words)


def test_factors_of_another_shape() -> None:
    saved = saved_by(torch.optim.Adafactor)
    saved["state"][1]["row_var"] = saved["state"][1]["row_var"][:3]
    assert_says(refusal(saved, ours=a8multi.Adafactor8bit), "row_var", "(3, 1)", "(8, 1)")


@pytest.mark.parametrize(("value", "word"), [(math.nan, "not finite"), (-1.0, "negative")])
def test_factors_that_are_none(value: float, word: str) -> None:
    saved = saved_by(torch.optim.Adafactor)
    saved["state"][1]["col_var"][0, 4] = value
    assert_says(refusal(saved, ours=a8multi.Adafactor8bit), "parameter 1", "second moment", word)


def test_factors_of_a_vector() -> None:
    saved = saved_by(torch.optim.Adafactor)
    saved["state"][0] = saved["state"][1]
    assert_says(refusal(saved, ours=a8multi.Adafactor8bit), "parameter 0", "row_var, col_var", "nothing that can be")


def test_other_parameters() -> None:
    saved = copy.deepcopy(trained(torch.optim.AdamW, SHAPES[:1])[0].state_dict())
    assert_says(refusal(saved), "[1]", "[2]", "same order")


def test_state_of_no_parameter() -> None:
    saved = saved_by(torch.optim.AdamW)
    saved["state"]["layer.weight"] = {"step": 1}
    assert_says(refusal(saved), "'layer.weight'", "no parameter")


def test_what_is_no_state_dict() -> None:
    assert_says(refusal({"optimizer": {}}), "'state' and 'param_groups'", "'optimizer'")
    assert_says(refusal([1]), "list")


def _no_params(saved: Any) -> None:
    del saved["param_groups"][0]["params"]


def _a_number_of_params(saved: Any) -> None:
    saved["param_groups"][0]["params"] = 2


def _a_list_for_a_group(saved: Any) -> None:
    saved["param_groups"][0] = [0, 1]


def _no_groups(saved: Any) -> None:
    saved["param_groups"] = None


def _no_state(saved: Any) -> None:
    saved["state"] = None


def _a_tensor_for_a_state(saved: Any) -> None:
    saved["state"][1] = torch.zeros(2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_params, ("param_groups[0]: params: is not there", "lr")),
        (_a_number_of_params, ("param_groups[0]['params']: is a int",)),
        (_a_list_for_a_group, ("param_groups[0]: is a list",)),
        (_no_groups, ("param_groups: is a NoneType",)),
        (_no_state, ("state: is a NoneType",)),
        (_a_tensor_for_a_state, ("state[1]: is a Tensor",)),
    ],
)
def test_a_state_dict_that_is_not_intact(spoil: Any, words: tuple[str, ...]) -> None:
    saved = saved_by(torch.optim.AdamW)
    spoil(saved)
    assert_says(refusal(saved), "source='torch'", *words)


@pytest.mark.parametrize("lr", ["1e-3", None, torch.ones(2)], ids=repr)
def test_a_learning_rate_that_is_none(lr: Any) -> None:
    saved = saved_by(torch.optim.AdamW)
    saved["param_groups"][0]["lr"] = lr
    assert_says(refusal(saved), "param_groups[0]", "lr: ", "is not a number")


def test_arguments() -> None:
    params = parameters(SHAPES)
    with pytest.raises(ValueError, match="source must be one of torch, bitsandbytes, torchao, adafactor8bit, not 'hf'"):
        a8multi.convert_state_dict({}, "hf", optimizer=a8multi.AdamW8bit(params))
    with pytest.raises(TypeError, match="optimizer must be an optimizer of a8multi"):
        a8multi.convert_state_dict({}, "torch", optimizer=torch.optim.AdamW(params))
    with pytest.raises(TypeError, match="built over the parameters"):
        a8multi.convert_state_dict({}, "torch", optimizer=a8multi.AdamW8bit)

"""What cannot be carried over is named: which parameter, which entry, why, and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convert.jobs import trained
from optim.helpers import parameters
from torch import Tensor

import a8multi

SHAPES = ((129,), (8, 9))


def _saved(make: Callable[..., Any]) -> Any:
    return copy.deepcopy(trained(make, SHAPES)[0].state_dict())


def _refusal(saved: Any, source: str = "torch", ours: Callable[..., Any] = a8multi.AdamW8bit) -> str:
    with pytest.raises(a8multi.StateFormatError) as caught:
        a8multi.convert_state_dict(saved, source, optimizer=ours(parameters(SHAPES)))
    return str(caught.value)


def _assert_says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message


def test_amsgrad() -> None:
    message = _refusal(_saved(lambda params: torch.optim.AdamW(params, amsgrad=True)))
    _assert_says(message, "max_exp_avg_sq", "param_groups[0]['params'][0]", "(129,)", "amsgrad=False")


def test_amsgrad_without_state() -> None:
    saved = torch.optim.AdamW(parameters(SHAPES), amsgrad=True).state_dict()
    _assert_says(_refusal(saved), "param_groups[0]", "amsgrad=True", "AdamW8bit has no such option")


@pytest.mark.parametrize(
    ("make", "ours", "words"),
    [
        (torch.optim.AdamW, a8multi.Adafactor8bit, ("options of adam", "adafactor")),
        (torch.optim.Adafactor, a8multi.AdamW8bit, ("options of adafactor", "adam")),
        (torch.optim.RAdam, a8multi.AdamW8bit, ("no optimizer of torch that can be carried", "Known: adam")),
        (torch.optim.NAdam, a8multi.AdamW8bit, ("no optimizer of torch",)),
        (torch.optim.Adamax, a8multi.AdamW8bit, ("no optimizer of torch",)),
        (a8multi.AdamW8bit, a8multi.AdamW8bit, ("no optimizer of torch",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_rule(make: Any, ours: Any, words: tuple[str, ...]) -> None:
    _assert_says(_refusal(_saved(make), ours=ours), "param_groups[0]", *words)


@pytest.mark.parametrize(
    ("make", "ours"),
    [(torch.optim.Adam, a8multi.AdamW8bit), (torch.optim.AdamW, a8multi.Adam8bit)],
    ids=["L2", "decoupled"],
)
def test_another_weight_decay(make: Any, ours: Any) -> None:
    _assert_says(_refusal(_saved(lambda params: make(params, weight_decay=0.1)), ours=ours), "weight_decay=0.1", "L2")
    saved = _saved(lambda params: make(params, weight_decay=0.0))
    assert a8multi.convert_state_dict(saved, "torch", optimizer=ours(parameters(SHAPES)))["state"]


def test_an_option_that_is_not_valid_here() -> None:
    saved = _saved(torch.optim.AdamW)
    saved["param_groups"][0]["betas"] = (0.9, 1.5)
    _assert_says(_refusal(saved), "param_groups[0]", "betas[1]", "1.5")


def _an_unknown_entry(state: Any) -> None:
    state["history"] = torch.zeros(3)


def _a_step_that_is_none(state: Any) -> None:
    state["step"] = torch.tensor(2.5)


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
        (_no_step, ("step", "is not there", "exp_avg")),
        (_another_shape, ("exp_avg", "(9, 8)")),
        (_sparse, ("exp_avg", "torch.sparse_coo", "Sparse")),
        (_no_first_moment, ("first moment", "there is none")),
        (_negative, ("second moment", "negative")),
        (_a_subclass, ("exp_avg", "_Subclass", "source")),
        (_a_part, ("exp_avg", "DTensor", "full_state_dict")),
    ],
)
def test_state_that_cannot_be_read(spoil: Any, words: tuple[str, ...]) -> None:
    saved = _saved(torch.optim.AdamW)
    spoil(saved["state"][1])
    _assert_says(_refusal(saved), "parameter 1", "(8, 9)", *words)


def test_factors_of_another_shape() -> None:
    saved = _saved(torch.optim.Adafactor)
    saved["state"][1]["row_var"] = saved["state"][1]["row_var"][:3]
    _assert_says(_refusal(saved, ours=a8multi.Adafactor8bit), "row_var", "(3, 1)", "(8, 1)")


def test_factors_of_a_vector() -> None:
    saved = _saved(torch.optim.Adafactor)
    saved["state"][0] = saved["state"][1]
    _assert_says(_refusal(saved, ours=a8multi.Adafactor8bit), "parameter 0", "row_var, col_var", "nothing that can be")


def test_other_parameters() -> None:
    saved = copy.deepcopy(trained(torch.optim.AdamW, SHAPES[:1])[0].state_dict())
    _assert_says(_refusal(saved), "[1]", "[2]", "same order")


def test_state_of_no_parameter() -> None:
    saved = _saved(torch.optim.AdamW)
    saved["state"]["layer.weight"] = {"step": 1}
    _assert_says(_refusal(saved), "'layer.weight'", "no parameter")


def test_what_is_no_state_dict() -> None:
    _assert_says(_refusal({"optimizer": {}}), "'state' and 'param_groups'", "'optimizer'")
    _assert_says(_refusal([1]), "list")


def test_arguments() -> None:
    params = parameters(SHAPES)
    with pytest.raises(ValueError, match="source must be one of torch, bitsandbytes, torchao, adafactor8bit, not 'hf'"):
        a8multi.convert_state_dict({}, "hf", optimizer=a8multi.AdamW8bit(params))
    with pytest.raises(TypeError, match="optimizer must be an optimizer of a8multi"):
        a8multi.convert_state_dict({}, "torch", optimizer=torch.optim.AdamW(params))
    with pytest.raises(TypeError, match="built over the parameters"):
        a8multi.convert_state_dict({}, "torch", optimizer=a8multi.AdamW8bit)


# --- bitsandbytes, by its format alone: the package's own state is read in peers/. ---


def _bitsandbytes(numel: int = 300, **more: Any) -> Any:
    """State of two states, 8-bit, of one parameter."""
    blocks = -(-numel // 256)
    qmap = torch.linspace(-1, 1, 256)
    state = {
        "step": 3,
        **{name: torch.zeros(numel, dtype=torch.uint8) for name in ("state1", "state2")},
        **{name: qmap.abs() for name in ("qmap1", "qmap2")},
        **{name: torch.ones(blocks) for name in ("absmax1", "absmax2")},
        **more,
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "alpha": 0.0, "params": [0]}
    return {"state": {0: state}, "param_groups": [group]}


def _bitsandbytes_refusal(saved: Any, ours: Any = a8multi.AdamW8bit, shape: Any = (300,)) -> str:
    with pytest.raises(a8multi.StateFormatError) as caught:
        a8multi.convert_state_dict(saved, "bitsandbytes", optimizer=ours(parameters([shape])))
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"gnorm_vec": torch.zeros(100)}, ("gnorm_vec", "percentile clipping", "clip_grad_norm_")),
        ({"max1": torch.zeros(1)}, ("max1", "whole tensors")),
        ({"unorm_vec": torch.zeros(1)}, ("unorm_vec", "max_unorm")),
        ({"absmax1": torch.ones(7)}, ("absmax1", "[7]", "256")),
        ({"state1": torch.zeros(299, dtype=torch.uint8)}, ("state1", "(299,)", "(300,)")),
        ({"absmax1": torch.ones(2).bfloat16()}, ("absmax1", "bfloat16")),
        ({"step": None}, ("step", "is not there")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bitsandbytes_state(more: dict[str, Any], words: tuple[str, ...]) -> None:
    _assert_says(_bitsandbytes_refusal(_bitsandbytes(**more)), "parameter 0", *words)


def test_bitsandbytes_codes_in_another_order_of_memory() -> None:
    """Its kernels read memory, not strides: which of the two a channels_last state means cannot be known."""
    codes = torch.zeros((2, 3, 5, 10), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    saved = _bitsandbytes(state1=codes, state2=codes)
    _assert_says(_bitsandbytes_refusal(saved, shape=(2, 3, 5, 10)), "state1", "order of memory")


def test_bitsandbytes_of_another_rule() -> None:
    two, one = _bitsandbytes(), _bitsandbytes()
    del one["state"][0]["state2"]
    _assert_says(_bitsandbytes_refusal(two, a8multi.Adafactor8bit), "adafactor", "Known: adam")
    _assert_says(_bitsandbytes_refusal(one), "parameter 0", "state2", "kind adam")
    two["param_groups"][0]["weight_decay"] = 0.1
    _assert_says(_bitsandbytes_refusal(two, a8multi.Adam8bit), "weight_decay=0.1", "AdamW8bit decouples")


# --- adafactor8bit, likewise. ---


def _adafactor8bit(**more: Any) -> Any:
    state = {
        "step": 3,
        "is_quantized": False,
        "block_size": 2048,
        "row_var": torch.ones(8, 1),
        "col_var": torch.ones(1, 9),
    }
    group = {"lr": 1e-2, "beta1": None, "beta2": None, "beta2_decay": -0.8, "eps": (None, 1e-3), "weight_decay": 0.0}
    return {"state": {0: {**state, **more}}, "param_groups": [{**group, "params": [0]}]}


def _adafactor8bit_refusal(saved: Any) -> str:
    ours = a8multi.Adafactor8bit(parameters([(8, 9)]))
    with pytest.raises(a8multi.StateFormatError) as caught:
        a8multi.convert_state_dict(saved, "adafactor8bit", optimizer=ours)
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"apollo_seed": 3}, ("apollo_seed", "projected", "starts anew")),
        ({"m": torch.zeros(8, 9)}, ("first moment", "does not keep one")),
        ({"fira_prev_norm": torch.tensor(1.0)}, ("norm of the last update", "does not keep one")),
        ({"conf_row": torch.ones(8, 1), "conf_col": torch.ones(1, 9)}, ("third moment", "does not keep one")),
        ({"m_q": torch.zeros(16, dtype=torch.uint8), "m_scale": torch.ones(1)}, ("m_q", "32 codes", "72 values")),
        ({"scaled_grad_norm_prev": torch.tensor(1.0)}, ("scaled_grad_norm_prev", "nothing that can be carried")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adafactor8bit_state(more: dict[str, Any], words: tuple[str, ...]) -> None:
    _assert_says(_adafactor8bit_refusal(_adafactor8bit(**more)), "parameter 0", *words)


def test_adafactor8bit_options_that_decide_the_state() -> None:
    saved = _adafactor8bit()
    saved["param_groups"][0]["enable_fira_for_adafactor"] = True
    _assert_says(_adafactor8bit_refusal(saved), "enable_fira_for_adafactor=True", "Build it with")


# --- torchao. ---


def test_torchao_is_adam() -> None:
    _assert_says(_refusal(_saved(torch.optim.AdamW), "torchao", a8multi.Adafactor8bit), "AdamW8bit", "adafactor")

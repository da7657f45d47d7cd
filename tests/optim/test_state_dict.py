"""Saving and loading: bit for bit, whatever the types, formats and backends; what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.helpers import differences, parameters, run, snapshot

import a8multi

# One shape a case of quantised-or-not, factored-or-not and odd packing.
SHAPES = ((4097,), (65, 300), (129,), (3, 5, 7), ())
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": a8multi.AdamW8bit,
    "adamw nf4": lambda params: a8multi.AdamW8bit(params, first_moment="nf4", block_size=64),
    "adamw bf16": lambda params: a8multi.AdamW8bit(params, first_moment="bf16"),
    "adamw fp32": lambda params: a8multi.AdamW8bit(params, first_moment="fp32", second_moment="fp32"),
    "adam": lambda params: a8multi.Adam8bit(params, stochastic_rounding_writeback=True, seed=2**63 + 5),
    "factored": a8multi.Adafactor8bit,
    "nf4": lambda params: a8multi.Adafactor8bit(params, beta1=0.9),
    "full int8": lambda params: a8multi.Adafactor8bit(params, beta1=0.9, first_moment="int8", factored=False),
    "unquantised": lambda params: a8multi.Adafactor8bit(params, beta1=0.9, quantize=False, factored=False),
    "lion": a8multi.Lion8bit,
    "rmsprop": lambda params: a8multi.RMSprop8bit(params, momentum=0.9),
    "rmsprop centered": lambda params: a8multi.RMSprop8bit(params, centered=True),
    "sgd": a8multi.SGD8bit,
    "sgd momentum": lambda params: a8multi.SGD8bit(params, momentum=0.9, dampening=0.1, first_moment="nf4"),
    "adagrad": lambda params: a8multi.Adagrad8bit(params, lr_decay=0.1, initial_accumulator_value=0.1),
    "ademamix": lambda params: a8multi.AdEMAMix8bit(params, t_alpha=5, t_beta3=4, third_moment="int8"),
    "lamb": a8multi.LAMB8bit,
    "lars": lambda params: a8multi.LARS8bit(params, momentum=0.9),
    "limiter": lambda params: a8multi.Adafactor8bit(params, enable_fira_for_adafactor=True),
    "full limiter": lambda params: a8multi.Adafactor8bit(
        params, beta1=0.9, factored=False, enable_fira_for_adafactor=True
    ),
    "came": a8multi.CAME8bit,
    "came nf4 limiter": lambda params: a8multi.CAME8bit(params, first_moment="nf4", enable_fira=True),
    "came of adafactor8bit": lambda params: a8multi.Adafactor8bit(
        params, beta1=0.9, beta3=0.999, came_order="adafactor8bit"
    ),
}


def _saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _copies(params: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_round_trip_and_resume(make: Any, dtype: torch.dtype) -> None:
    """Pitfall 18: codes, headers and the integer step survive on parameters of any type, and training goes on as if."""
    params = parameters(SHAPES, dtype)
    optimizer = make(params)
    run(optimizer, params, range(3))
    saved = _saved_and_loaded(optimizer.state_dict())
    twins = _copies(params)
    resumed = make(twins)
    resumed.load_state_dict(saved)
    assert not differences(snapshot(resumed, twins), snapshot(optimizer, params))
    assert all(type(state["step"]) is int for state in resumed.state.values())
    run(optimizer, params, range(3, 6))
    run(resumed, twins, range(3, 6))
    assert not differences(snapshot(resumed, twins), snapshot(optimizer, params))


def test_state_holds_tensors_and_an_integer_alone() -> None:
    """Pitfall 17: nothing before the first step, and nothing that weights_only could refuse after it."""
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}
    run(optimizer, params, range(1))
    kinds = {type(value) for state in optimizer.state.values() for value in state.values()}
    assert kinds == {int, torch.Tensor}
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_loaded_state_is_a_copy() -> None:
    params = parameters([(4096,)])
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(1))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    twins = _copies(params)
    resumed = a8multi.AdamW8bit(twins)
    resumed.load_state_dict(saved)
    run(resumed, twins, range(1, 3))
    for name, value in before[0].items():
        assert torch.equal(saved["state"][0][name], value) if isinstance(value, torch.Tensor) else True


def test_loading_after_steps_of_its_own() -> None:
    """The plan of the old state is not used any more."""
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    run(optimizer, params, range(2, 4))
    expected = snapshot(optimizer, params)
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(saved)
    run(optimizer, params, range(2, 4))
    assert not differences(snapshot(optimizer, params), expected)


def test_saved_lr_and_options_are_loaded() -> None:
    params = parameters([(8,)])
    optimizer = a8multi.AdamW8bit(params, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    twin = a8multi.AdamW8bit(_copies(params))
    twin.load_state_dict(_saved_and_loaded(optimizer.state_dict()))
    group = twin.param_groups[0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.5, 0.25, (0.5, 0.75))


@pytest.mark.parametrize(
    ("kind", "option"), [(a8multi.SGD8bit, {"momentum": 0.9}), (a8multi.RMSprop8bit, {"centered": True})]
)
def test_what_says_which_moments_there_are_is_loaded(kind: Any, option: dict[str, Any]) -> None:
    """With the state that goes with it, into an optimizer that was built without."""
    params = parameters(SHAPES)
    optimizer = kind(params, **option)
    run(optimizer, params, range(2))
    twins = _copies(params)
    resumed = kind(twins)
    resumed.load_state_dict(_saved_and_loaded(optimizer.state_dict()))
    run(optimizer, params, range(2, 4))
    run(resumed, twins, range(2, 4))
    assert not differences(snapshot(resumed, twins), snapshot(optimizer, params))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [MAKES["adamw"], MAKES["nf4"]], ids=["adamw", "adafactor"])
def test_copies_train_on_by_themselves(make: Any, how: str) -> None:
    params = parameters(SHAPES)
    optimizer = make(params)
    run(optimizer, params, range(2))
    both = (optimizer, params)
    other, twins = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twins[0] is not params[0]
    assert other.param_groups[0]["params"][0] is twins[0]
    assert not differences(snapshot(other, twins), snapshot(optimizer, params))
    run(optimizer, params, range(2, 4))
    run(other, twins, range(2, 4))
    assert not differences(snapshot(other, twins), snapshot(optimizer, params))


# --- What does not fit. ---

MISMATCHES = {
    "first moment": (a8multi.AdamW8bit, {"first_moment": "nf4"}, "first_moment"),
    "second moment": (a8multi.AdamW8bit, {"second_moment": "fp32"}, "second_moment"),
    "block size": (a8multi.AdamW8bit, {"block_size": 256}, "block_size"),
    "least quantised size": (a8multi.AdamW8bit, {"min_quantized_numel": 0}, "min_quantized_numel"),
    "quantize": (a8multi.Adafactor8bit, {"quantize": False}, "quantize"),
    "factored": (a8multi.Adafactor8bit, {"factored": False}, "factored"),
    "third moment": (a8multi.AdEMAMix8bit, {"third_moment": "bf16"}, "third_moment"),
    "block size of the first moment": (a8multi.Adafactor8bit, {"m_block_size": 64}, "m_block_size"),
}


def _assert_refused(optimizer: Any, params: Any, saved: Any, *words: str) -> None:
    before = snapshot(optimizer, params)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    with pytest.raises(a8multi.StateFormatError) as caught:
        optimizer.load_state_dict(saved)
    for word in words:
        assert word in str(caught.value)
    assert not differences(snapshot(optimizer, params), before)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups


@pytest.mark.parametrize(("kind", "options", "word"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_another_format_is_refused(kind: Any, options: dict[str, Any], word: str) -> None:
    """Pitfall 23: with a clear error, never misread; nothing is changed."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = kind(params), kind(others, **options)
    run(optimizer, params, range(2))
    run(other, others, range(2))
    _assert_refused(optimizer, params, other.state_dict(), word, repr(options[word]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, a8multi.Adafactor8bit, a8multi.Lion8bit])
def test_the_state_of_another_optimizer_is_refused(kind: Any) -> None:
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = a8multi.AdamW8bit(params), kind(others)
    run(optimizer, params, range(1))
    run(other, others, range(1))
    _assert_refused(optimizer, params, other.state_dict(), "AdamW8bit")


def _step_as_tensor(state: Any) -> None:
    state[1]["step"] = torch.tensor(3.0)


def _codes_as_floats(state: Any) -> None:
    state[1]["exp_avg_sq"] = state[1]["exp_avg_sq"].float()


def _headers_missing(state: Any) -> None:
    del state[1]["exp_avg_block"]


def _another_shape(state: Any) -> None:
    state[1]["exp_avg"] = state[1]["exp_avg"][:-1]


@pytest.mark.parametrize("spoil", [_step_as_tensor, _codes_as_floats, _headers_missing, _another_shape])
def test_a_spoilt_state_is_refused(spoil: Any) -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"])
    _assert_refused(optimizer, params, saved, "parameter 1", "(65, 300)")


def test_other_groups_are_refused_as_torch_does() -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    other = a8multi.AdamW8bit(parameters(SHAPES[:2]))
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(other.state_dict())
    assert not differences(snapshot(optimizer, params), before)


_OTHERS = {
    "sgd for lion": (lambda p: a8multi.SGD8bit(p, momentum=0.9), a8multi.Lion8bit, "'betas'"),
    "lion for sgd": (a8multi.Lion8bit, lambda p: a8multi.SGD8bit(p, momentum=0.9), "'momentum'"),
    "lion for lars": (a8multi.Lion8bit, lambda p: a8multi.LARS8bit(p, momentum=0.9), "'momentum'"),
    "sgd for lars": (lambda p: a8multi.SGD8bit(p, momentum=0.9), a8multi.LARS8bit, "'trust_coefficient'"),
    "rmsprop for adagrad": (a8multi.RMSprop8bit, a8multi.Adagrad8bit, "'lr_decay'"),
    "adagrad for rmsprop": (a8multi.Adagrad8bit, a8multi.RMSprop8bit, "it was not saved by RMSprop8bit"),
    "adamw for lamb": (a8multi.AdamW8bit, a8multi.LAMB8bit, "'bias_correction'"),
    "came for adafactor": (a8multi.CAME8bit, a8multi.Adafactor8bit, "it was not saved by Adafactor8bit"),
}


@pytest.mark.parametrize(("saver", "loader", "word"), _OTHERS.values(), ids=_OTHERS.keys())
def test_the_state_of_another_rule_is_refused(saver: Any, loader: Any, word: str) -> None:
    """Some rules keep the same tensors: only their options tell them apart."""
    params, strangers = parameters(SHAPES), parameters(SHAPES)
    optimizer, stranger = loader(params), saver(strangers)
    run(optimizer, params, range(1))
    run(stranger, strangers, range(1))
    _assert_refused(optimizer, params, copy.deepcopy(stranger.state_dict()), word)


# --- Hooks of the user. ---


def test_hooks_see_the_whole_state() -> None:
    params = parameters([(4096,)])
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    seen: dict[str, Any] = {}
    twin = a8multi.AdamW8bit(_copies(params))

    def before(_: Any, given: dict[str, Any]) -> None:
        seen["before"] = sorted(given["state"][0])

    def after(loaded: Any) -> None:
        seen["after"] = sorted(loaded.state[loaded.param_groups[0]["params"][0]])

    twin.register_load_state_dict_pre_hook(before)
    twin.register_load_state_dict_post_hook(after)
    twin.load_state_dict(saved)
    names = ["exp_avg", "exp_avg_block", "exp_avg_sq", "exp_avg_sq_block", "step"]
    assert seen == {"before": names, "after": names}
    # Each load sees them once: nothing of the last one is left registered.
    twin.load_state_dict(saved)
    assert len(twin._optimizer_load_state_dict_pre_hooks) == len(twin._optimizer_load_state_dict_post_hooks) == 1


def test_a_hook_may_replace_the_state() -> None:
    params = parameters([(8,)])
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(4))

    def replace(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "state": {0: {**given["state"][0], "step": 17}}}

    twin = a8multi.AdamW8bit(_copies(params))
    twin.register_load_state_dict_pre_hook(replace)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state_dict()["state"][0]["step"] == 17

"""What is refused of other packages' state, by its format alone: the packages' own state is read in peers/."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from convert.refusals import SHAPES, assert_says, refusal, saved_by
from optim.helpers import parameters

import a8multi

# --- bitsandbytes. ---


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
        ({"step": math.nan}, ("step", "nan")),
        ({"qmap2": torch.zeros(10)}, ("qmap2", "(10,)", "(256,)")),
        ({"qmap1": torch.full((256,), math.nan)}, ("first moment", "not finite")),
        ({"absmax2": torch.ones(7, 3)}, ("absmax2", "[7, 3]", "256")),
        ({"__bnb_optimizer_quant_state__": [1]}, ("__bnb_optimizer_quant_state__", "[1] is not a state")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bitsandbytes_state(more: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_says(_bitsandbytes_refusal(_bitsandbytes(**more)), "parameter 0", *words)


def test_bitsandbytes_codes_in_another_order_of_memory() -> None:
    """Its kernels read memory, not strides: which of the two a channels_last state means cannot be known."""
    codes = torch.zeros((2, 3, 5, 10), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    saved = _bitsandbytes(state1=codes, state2=codes)
    assert_says(_bitsandbytes_refusal(saved, shape=(2, 3, 5, 10)), "state1", "order of memory")


def test_bitsandbytes_of_another_rule() -> None:
    two, one = _bitsandbytes(), _bitsandbytes()
    del one["state"][0]["state2"]
    assert_says(_bitsandbytes_refusal(two, a8multi.Adafactor8bit), "adafactor", "Known: adam")
    assert_says(_bitsandbytes_refusal(one), "parameter 0", "state2", "kind adam")
    two["param_groups"][0]["weight_decay"] = 0.1
    assert_says(_bitsandbytes_refusal(two, a8multi.Adam8bit), "weight_decay=0.1", "AdamW8bit decouples")


@pytest.mark.parametrize("betas", [None, 0.9, (0.9,), (0.9, None), ("0.9", "0.99"), (0.9, 0.99, 0.999)], ids=repr)
def test_bitsandbytes_betas(betas: Any) -> None:
    saved = _bitsandbytes()
    saved["param_groups"][0]["betas"] = betas
    assert_says(_bitsandbytes_refusal(saved), "param_groups[0]", f"betas={betas!r}")
    one = _bitsandbytes()
    one["param_groups"][0].update(betas=betas, eps=0.0)
    assert_says(_bitsandbytes_refusal(one, a8multi.Lion8bit), "param_groups[0]", f"betas={betas!r}")


# --- adafactor8bit. ---


_ADAFACTOR8BIT = {
    "lr": 1e-2, "beta1": None, "beta2": None, "beta2_decay": -0.8, "beta3": None, "eps": (None, 1e-3),
    "weight_decay": 0.0, "d": 1.0, "maximize": False, "relative_step": True, "scale_parameter": True,
    "scale_weight_decay": True, "enable_fira_for_adafactor": False, "fira_margin": 0.01, "apollo_rank": 0,
    "apollo_update_proj_gap": 200, "apollo_scale_type": "channel", "apollo_eps": 1e-8, "apollo_factorize": False,
}  # fmt: skip


def _adafactor8bit(**more: Any) -> Any:
    state = {
        "step": 3,
        "is_quantized": False,
        "block_size": 2048,
        "row_var": torch.ones(8, 1),
        "col_var": torch.ones(1, 9),
    }
    return {"state": {0: {**state, **more}}, "param_groups": [{**_ADAFACTOR8BIT, "params": [0]}]}


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
        ({"fira_prev_norm": torch.ones(2)}, ("fira_prev_norm", "not a finite number")),
        ({"fira_prev_norm": math.inf}, ("fira_prev_norm", "not a finite number")),
        ({"conf_row": torch.ones(8, 1), "conf_col": torch.ones(1, 9)}, ("third moment", "does not keep one")),
        ({"m_q": torch.zeros(16, dtype=torch.uint8), "m_scale": torch.ones(1)}, ("m_q", "32 codes", "72 values")),
        ({"scaled_grad_norm_prev": torch.tensor(1.0)}, ("scaled_grad_norm_prev", "nothing that can be carried")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adafactor8bit_state(more: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_says(_adafactor8bit_refusal(_adafactor8bit(**more)), "parameter 0", *words)


def test_adafactor8bit_options_that_decide_the_state() -> None:
    saved = _adafactor8bit()
    saved["param_groups"][0]["enable_fira_for_adafactor"] = True
    assert_says(_adafactor8bit_refusal(saved), "enable_fira_for_adafactor=True", "Build it with")


def test_adafactor8bit_always_limits_what_it_projects() -> None:
    saved = {"state": {}, "param_groups": [{**_ADAFACTOR8BIT, "apollo_rank": 4, "params": [0]}]}
    free, limited = (
        a8multi.Adafactor8bit(parameters([(8, 9)]), apollo_rank=4, enable_fira_for_apollo=on) for on in (False, True)
    )
    with pytest.raises(a8multi.StateFormatError, match="enable_fira_for_apollo=True"):
        a8multi.convert_state_dict(saved, "adafactor8bit", optimizer=free)
    assert not a8multi.convert_state_dict(saved, "adafactor8bit", optimizer=limited)["state"]


# --- torchao. ---

_TORCHAO = {"lr": torch.tensor(1e-3), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


def _torchao() -> Any:
    return {"state": {}, "param_groups": [{**_TORCHAO, "params": [0, 1]}]}


def test_torchao_is_adam() -> None:
    assert_says(refusal(_torchao(), "torchao", a8multi.Adafactor8bit), "AdamW8bit", "adafactor")


# --- Of every source. ---


@pytest.mark.parametrize(
    ("make", "source", "owner", "ours"),
    [
        # Of the same rules, so that nothing else would tell.
        (torch.optim.Adafactor, "adafactor8bit", "torch", a8multi.Adafactor8bit),
        (torch.optim.AdamW, "torchao", "torch", a8multi.AdamW8bit),
        (torch.optim.AdamW, "bitsandbytes", "torch", a8multi.AdamW8bit),
    ],
)
def test_torch_by_the_name_of_another(make: Any, source: str, owner: str, ours: Any) -> None:
    assert_says(refusal(saved_by(make), source, ours), f"source={source!r}", "param_groups[0]", "Pass source='torch'")


@pytest.mark.parametrize("source", ["torch", "torchao", "bitsandbytes", "adafactor8bit"])
@pytest.mark.parametrize("ours", [a8multi.AdamW8bit, a8multi.Adafactor8bit])
def test_our_own_state(source: str, ours: Any) -> None:
    assert_says(refusal(saved_by(ours), source, ours), "a group of a8multi", "load_state_dict as it is")


def test_others_by_the_name_of_torch() -> None:
    group = {**_bitsandbytes()["param_groups"][0], "t_beta3": None}
    saved = {"state": {}, "param_groups": [group]}
    with pytest.raises(a8multi.StateFormatError, match="Pass source='bitsandbytes'"):
        a8multi.convert_state_dict(saved, "torch", optimizer=a8multi.AdamW8bit(parameters([(300,)])))
    group = {**_ADAFACTOR8BIT, "m_block_size": 128, "params": [0]}
    saved = {"state": {}, "param_groups": [group]}
    with pytest.raises(a8multi.StateFormatError, match="Pass source='adafactor8bit'"):
        a8multi.convert_state_dict(saved, "torch", optimizer=a8multi.Adafactor8bit(parameters([(300,)])))


_GROUPS: dict[str, tuple[Any, Any, list[str]]] = {
    "torch": (
        lambda: torch.optim.AdamW(parameters(SHAPES)).state_dict(),
        a8multi.AdamW8bit,
        ["lr", "eps", "weight_decay"],
    ),
    "torchao": (_torchao, a8multi.AdamW8bit, ["lr", "eps", "weight_decay", "amsgrad"]),
    "bitsandbytes": (_bitsandbytes, a8multi.AdamW8bit, ["lr", "eps", "weight_decay"]),
    "adafactor8bit": (
        _adafactor8bit,
        a8multi.Adafactor8bit,
        [name for name in _ADAFACTOR8BIT if name != "beta2_decay"],  # known by it
    ),
}


@pytest.mark.parametrize(
    ("source", "name"), [(source, name) for source, (_, _, names) in _GROUPS.items() for name in names]
)
def test_an_option_that_is_not_there(source: str, name: str) -> None:
    """Ours would silently stay in its place."""
    make, ours, _ = _GROUPS[source]
    saved = make()
    shapes = {"bitsandbytes": [(300,)], "adafactor8bit": [(8, 9)]}.get(source, SHAPES)
    optimizer = ours(parameters(shapes))
    a8multi.convert_state_dict(saved, source, optimizer=optimizer)
    del saved["param_groups"][0][name]
    with pytest.raises(a8multi.StateFormatError) as caught:
        a8multi.convert_state_dict(saved, source, optimizer=optimizer)
    assert_says(str(caught.value), f"source={source!r}", f"param_groups[0]: {name}: is not there")


def test_bitsandbytes_ademamix_without_its_options() -> None:
    group = {"lr": 1e-3, "betas": (0.9, 0.99, 0.999), "eps": 1e-8, "weight_decay": 0.0, "alpha": 5.0, "params": [0]}
    saved = {"state": {}, "param_groups": [group]}
    assert_says(_bitsandbytes_refusal(saved, a8multi.AdEMAMix8bit), "param_groups[0]: t_alpha: is not there")

"""build_param_groups: who gets safe settings and why, overrides by pattern, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import a8multi
from a8multi.estimate import estimate_state_bytes
from a8multi.groups import PRESETS

Groups = list[dict[str, Any]]

PARAMS = pytest.mark.parametrize("preset", PRESETS)


class ScaledRMSNorm(nn.Module):
    """Not of torch: known by its name. Two-dimensional, so that the number of dimensions does not decide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))


class VocabParallelEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(96, width))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ScaledRMSNorm(width)
        self.proj = nn.Linear(width, width)
        self.output = nn.Linear(width, width, bias=False)
        self.gain = nn.Parameter(torch.ones(width))


class Model(nn.Module):
    """One of every kind of parameter."""

    def __init__(self, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(80, width)
        self.vocabulary = VocabParallelEmbedding(width)
        self.bag = nn.EmbeddingBag(70, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 70, width))
        self.patch_embed = nn.Conv2d(3, width, 8)
        self.bias_table = nn.Parameter(torch.zeros(70, width))
        self.layers = nn.ModuleList([Layer(width) for _ in range(2)])
        self.final = nn.LayerNorm((2, width))
        self.lm_head = nn.Linear(width, 80)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


# Whatever is not here is safe: 32-bit and without decay.
ORDINARY = {
    "patch_embed.weight",
    *(f"layers.{i}.{name}.weight" for i in range(2) for name in ("proj", "output")),
}


def options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def by_name(groups: Groups) -> dict[str, dict[str, Any]]:
    """Options of every parameter; fails if one is in two groups."""
    names = [name for group in groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    return {name: options(group) for group in groups for name in group["param_names"]}


def test_roles() -> None:
    model = Model()
    found = by_name(a8multi.build_param_groups(model))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {name for name, chosen in found.items() if not chosen} == ORDINARY
    safe = {"first_moment": "fp32", "second_moment": "fp32", "weight_decay": 0.0}
    assert all(chosen == safe for name, chosen in found.items() if name not in ORDINARY)


def test_names_belong_to_their_tensors_in_order() -> None:
    model = Model()
    named = dict(model.named_parameters())
    groups = a8multi.build_param_groups(model)
    assert len(groups) == 2
    order = list(named)
    for group in groups:
        assert all(named[name] is param for name, param in zip(group["param_names"], group["params"], strict=True))
        places = [order.index(name) for name in group["param_names"]]
        assert places == sorted(places)


@PARAMS
def test_every_preset_is_safe_for_its_optimizer(preset: str) -> None:
    """By the state that the optimizer says it will have: 32 bits of full rank where it is safe, less elsewhere."""
    kind = getattr(a8multi, PRESETS[preset])
    model = Model(width=128)
    groups = a8multi.build_param_groups(model, preset, weight_decay=0.25)
    plain = {name for name, chosen in by_name(groups).items() if chosen == {"weight_decay": 0.25}}
    assert plain == ORDINARY
    # Those that keep no average unless asked.
    more = {"momentum": 0.9} if preset in ("sgd", "lars") else {}
    optimizer = kind(groups, lr=1e-3, **more)
    assert all(set(options(group)) <= set(optimizer.defaults) for group in groups)
    for group in optimizer.param_groups:
        ordinary = set(group["param_names"]) <= ORDINARY
        assert group["weight_decay"] == (0.25 if ordinary else 0.0)
        stored = set(estimate_state_bytes([group], kind, lr=1e-3, **more).bytes_by_format)
        assert ordinary or stored <= {"fp32", "factored"}, (preset, stored)


def test_groups_step_and_load_by_name() -> None:
    """What comes out works as it is: a step, a round trip of the state, and errors that name the parameter."""
    model = Model()
    optimizer = a8multi.AdamW8bit(a8multi.build_param_groups(model), lr=1e-2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.state[model.embed_tokens.weight]["exp_avg"].dtype is torch.float32
    assert optimizer.state[model.layers[0].proj.weight]["exp_avg"].dtype is torch.int8
    again = a8multi.AdamW8bit(a8multi.build_param_groups(model), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[model.layers[1].proj.weight]["step"] == 1
    model.layers[1].proj.weight.grad = torch.ones(64, 64).to_sparse()
    with pytest.raises(ValueError, match=r"layers\.1\.proj\.weight"):
        optimizer.step()


def test_tied_weights_appear_once_under_any_of_their_names() -> None:
    model = Model(tied=True)
    found = by_name(a8multi.build_param_groups(model, overrides={"lm_head": {"lr": 1.0}}))
    assert "lm_head.weight" not in found
    assert found["embed_tokens.weight"] == {
        "first_moment": "fp32", "second_moment": "fp32", "weight_decay": 0.0, "lr": 1.0,
    }  # fmt: skip
    assert "lr" not in found["vocabulary.weight"]


def test_frozen_parameters_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    found = by_name(a8multi.build_param_groups(model, overrides={"layers.0": {"lr": 1.0}}, verbose=True))
    assert set(found) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert "frozen" in capsys.readouterr().out


def test_overrides_from_plain_literals() -> None:
    """Names of parameters and of modules, globs, and the later ones over the earlier, option by option."""
    text = """{
        "layers": {"lr": 0.5, "block_size": 256},
        "layers.*.proj.weight": {"lr": 0.25},
        "layers.1": {"betas": [0.8, 0.9]},
        "embed_tokens": {"first_moment": "int8", "weight_decay": 0.125},
        "lm_head.bias": {"eps": 1e-6}
    }"""
    model = Model()
    found = by_name(a8multi.build_param_groups(model, overrides=json.loads(text), weight_decay=0.75))
    common = {"weight_decay": 0.75, "block_size": 256}
    assert found["layers.0.output.weight"] == {**common, "lr": 0.5}
    assert found["layers.0.proj.weight"] == {**common, "lr": 0.25}
    assert found["layers.1.proj.weight"] == {**common, "lr": 0.25, "betas": [0.8, 0.9]}
    safe = {"first_moment": "fp32", "second_moment": "fp32", "weight_decay": 0.0}
    assert found["layers.0.proj.bias"] == {**safe, "lr": 0.5, "block_size": 256}
    assert found["embed_tokens.weight"] == {**safe, "first_moment": "int8", "weight_decay": 0.125}
    assert found["lm_head.bias"] == {**safe, "eps": 1e-6}
    assert found["lm_head.weight"] == safe
    assert found["patch_embed.weight"] == {"weight_decay": 0.75}


def test_a_name_is_not_a_prefix_of_letters() -> None:
    model = nn.ModuleDict({"block": nn.Linear(4, 4), "block2": nn.Linear(4, 4)})
    found = by_name(a8multi.build_param_groups(model, overrides={"block": {"lr": 1.0}}))
    assert [name for name, chosen in found.items() if "lr" in chosen] == ["block.weight", "block.bias"]


def test_equal_options_share_a_group() -> None:
    model = Model()
    overrides = {"layers.0.proj.weight": {"lr": 0.5}, "layers.1.proj.weight": {"lr": 0.5}}
    assert len(a8multi.build_param_groups(model, overrides=overrides)) == 3


def test_heads_are_outside_of_numbered_layers() -> None:
    model = nn.ModuleDict({
        "classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        "blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})]),
    })  # fmt: skip
    found = by_name(a8multi.build_param_groups(model))
    assert [name for name, chosen in found.items() if not chosen] == ["blocks.0.fc.weight"]


def test_verbose_says_what_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    quiet = a8multi.build_param_groups(model)
    assert capsys.readouterr().out == ""
    a8multi.build_param_groups(model, verbose=True, overrides={"lm_head": {"lr": 0.5}})
    lines = capsys.readouterr().out.splitlines()
    assert "AdamW8bit" in lines[0]
    rows = {line.split("  ")[0]: line for line in lines[2:]}
    assert set(rows) == {
        "embedding (Embedding)", "embedding (EmbeddingBag)", "embedding (VocabParallelEmbedding)", "embedding (name)",
        "norm (LayerNorm)", "norm (ScaledRMSNorm)", "bias (name)", "vector (1-d)", "matrix",
        "head (name lm_head) + 'lm_head'", "bias (name) + 'lm_head'",
    }  # fmt: skip
    head = rows["head (name lm_head) + 'lm_head'"]
    assert head.split()[5:7] == ["1", "5,120"]
    assert head.endswith("first_moment='fp32', second_moment='fp32', weight_decay=0.0, lr=0.5")
    assert rows["matrix"].split()[1:3] == ["5", f"{sum(p.numel() for p in quiet[1]['params']):,}"]


# --- What is refused. ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layers.0.porj": {}}, [r"overrides\['layers.0.porj'\]", "matches no parameter", "layers.0.proj"]),
        ({"layers.*.weihgt": {}}, ["matches no parameter", "layers."]),
        ({"": {}}, ["matches no parameter"]),
        (
            {"lm_head": {"frist_moment": "fp32"}},
            [r"overrides\['lm_head'\]", "AdamW8bit has no", "frist_moment", "betas"],
        ),
        ({"lm_head": {"params": []}}, ["has no option 'params'"]),
        ({"lm_head": {"first_moment": "int7"}}, ["lm_head.weight", "first_moment must be one of"]),
        ({"lm_head": {"lr": "1e-4"}}, ["lm_head.weight", "lr must be", "'1e-4'"]),
    ],
)
def test_wrong_overrides(overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="(?s)" + ".*".join(words)):
        a8multi.build_param_groups(Model(), overrides=overrides)


@pytest.mark.parametrize("overrides", [["lm_head"], {"lm_head": "fp32"}, {3: {}}])
def test_overrides_of_another_type(overrides: Any) -> None:
    with pytest.raises(TypeError, match="overrides must map patterns to options"):
        a8multi.build_param_groups(Model(), overrides=overrides)


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of adamw, .*, not 'adamax'"):
        a8multi.build_param_groups(Model(), "adamax")
    with pytest.raises(ValueError, match="weight_decay must be"):
        a8multi.build_param_groups(Model(), weight_decay=-1.0)
    wrong: Any = [Tensor()]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not list"):
        a8multi.build_param_groups(wrong)


# --- APOLLO8bit, whose groups keep options under Adafactor8bit's names. ---


def test_overrides_of_apollo_have_the_names_of_its_constructor_or_of_its_groups() -> None:
    overrides = {
        "layers.0.proj": {"rank": 4, "betas": [0.8, 0.9], "eps": 1e-6, "scale_type": "tensor"},
        "layers.1.proj": {"apollo_rank": 3, "enable_fira": False},
        "embed_tokens": {"rank": 2},
        # The later one wins, whichever of the two names it has.
        "layers.1.output": {"rank": 7},
        "layers.1.output.weight": {"apollo_rank": 5},
    }
    model = Model()
    groups = a8multi.build_param_groups(model, "apollo", overrides=overrides)
    found = by_name(groups)
    assert found["layers.0.proj.weight"] == {
        "apollo_rank": 4, "beta1": 0.8, "beta2": 0.9, "eps": (1e-6, 0.0), "apollo_eps": 1e-6,
        "apollo_scale_type": "tensor",
    }  # fmt: skip
    assert found["layers.1.proj.weight"] == {"apollo_rank": 3, "enable_fira_for_apollo": False}
    assert found["layers.1.output.weight"] == {"apollo_rank": 5}
    assert found["embed_tokens.weight"]["apollo_rank"] == 2
    assert found["vocabulary.weight"]["apollo_rank"] == 0
    optimizer = a8multi.APOLLO8bit(groups, rank=16)
    ranks = {name: group["apollo_rank"] for group in optimizer.param_groups for name in group["param_names"]}
    assert (ranks["layers.0.proj.weight"], ranks["layers.0.output.weight"]) == (4, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, ["lm_head.weight", ": rank must be an integer"]),
        ({"betas": [0.9]}, [r"overrides\['lm_head'\]: betas must be two numbers"]),
        ({"betas": [0.9, None]}, [r"overrides\['lm_head'\]: betas\[1\] must be"]),
        ({"eps": 0.0}, [r"overrides\['lm_head'\]: eps must be"]),
        ({"ranks": 4}, ["APOLLO8bit has no option 'ranks'", " rank, update_proj_gap, ", "apollo_rank"]),
    ],
)
def test_wrong_overrides_of_apollo(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="(?s)" + ".*".join(words)):
        a8multi.build_param_groups(Model(), "apollo", overrides={"lm_head": options})
    if "rank" in options:  # no other optimizer has it
        with pytest.raises(ValueError, match="Adafactor8bit has no option 'rank'"):
            a8multi.build_param_groups(Model(), "adafactor", overrides={"lm_head": options})

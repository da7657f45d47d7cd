"""estimate_state_bytes: the bytes of the state that a real step makes, from every form of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import a8multi
from a8multi.backend import use_backend
from a8multi.estimate import StateEstimate, estimate_state_bytes, optimizers

# No elements, below and above the least quantised size, a partial block, a convolution.
SHAPES: list[tuple[int, ...]] = [(), (0,), (70,), (4095,), (5001,), (65, 70), (3, 5), (9, 8, 8, 8)]
# Options that change what is stored, by those that have them.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"first_moment": "nf4"},
    {"first_moment": "bf16"},
    {"first_moment": "fp32"},
    {"second_moment": "fp32"},
    {"block_size": 256},
    {"momentum": 0.9},
    {"momentum": 0.9, "centered": True},
    {"beta1": 0.9},
    {"beta1": 0.9, "quantize": False},
    {"factored": False},
    {"min_quantized_numel": 0},
    {"capturable": True},
    {"apollo_rank": 2},
    {"apollo_rank": 2, "beta1": 0.9, "apollo_factorize": True},
    {"apollo_rank": 2, "enable_fira_for_apollo": False},
    {"third_moment": "int8"},
    {"initial_accumulator_value": 0.5},
    {"enable_fira": True},
    {"enable_fira_for_adafactor": True},
]


def offers(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> bool:
    """Whether an optimizer has these options, and together."""
    try:
        kind([nn.Parameter(torch.empty(0))], **{"lr": 0.0, **options})
    except (TypeError, ValueError):
        return not options
    return True


CASES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(options) or 'defaults'}")
    for name, kind in optimizers().items()
    for options in OPTIONS
    if offers(kind, options)
]


def made_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@pytest.mark.filterwarnings("ignore:rank=256 is above")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_what_a_step_makes(name: str, options: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = optimizers()[name](params, **{"lr": 1e-3, **options})
    for param in params:
        param.grad = torch.ones_like(param)
    with use_backend("torch"):
        optimizer.step()
    found = estimate_state_bytes(SHAPES, name, **options)
    assert found.total_bytes == made_bytes(optimizer)
    assert found.total_bytes == sum(found.bytes_by_format.values())
    assert found.parameters == sum(param.numel() for param in params)


def test_by_format() -> None:
    """Counted by hand: a code and 4 bytes of header a block of 128 for each moment; small ones in float32."""
    found = estimate_state_bytes([(64, 129), (10,)], "adamw8bit")
    assert found.bytes_by_format == {"int8": 64 * 129 + 65 * 4, "log8": 64 * 129 + 65 * 4, "fp32": 2 * 10 * 4}
    assert found.parameters == 64 * 129 + 10
    assert found.bytes_per_parameter == found.total_bytes / found.parameters
    found = estimate_state_bytes([(64, 100)], "adafactor8bit", beta1=0.9)
    assert found.bytes_by_format == {"nf4": 3200 + 50 * 4, "factored": (64 + 100) * 4}
    found = estimate_state_bytes([(64, 100)], "adamw8bit", capturable=True)
    assert found.bytes_by_format["scalars"] == 8


def test_every_form_of_input() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    expected = estimate_state_bytes([(100, 64), (100,), (64,)])
    assert expected.total_bytes > 0
    for given in (
        model,
        model.parameters(),
        model.named_parameters(),
        [torch.Size([100, 64]), [100], (64,)],
        [("a", (100, 64)), ("b", [100]), ("c", torch.empty(64))],
        [{"params": [(100, 64), (100,)]}, {"params": model[2].bias}],
        [{"params": model.parameters(), "lr": 0.5}],
    ):
        assert estimate_state_bytes(given, a8multi.AdamW8bit) == expected
    assert estimate_state_bytes([model[0].weight, model[1].weight]) == estimate_state_bytes([(100, 64)])


def test_options_of_groups() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64, bias=False))
    found = estimate_state_bytes(a8multi.build_param_groups(model), "AdamW8bit", first_moment="nf4")
    assert found.bytes_by_format == {"fp32": 2 * 6400 * 4, "nf4": 2048 + 32 * 4, "log8": 4096 + 32 * 4}


def test_a_model_too_large_for_this_machine() -> None:
    found = estimate_state_bytes([(1 << 24, 1 << 20)])
    assert found.parameters == 1 << 44
    assert found.bytes_per_parameter == 2.0625


def test_nothing_to_optimize() -> None:
    assert estimate_state_bytes([(0,)]) == StateEstimate("AdamW8bit", 0, 0, {})
    assert estimate_state_bytes([(0,)]).bytes_per_parameter == 0


def test_the_example_of_the_docstring() -> None:
    assert estimate_state_bytes([(4096, 4096)], "adamw8bit", first_moment="nf4").total_bytes == 26214400


def test_every_optimizer_has_a_name() -> None:
    known = optimizers()
    assert {"adamw8bit", "adam8bit", "adafactor8bit"} <= set(known)
    assert all(kind.__name__.lower() == name for name, kind in known.items())


@pytest.mark.parametrize("wrong", ["adamw", torch.optim.AdamW, None])
def test_unknown_optimizer(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"optimizer must be a class of a8multi or one of .*adamw8bit.*, not"):
        estimate_state_bytes([(4,)], wrong)


@pytest.mark.parametrize("wrong", [(768, 3072), [(4, -1)], [("a", "b")], [{"params": [(4,)]}, (4,)]])
def test_what_is_no_shape(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"entry \d of the shapes is .* a single shape goes into a list"):
        estimate_state_bytes(wrong)


def test_wrong_options_are_the_optimizers_own_errors() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        estimate_state_bytes([(4,)], "adamw8bit", momentum=0.9)
    with pytest.raises(ValueError, match="first_moment must be one of"):
        estimate_state_bytes([(4,)], "adamw8bit", first_moment="int7")
    with pytest.raises(ValueError, match=r"torch\.float64 is not supported"):
        estimate_state_bytes([torch.empty(4, dtype=torch.float64)])

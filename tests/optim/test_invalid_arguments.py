"""What is not valid is refused with the parameter's name, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim.helpers import differences, gradients, parameters, run, snapshot

import a8multi

pytestmark = pytest.mark.filterwarnings("ignore:rank=256 is above")

SHAPES = ((4097,), (65, 300), (129,))
NAN, INF = math.nan, math.inf
COMMON: list[tuple[str, Any, str]] = [
    *(("lr", value, "lr") for value in (NAN, INF, -1.0, "fast", None, torch.tensor(NAN), torch.ones(2))),
    *(("weight_decay", value, "weight_decay") for value in (NAN, INF, -0.1, None, torch.tensor(0.1j))),
    *(("seed", value, "seed") for value in (-1, 2**64, 1.5, None)),
    *(("block_size", value, "block_size") for value in (0, 16, 31, 100, 8192, 128.0, None)),
    *(("first_moment", value, "first_moment") for value in ("fp8", "log8", None, 8)),
]
_EPS: list[tuple[str, Any, str]] = [("eps", value, "eps") for value in (NAN, INF, -1e-8, None)]
_SECOND: list[tuple[str, Any, str]] = [("second_moment", value, "second_moment") for value in ("int8", "bf16", None)]
# Of every element-wise optimizer, but for those without a first moment.
ELEMENTWISE: list[tuple[str, Any, str]] = [
    *COMMON,
    *(("min_quantized_numel", value, "min_quantized_numel") for value in (-1, NAN, None)),
]
BETAS: list[tuple[str, Any, str]] = [
    *(("betas", value, r"betas\[0\]") for value in ((1.0, 0.9), (-0.1, 0.9), (NAN, 0.9), ("a", 0.9))),
    *(("betas", value, r"betas\[1\]") for value in ((0.9, 1.0), (0.9, -0.1), (0.9, INF))),
    *(("betas", value, "betas") for value in ((0.9,), 0.9, None, (0.9, 0.99, 0.999))),
]
MOMENTUM: list[tuple[str, Any, str]] = [
    *(("momentum", value, "momentum") for value in (1.0, -0.1, NAN, None)),
    *(("dampening", value, "dampening") for value in (-0.1, INF, None)),
    ("nesterov", True, "nesterov"),
]
# Of Adafactor8bit and APOLLO8bit. first_moment=None is valid here.
ADAFACTOR: list[tuple[str, Any, str]] = [
    *(case for case in COMMON if case[:2] != ("first_moment", None)),
    *(("beta1", value, "beta1") for value in (1.0, -0.1, NAN, "a")),
    *(("beta2", value, "beta2") for value in (1.0, -0.1, NAN)),
    *(("beta2_decay", value, "beta2_decay") for value in (0.1, NAN, -INF, None)),
    *(("beta3", value, "beta3") for value in (1.0, NAN, 0.9999)),
    *(("d", value, "d must") for value in (-1.0, NAN, INF, None)),
    *(("m_block_size", value, "m_block_size") for value in (0, 33, 8192, None)),
    *(("min_8bit_size", value, "min_8bit_size") for value in (-1, NAN)),
    *(("fira_margin", value, "fira_margin") for value in (-0.1, NAN)),
    ("came_order", "torch", "came_order"),
]
# By the names that the constructor of APOLLO8bit has for them.
APOLLO: list[tuple[str, Any, str]] = [
    *(("rank", value, "^rank must") for value in (-1, 1.5, "4", None, True)),
    *(("update_proj_gap", value, "^update_proj_gap must") for value in (0, 2.0, None)),
    ("scale_type", "row", "^scale_type must"),
    *(("scale", value, "^scale must") for value in (0.0, INF, None, torch.ones(2))),
    *((name, value, f"^{name} must") for name in ("factorize", "enable_fira") for value in (1, "false", None)),
]
CASES = {
    a8multi.AdamW8bit: [*ELEMENTWISE, *BETAS, *_EPS, *_SECOND],
    a8multi.LAMB8bit: [*ELEMENTWISE, *BETAS, *_EPS, *_SECOND],
    a8multi.Lion8bit: [*ELEMENTWISE, *BETAS],
    a8multi.RMSprop8bit: [
        *ELEMENTWISE,
        *_EPS,
        *_SECOND,
        *(("alpha", value, "alpha") for value in (1.0, -0.1, NAN, None)),
        *(("momentum", value, "momentum") for value in (1.0, -0.1, None)),
    ],
    a8multi.SGD8bit: [*ELEMENTWISE, *MOMENTUM],
    a8multi.LARS8bit: [
        *ELEMENTWISE,
        *MOMENTUM,
        *_EPS,
        *(("trust_coefficient", value, "trust_coefficient") for value in (0.0, -1e-3, NAN, None)),
    ],
    a8multi.Adagrad8bit: [
        *(case for case in ELEMENTWISE if case[0] != "first_moment"),
        *_EPS,
        *_SECOND,
        *((name, value, name) for name in ("lr_decay", "initial_accumulator_value") for value in (-0.1, INF, None)),
    ],
    a8multi.AdEMAMix8bit: [
        *ELEMENTWISE,
        *_EPS,
        *_SECOND,
        *(("betas", value, "betas") for value in ((0.9, 0.99), None)),
        *(("betas", value, r"betas\[2\]") for value in ((0.9, 0.99, 1.0), (0.9, 0.99, NAN))),
        *(("alpha", value, "alpha") for value in (-1.0, INF, None)),
        *((name, value, name) for name in ("t_alpha", "t_beta3") for value in (-1, NAN, "many")),
        ("third_moment", "log8", "third_moment"),
    ],
    a8multi.CAME8bit: [
        *ELEMENTWISE,
        *_SECOND,
        *(("betas", value, "betas") for value in ((0.9, 0.99), None)),
        *(("betas", value, r"betas\[2\]") for value in ((0.9, 0.99, 1.0), (0.9, 0.99, NAN))),
        *(("eps", value, "eps") for value in (1e-30, (1e-30,), (-1.0, 1e-16), (1e-30, NAN))),
        *((name, value, name) for name in ("clip_threshold", "fira_margin") for value in (-1.0, NAN, None)),
    ],
    a8multi.Adafactor8bit: [
        *ADAFACTOR,
        *(("eps", value, r"eps\[0\]") for value in ((-1.0, 1e-3), (NAN, 1e-3), (INF, 1e-3))),
        *(("eps", value, r"eps\[1\]") for value in ((None, -1.0), (None, NAN), (None, None))),
        *(("eps", value, "eps") for value in (1e-8, None, (1e-8,))),
        *((f"apollo_{name}", value, f"^apollo_{name} must") for name, value, _ in APOLLO if name != "enable_fira"),
    ],
    a8multi.APOLLO8bit: ADAFACTOR,
}
CASES[a8multi.Adam8bit] = CASES[a8multi.AdamW8bit]
# The names of APOLLO8bit's flags in messages, where they are not those of the groups.
OTHERWISE = {"apollo_factorize": "factorize", "enable_fira_for_apollo": "enable_fira"}


def flags(kind: Any) -> list[tuple[str, Any, str]]:
    """Every option that is True or False, with what would count as one of them in an ``if``."""
    names = [name for name, value in kind(parameters([(8,)])).defaults.items() if isinstance(value, bool)]
    said = OTHERWISE if kind is a8multi.APOLLO8bit else {}
    return [(name, value, f"^{said.get(name, name)} must be") for name in names for value in (1, "false")]


ALL = [
    pytest.param(kind, *case, id=f"{kind.__name__}-{case[0]}-{str(case[1])[:16]}")
    for kind, cases in CASES.items()
    for case in (*cases, *flags(kind))
]


def test_the_flags_are_found() -> None:
    assert {name for name, _, _ in flags(a8multi.RMSprop8bit)} == {
        "maximize", "centered", "stochastic_rounding", "stochastic_rounding_writeback", "capturable", "skip_nonfinite",
    }  # fmt: skip
    assert {kind.__name__ for kind in CASES} == {name for name in a8multi.__all__ if name.endswith("8bit")}


@pytest.mark.parametrize(("kind", "name", "value", "word"), ALL)
def test_at_construction(kind: Any, name: str, value: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        kind(parameters([(8,)]), **{name: value})


@pytest.mark.parametrize(("kind", "name", "value", "word"), ALL)
def test_when_changed_later(kind: Any, name: str, value: Any, word: str) -> None:
    """In the last group, so that the first would have been stepped already."""
    params = parameters(SHAPES)
    optimizer = kind([{"params": params[:2]}, {"params": params[2:]}])
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=word):
        run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)
    optimizer.param_groups[1][name] = good
    run(optimizer, params, range(1, 2))
    assert all(optimizer.state[p]["step"] == 2 for p in params)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        *APOLLO,
        *(case for case in BETAS if case[1] != (0.9,)),
        *(("betas", value, "^betas") for value in ((None, None), (0.9, None), (0.9,))),
        *(("eps", value, "^eps must") for value in (0.0, -1.0, NAN, None)),
    ],
)
def test_apollo_by_its_own_names(name: str, value: Any, word: str) -> None:
    """Of the constructor and of groups alike, and nothing is left of a group that is refused."""
    params = parameters(SHAPES)
    with pytest.raises(ValueError, match=word):
        a8multi.APOLLO8bit(params, **{name: value})
    with pytest.raises(ValueError, match=word):
        a8multi.APOLLO8bit([{"params": params[:1]}, {"params": params[1:], name: value}])
    optimizer = a8multi.APOLLO8bit(params[:1])
    with pytest.raises(ValueError, match=word):
        optimizer.add_param_group({"params": params[1:], name: value})
    assert len(optimizer.param_groups) == 1


def test_apollo_takes_no_pair_for_eps() -> None:
    with pytest.raises(ValueError, match=r"^eps must be a finite number > 0"):
        a8multi.APOLLO8bit(parameters([(8,)]), eps=(1e-8, 1e-3))


@pytest.mark.parametrize("kind", CASES)
def test_an_added_group_is_checked_and_not_kept(kind: Any) -> None:
    params = parameters(SHAPES)
    optimizer = kind(params[:1])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": params[1:], "lr": NAN})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params, range(1))


def test_unknown_options_are_refused() -> None:
    for kind in CASES:
        with pytest.raises(TypeError):
            kind(parameters([(8,)]), amsgrad=True)


# --- Parameters and gradients. ---


def _complex_param() -> Any:
    return torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64)), "complex"


def _double_param() -> Any:
    return torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)), "float64"


def _integer_param() -> Any:
    return torch.nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False), "int32"


@pytest.mark.parametrize("make", [_complex_param, _double_param, _integer_param])
@pytest.mark.parametrize("kind", CASES)
def test_parameter_types(kind: Any, make: Any) -> None:
    param, word = make()
    with pytest.raises(ValueError, match=word):
        kind([*parameters([(8,)]), param])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("kind", CASES)
def test_a_parameter_twice_in_a_group(kind: Any) -> None:
    """torch only warns, and steps it twice with one state; here it would have two states, one of which is lost."""
    (param,) = parameters([(8,)])
    with pytest.raises(ValueError, match=r"params: .* twice"):
        kind([param, param])


@pytest.mark.parametrize("kind", CASES)
def test_parts_of_a_dtensor(kind: Any) -> None:
    """Their step would fail with a message of torch's, or write past the part."""
    (param,) = parameters([(8,)])
    param.full_tensor = lambda: param  # what torch.distributed.tensor.DTensor is known by
    with pytest.raises(ValueError, match="params: a DTensor"):
        kind([param])


def _assert_step_refused(optimizer: Any, params: Any, *words: str) -> None:
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(words)):
        optimizer.step()
    assert not differences(snapshot(optimizer, params), before)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_a_sparse_gradient_in_the_last_parameter(kind: Any, stepped: bool) -> None:
    params = parameters(SHAPES)
    optimizer = kind(params)
    if stepped:
        run(optimizer, params, range(1))
    for param, grad in zip(params, gradients(params, 1), strict=True):
        param.grad = grad
    params[-1].grad = torch.zeros(129).to_sparse()
    _assert_step_refused(optimizer, params, r"params'\]\[2\]", "sparse")
    if not stepped:
        assert not optimizer.state


@pytest.mark.parametrize("kind", CASES)
def test_a_model_cast_to_double_after_construction(kind: Any) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = kind(model.parameters())
    model.double()
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    _assert_step_refused(optimizer, list(model.parameters()), "float64")


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("shape", [(100,), (9000,), (5, 5)])
def test_a_parameter_whose_data_was_replaced_by_another_shape(kind: Any, shape: tuple[int, ...]) -> None:
    """State and plan are of the old size: stepping would write past the end. Refused, nothing written."""
    params = parameters([(4096,), (64, 64)])
    # Without momentum these keep nothing that has a size.
    optimizer = kind(params, **({"momentum": 0.9} if kind in (a8multi.SGD8bit, a8multi.LARS8bit) else {}))
    run(optimizer, params, range(2))
    for i in range(2):
        kept = params[i].data
        params[i].data = torch.ones(shape)
        for param in params:
            param.grad = torch.ones_like(param)
        _assert_step_refused(optimizer, params, "shape")
        params[i].data = kept
    run(optimizer, params, range(2, 4))


def test_same_size_another_shape_is_refused() -> None:
    params = parameters([(64, 128)])
    optimizer = a8multi.Adafactor8bit(params)
    run(optimizer, params, range(1))
    params[0].data = params[0].data.reshape(128, 64)
    params[0].grad = torch.ones(128, 64)
    _assert_step_refused(optimizer, params, "shape")

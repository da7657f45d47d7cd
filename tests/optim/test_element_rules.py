"""Lion, RMSprop, SGD, Adagrad, AdEMAMix, LAMB and LARS against torch.optim and the papers' rules in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.helpers import (
    DTYPES,
    EDGE_SHAPES,
    SMALL_SHAPES,
    apply,
    assert_within,
    decoded,
    gradients,
    normal,
    parameters,
    run,
)
from optim.open_loop import assert_stored, assert_written
from oracle import rules
from torch import Tensor

import a8multi

RULES: dict[Any, Callable[..., Any]] = {
    a8multi.Lion8bit: rules.lion,
    a8multi.RMSprop8bit: rules.rmsprop,
    a8multi.SGD8bit: rules.sgd,
    a8multi.Adagrad8bit: rules.adagrad,
    a8multi.AdEMAMix8bit: rules.ademamix,
    a8multi.LAMB8bit: rules.lamb,
    a8multi.LARS8bit: rules.lars,
}
IN_TORCH: dict[Any, Any] = {
    a8multi.RMSprop8bit: torch.optim.RMSprop,
    a8multi.SGD8bit: torch.optim.SGD,
    a8multi.Adagrad8bit: torch.optim.Adagrad,
}
MOMENTS = {"first_moment": "exp_avg", "second_moment": "exp_avg_sq", "third_moment": "exp_avg_slow"}
L2 = (a8multi.RMSprop8bit, a8multi.SGD8bit, a8multi.Adagrad8bit)


def _float32(kind: Any) -> dict[str, str]:
    return {name: "fp32" for name in MOMENTS if name in inspect.signature(kind).parameters}


def _names(kind: Any) -> list[str]:
    """Options of the rule itself: those that the oracle has too."""
    known = inspect.signature(rules.sgd if kind is a8multi.LARS8bit else RULES[kind]).parameters
    more = ("trust_coefficient", "eps") if kind is a8multi.LARS8bit else ()
    return [name for name in inspect.signature(kind).parameters if name in known or name in more]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lion": (a8multi.Lion8bit, {}),
    "lion decay": (a8multi.Lion8bit, {"lr": 3e-3, "betas": (0.5, 0.9), "weight_decay": 0.3, "maximize": True}),
    "rmsprop": (a8multi.RMSprop8bit, {}),
    "rmsprop momentum": (a8multi.RMSprop8bit, {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9}),
    "rmsprop centered": (a8multi.RMSprop8bit, {"centered": True, "eps": 1e-4, "maximize": True}),
    "rmsprop all": (a8multi.RMSprop8bit, {"centered": True, "momentum": 0.5, "eps": 1e-4, "weight_decay": 0.01}),
    "sgd": (a8multi.SGD8bit, {"lr": 0.1}),
    "sgd dampening alone": (a8multi.SGD8bit, {"lr": 0.1, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    "sgd momentum": (a8multi.SGD8bit, {"lr": 0.1, "momentum": 0.9}),
    "sgd dampened": (a8multi.SGD8bit, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd nesterov": (a8multi.SGD8bit, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adagrad": (a8multi.Adagrad8bit, {}),
    "adagrad decays": (a8multi.Adagrad8bit, {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    "ademamix": (a8multi.AdEMAMix8bit, {}),
    "ademamix warm-up": (a8multi.AdEMAMix8bit, {"t_alpha": 12, "t_beta3": 16, "betas": (0.9, 0.99, 0.999)}),
    "ademamix warm alpha": (a8multi.AdEMAMix8bit, {"t_alpha": 12, "alpha": 2.0, "weight_decay": 0.0}),
    "ademamix warm beta3": (a8multi.AdEMAMix8bit, {"t_beta3": 30, "eps": 1e-3, "maximize": True}),
    "lamb": (a8multi.LAMB8bit, {}),
    "lamb decay": (a8multi.LAMB8bit, {"lr": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.3, "maximize": True}),
    "lars": (a8multi.LARS8bit, {}),
    "lars momentum": (a8multi.LARS8bit, {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.01}),
    "lars nesterov": (a8multi.LARS8bit, {"momentum": 0.9, "nesterov": True, "eps": 0.1, "maximize": True}),
    "lars dampened": (a8multi.LARS8bit, {"momentum": 0.9, "dampening": 0.3}),
}
cases = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())


def _oracle_options(optimizer: Any) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {name: group[name] for name in _names(type(optimizer)) if name != "params"}


@cases
def test_float32_state_equals_the_rule_in_float64(backend: Any, kind: Any, options: dict[str, Any]) -> None:
    params = parameters(SMALL_SHAPES if options else EDGE_SHAPES, device=backend.device)
    optimizer = kind(params, **_float32(kind), **options)
    start = [p.detach().cpu().double() for p in params]
    wanted, moments = list(start), [rules.zeros(p) for p in start]
    ways = [torch.zeros_like(p) for p in start]
    rule_options, sign = _oracle_options(optimizer), -1 if options.get("maximize") else 1
    for step in range(1, 21):
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        for i, grad in enumerate(grads):
            g = sign * grad.cpu().double()
            before = wanted[i]
            wanted[i], moments[i] = RULES[kind](before, g, moments[i], step, **rule_options)
            ways[i] += (wanted[i] - before).abs()
    for param, exact, old, way in zip(params, wanted, start, ways, strict=True):
        _assert_near(param, exact, old, way, optimizer.param_groups[0]["lr"])
        if param.numel():
            assert float(way.min()) > 0, "the reference did not move, so nothing was compared"


def _assert_near(param: Tensor, exact: Tensor, old: Tensor, way: Tensor, lr: float) -> None:
    """Within half a unit of the last place for each of 20 steps, and the arithmetic of updates that go so far."""
    assert_within(param, exact, 20 * 2.0**-24 * (old.abs() + way) + 4e-6 * way + 2e-6 * lr, "after 20 steps")


IN_TORCH_CASES = {name: case for name, case in CASES.items() if case[0] in IN_TORCH}
IN_TORCH_CASES["adagrad starts"] = (a8multi.Adagrad8bit, {"initial_accumulator_value": 0.1})


@pytest.mark.parametrize(("kind", "options"), IN_TORCH_CASES.values(), ids=IN_TORCH_CASES.keys())
def test_float32_state_equals_torch(backend: Any, kind: Any, options: dict[str, Any]) -> None:
    """The optimizer of torch with the same arguments, on float64."""
    params = parameters(SMALL_SHAPES, device=backend.device)
    reference = [p.detach().cpu().double().requires_grad_() for p in params]
    start = [p.detach().clone() for p in reference]
    ways = [torch.zeros_like(p) for p in start]
    optimizer, expected = kind(params, **_float32(kind), **options), IN_TORCH[kind](reference, **options)
    for step in range(20):
        grads = gradients(params, step)
        before = [p.detach().clone() for p in reference]
        apply(optimizer, params, grads)
        apply(expected, reference, [g.cpu().double() for g in grads])
        ways = [w + (p.detach() - b).abs() for w, p, b in zip(ways, reference, before, strict=True)]
    for param, exact, old, way in zip(params, reference, start, ways, strict=True):
        _assert_near(param, exact.detach(), old, way, optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [a8multi.LAMB8bit, a8multi.LARS8bit])
def test_a_norm_of_zero_is_a_ratio_of_one(backend: Any, kind: Any) -> None:
    """Parameters that begin at zero move, and gradients that are zero make no NaN."""
    params = [torch.nn.Parameter(torch.zeros(200, device=backend.device)) for _ in range(2)]
    params += parameters([(200,)], device=backend.device)
    old = params[2].detach().clone()
    optimizer = kind(params, lr=0.1)
    grad = normal((200,), 1).to(backend.device)
    apply(optimizer, params, [grad, torch.zeros_like(grad), torch.zeros_like(grad)])
    moved = -0.1 * (grad if kind is a8multi.LARS8bit else grad / (grad.abs() + 1e-8))
    torch.testing.assert_close(params[0].detach(), moved, rtol=1e-5, atol=1e-7)
    assert not params[1].any()
    assert torch.equal(params[2], old)


def test_lamb_without_bias_correction(backend: Any) -> None:
    """The moments as they are: the ratio of norms takes the size of the whole away, and eps and decay feel the rest."""
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-3}
    params = parameters([(300,)], device=backend.device)
    optimizer = a8multi.LAMB8bit(params, bias_correction=False, **_float32(a8multi.LAMB8bit), **options)
    p = params[0].detach().cpu().double()
    first, second = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(5):
        (grad,) = gradients(params, step)
        apply(optimizer, params, [grad])
        g = grad.cpu().double()
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        u = first / (second.sqrt() + 1e-3) + 0.1 * p
        p = p - 0.1 * p.norm() / u.norm() * u
    assert_within(params[0], p, 2e-6 * p.abs().max(), "after 5 steps")


# --- Quantised state, one step at a time. ---

FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lion": (a8multi.Lion8bit, {"weight_decay": 0.1}),
    "lion nf4": (a8multi.Lion8bit, {"first_moment": "nf4", "block_size": 64}),
    "lion bf16": (a8multi.Lion8bit, {"first_moment": "bf16"}),
    "rmsprop": (a8multi.RMSprop8bit, {"weight_decay": 0.1}),
    "rmsprop momentum": (a8multi.RMSprop8bit, {"momentum": 0.9}),
    "rmsprop nearest": (a8multi.RMSprop8bit, {"momentum": 0.9, "stochastic_rounding": False, "block_size": 32}),
    "rmsprop nf4": (a8multi.RMSprop8bit, {"momentum": 0.9, "first_moment": "nf4", "second_moment": "fp32"}),
    "rmsprop centered": (a8multi.RMSprop8bit, {"momentum": 0.9, "centered": True, "eps": 1e-4}),
    "sgd": (a8multi.SGD8bit, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "sgd nesterov": (a8multi.SGD8bit, {"momentum": 0.9, "nesterov": True, "block_size": 4096}),
    "sgd nf4": (a8multi.SGD8bit, {"momentum": 0.9, "first_moment": "nf4"}),
    "adagrad": (a8multi.Adagrad8bit, {"weight_decay": 0.1, "lr_decay": 0.1}),
    "adagrad blocks of 64": (a8multi.Adagrad8bit, {"block_size": 64, "min_quantized_numel": 0}),
    "ademamix": (a8multi.AdEMAMix8bit, {}),
    "ademamix int8": (a8multi.AdEMAMix8bit, {"third_moment": "int8", "t_alpha": 3, "t_beta3": 5}),
    "ademamix nf4": (a8multi.AdEMAMix8bit, {"first_moment": "nf4", "third_moment": "nf4", "second_moment": "fp32"}),
    "ademamix bf16": (a8multi.AdEMAMix8bit, {"first_moment": "bf16", "third_moment": "bf16", "block_size": 32}),
    "lamb": (a8multi.LAMB8bit, {"weight_decay": 0.1}),
    "lamb nf4": (a8multi.LAMB8bit, {"first_moment": "nf4", "min_quantized_numel": 0}),
    "lars": (a8multi.LARS8bit, {"momentum": 0.9, "weight_decay": 0.1}),
    "lars nesterov": (a8multi.LARS8bit, {"momentum": 0.9, "nesterov": True, "first_moment": "bf16"}),
}
_SHORT = 8 * 2.0**-24
_FLUSHED = 1.2e-38


def _check(optimizer: Any, params: list[Any], grads: list[Tensor], step: int) -> None:
    """Takes one step from the state as it is stored, and holds every parameter and moment against the float64 rule."""
    kind, group = type(optimizer), optimizer.param_groups[0]
    options, block_size = _oracle_options(optimizer), group["block_size"]
    before = [(p.detach().cpu().double(), _decoded(optimizer, p)) for p in params]

    apply(optimizer, params, grads)

    for i, (param, grad, (p, old)) in enumerate(zip(params, grads, before, strict=True)):
        if not param.numel():
            continue
        what, state = f"parameter {i} of shape {tuple(param.shape)} at step {step}", optimizer.state[param]
        g = grad.detach().cpu().double() * (-1 if group["maximize"] else 1)
        expected, new = RULES[kind](p, g, old, step, **options)
        decay = group["weight_decay"] * p if kind in L2 else torch.zeros_like(p)
        effective = g.abs() + decay.abs()
        assert state["step"] == step
        for field, name in zip(new._fields, MOMENTS.values(), strict=True):
            if name not in state:
                continue
            exact, was = getattr(new, field), getattr(old, field)
            if name == "exp_avg_sq":
                # Where gradient and decay cancel, the square keeps their rounding.
                error = _SHORT * (exact + effective**2) + _FLUSHED
            else:
                error = _SHORT * (exact.abs() + was.abs() + decay.abs()) + _FLUSHED
            by_phases = group["stochastic_rounding"] and (name == "exp_avg_sq" or kind is a8multi.Lion8bit)
            assert_stored(state, name, exact, error, block_size, f"{name} of {what}", by_phases)
        way = (expected - p).abs()
        error = _SHORT * (p.abs() + way * effective / (g + decay).abs().clamp(min=1e-30)) + 4e-6 * way.max() + _FLUSHED
        if kind is a8multi.Lion8bit:
            # What float32 cannot tell from zero may have either sign.
            average = rules.average(old.first, g, group["betas"][0])
            unsure = average.abs() < 1e-6 * (old.first.abs() + g.abs())
            error = torch.where(unsure, 2 * group["lr"], error)
        assert_written(param, expected, error, group["stochastic_rounding_writeback"], what)


def _decoded(optimizer: Any, param: Tensor) -> rules.Moments:
    state, block_size = optimizer.state.get(param, {}), optimizer.param_groups[0]["block_size"]
    zero = torch.zeros(param.shape, dtype=torch.float64)
    return rules.Moments(
        *(decoded(state, name, param.shape, block_size) if name in state else zero for name in MOMENTS.values())
    )


@pytest.mark.parametrize(("kind", "options"), FORMATS.values(), ids=FORMATS.keys())
def test_each_step_is_exact_but_for_its_storage(backend: Any, kind: Any, options: dict[str, Any]) -> None:
    params = parameters([(), (33,), (129,), (4096,), (4097,), (16385,), (65, 300)], device=backend.device)
    optimizer = kind(params, **options)
    for step in range(1, 5):
        _check(optimizer, params, gradients(params, step, scale=1e-2 * 4.0**-step), step)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", RULES)
def test_each_step_of_16_bit_parameters(backend: Any, kind: Any, dtype: torch.dtype) -> None:
    params = parameters([(33,), (4097,), (65, 300)], dtype, backend.device)
    optimizer = kind(params, weight_decay=0.1, stochastic_rounding_writeback=dtype is torch.bfloat16)
    for step in range(1, 4):
        _check(optimizer, params, gradients(params, step), step)


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_sum_of_adagrad_goes_on(backend: Any, stochastic: bool) -> None:
    """After 400 steps each adds a four-hundredth, far below half a code of a wide block: to nearest, it would stall."""
    params = [torch.nn.Parameter(torch.zeros(4096, device=backend.device))]
    optimizer = a8multi.Adagrad8bit(params, lr=0.0, stochastic_rounding=stochastic)
    grad = (10.0 ** -(3 * torch.rand(4096, generator=torch.Generator().manual_seed(5)))).to(backend.device)
    for _ in range(400):
        apply(optimizer, params, [grad])
    held = decoded(optimizer.state[params[0]], "exp_avg_sq", (4096,), 128)
    error = held / (400 * grad.cpu().double() ** 2) - 1
    if stochastic:
        assert abs(float(error.mean())) < 0.05
        assert float(error.square().mean().sqrt()) < 0.1
    else:
        assert float(error.mean()) < -0.2


@pytest.mark.parametrize("second_moment", ["log8", "fp32"])
def test_adagrad_starts_where_it_is_told(backend: Any, second_moment: str) -> None:
    params = parameters([(4097,), (129,)], device=backend.device)
    optimizer = a8multi.Adagrad8bit(params, initial_accumulator_value=0.3, second_moment=second_moment, lr=0.0)
    apply(optimizer, params, [torch.zeros_like(p) for p in params])
    for param in params:
        held = decoded(optimizer.state[param], "exp_avg_sq", param.shape, 128)
        assert_within(held, torch.full_like(held, 0.3), 0.3 * 2.0**-14, "the sum of no squares")
    # What is there is not started anew.
    optimizer.param_groups[0]["initial_accumulator_value"] = 5.0
    apply(optimizer, params, [torch.zeros_like(p) for p in params])
    assert all(decoded(optimizer.state[p], "exp_avg_sq", p.shape, 128).max() < 0.31 for p in params)


# --- What is kept, and for how many bytes. ---

KEPT: dict[str, tuple[Any, dict[str, Any], set[str], float]] = {
    "lion": (a8multi.Lion8bit, {}, {"exp_avg"}, 1.03),
    "lion nf4": (a8multi.Lion8bit, {"first_moment": "nf4"}, {"exp_avg"}, 0.53),
    "rmsprop": (a8multi.RMSprop8bit, {}, {"exp_avg_sq"}, 1.03),
    "rmsprop momentum": (a8multi.RMSprop8bit, {"momentum": 0.9}, {"exp_avg", "exp_avg_sq"}, 2.06),
    "rmsprop centered": (a8multi.RMSprop8bit, {"centered": True}, {"exp_avg_sq", "exp_avg_slow"}, 8.0),
    "rmsprop all": (
        a8multi.RMSprop8bit,
        {"centered": True, "momentum": 0.9},
        {"exp_avg", "exp_avg_sq", "exp_avg_slow"},
        9.03,
    ),
    "sgd": (a8multi.SGD8bit, {}, set(), 0.0),
    "sgd momentum": (a8multi.SGD8bit, {"momentum": 0.9}, {"exp_avg"}, 1.03),
    "adagrad": (a8multi.Adagrad8bit, {}, {"exp_avg_sq"}, 1.03),
    "ademamix": (a8multi.AdEMAMix8bit, {}, {"exp_avg", "exp_avg_sq", "exp_avg_slow"}, 6.06),
    "ademamix int8": (
        a8multi.AdEMAMix8bit,
        {"third_moment": "int8"},
        {"exp_avg", "exp_avg_sq", "exp_avg_slow"},
        3.09,
    ),
    "lamb": (a8multi.LAMB8bit, {}, {"exp_avg", "exp_avg_sq"}, 2.06),
    "lars": (a8multi.LARS8bit, {}, set(), 0.0),
    "lars momentum": (a8multi.LARS8bit, {"momentum": 0.9}, {"exp_avg"}, 1.03),
}


@pytest.mark.parametrize(("kind", "options", "names", "size"), KEPT.values(), ids=KEPT.keys())
def test_moments_and_bytes_are_as_documented(kind: Any, options: dict[str, Any], names: set[str], size: float) -> None:
    params = parameters([(128, 512)])
    optimizer = kind(params, **options)
    run(optimizer, params, range(1))
    held = optimizer.state[params[0]]
    assert {name.removesuffix("_block") for name in held} == {"step", *names}
    found = sum(v.numel() * v.element_size() for v in held.values() if isinstance(v, Tensor)) / params[0].numel()
    assert found == pytest.approx(size, abs=0.006)


@pytest.mark.parametrize("kind", [a8multi.SGD8bit, a8multi.LARS8bit, a8multi.RMSprop8bit])
def test_a_momentum_that_comes_and_goes(kind: Any) -> None:
    """It begins at zero, and goes with its memory; the steps between are those without it."""
    params, twins = parameters([(4097,), (129,)]), parameters([(4097,), (129,)])
    optimizer, plain = kind(params), kind(twins)
    for step, momentum in enumerate((0.0, 0.9, 0.0)):
        optimizer.param_groups[0]["momentum"] = momentum
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        apply(plain, twins, grads)
        assert all(("exp_avg" in optimizer.state[p]) is (momentum > 0) for p in params)
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


# --- Coming from bitsandbytes. ---

POSITIONAL = {
    a8multi.Lion8bit: ["lr", "betas", "weight_decay"],
    a8multi.RMSprop8bit: ["lr", "alpha", "eps", "weight_decay", "momentum", "centered"],
    a8multi.SGD8bit: ["lr", "momentum", "dampening", "weight_decay", "nesterov"],
    a8multi.Adagrad8bit: ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"],
    a8multi.AdEMAMix8bit: ["lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay"],
    a8multi.LAMB8bit: ["lr", "bias_correction", "betas", "eps", "weight_decay"],
    a8multi.LARS8bit: ["lr", "momentum", "dampening", "weight_decay", "nesterov"],
}


@pytest.mark.parametrize("kind", POSITIONAL)
def test_positional_arguments_are_those_of_bitsandbytes(kind: Any) -> None:
    found = inspect.signature(kind).parameters.values()
    assert [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] == ["params", *POSITIONAL[kind]]


@pytest.mark.parametrize(
    "name", ["optim_bits", "args", "percentile_clipping", "block_wise", "is_paged", "max_unorm", "amsgrad"]
)
@pytest.mark.parametrize("kind", POSITIONAL)
def test_arguments_that_are_not_ours_are_refused(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        kind(parameters([(8,)]), **{name: None})

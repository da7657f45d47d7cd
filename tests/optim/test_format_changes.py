"""Options that decide how state is stored may change between steps: the state is converted, not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import (
    EDGE_SHAPES,
    TILE_SHAPE,
    assert_within,
    code_spacing,
    decoded,
    differences,
    gradients,
    parameters,
    raw,
    run,
    snapshot,
)

import a8multi
from a8multi.errors import StateFormatError
from a8multi.plan import matrix_shape

SHAPES = ((4097,), (65, 300), (129,), (20, 15, 16))


def _held(optimizer: Any, param: torch.Tensor, name: str) -> torch.Tensor:
    group = optimizer.param_groups[0]
    size = group["m_block_size"] if name == "exp_avg" and "m_block_size" in group else group["block_size"]
    return decoded(optimizer.state[param], name, param.shape, size)


def _still(optimizer: Any, params: Any) -> None:
    """A step that converts the state and, with the averages' decay undone, changes no more than rounding does."""
    group = optimizer.param_groups[0]
    kept = {k: group[k] for k in ("betas", "lr", "beta1", "beta2") if k in group}
    group["lr"] = 0.0
    tiny = 1e-7
    group.update({"betas": (1 - tiny,) * len(group["betas"])} if "betas" in group else {"beta2": 1 - tiny})
    if group.get("beta1") is not None:
        group["beta1"] = 1 - tiny
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    group.update(kept)


def _spacing(optimizer: Any, param: torch.Tensor, name: str, value: torch.Tensor) -> torch.Tensor:
    group = optimizer.param_groups[0]
    size = group["m_block_size"] if name == "exp_avg" and "m_block_size" in group else group["block_size"]
    return code_spacing(optimizer.state[param], name, value, size)


CHANGES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "quantize": (a8multi.Adafactor8bit, {"factored": False, "beta1": 0.9, "quantize": False}, {"quantize": True}),
    "dequantize": (a8multi.Adafactor8bit, {"factored": False, "beta1": 0.9}, {"quantize": False}),
    "nf4 to int8": (a8multi.Adafactor8bit, {"factored": False, "beta1": 0.9}, {"first_moment": "int8"}),
    "int8 to nf4": (a8multi.AdamW8bit, {}, {"first_moment": "nf4"}),
    "int8 to fp32": (a8multi.AdamW8bit, {}, {"first_moment": "fp32"}),
    "fp32 to bf16": (a8multi.AdamW8bit, {"first_moment": "fp32"}, {"first_moment": "bf16"}),
    "fp32 to log8": (a8multi.AdamW8bit, {"second_moment": "fp32"}, {"second_moment": "log8"}),
    "fp32 to int8, slow": (a8multi.AdEMAMix8bit, {"first_moment": "fp32"}, {"third_moment": "int8"}),
    "block size": (a8multi.AdamW8bit, {}, {"block_size": 512}),
    "least quantised size": (a8multi.AdamW8bit, {}, {"min_quantized_numel": 100}),
}


@pytest.mark.parametrize(("kind", "options", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_values_survive_a_change(backend: Any, kind: Any, options: dict[str, Any], change: dict[str, Any]) -> None:
    params = parameters(SHAPES, device=backend.device)
    optimizer = kind(params, **options)
    run(optimizer, params, range(5))
    names = [name for name in ("exp_avg", "exp_avg_sq", "exp_avg_slow") if name in optimizer.state[params[0]]]
    before = {(i, name): _held(optimizer, p, name) for i, p in enumerate(params) for name in names}
    optimizer.param_groups[0].update(change)
    _still(optimizer, params)
    for (i, name), value in before.items():
        param = params[i]
        # Stored to nearest when it is converted, then once more (log8: stochastically) by the step itself.
        bound = 3.1 * _spacing(optimizer, param, name, value) + 2e-6 * value.abs() + 1e-30
        assert_within(_held(optimizer, param, name), value, bound, f"{name} of parameter {i}")
        assert float(value.abs().max()) > 0
    assert all(optimizer.state[p]["step"] == 6 for p in params)
    run(optimizer, params, range(6, 8))
    assert all(p.isfinite().all() for p in params)


def test_full_to_factored_and_back(backend: Any) -> None:
    """The means of rows and columns are those of the full moment; back, it is their outer product."""
    params = parameters([(65, 300), (20, 15, 16)], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params, factored=False, quantize=False)
    run(optimizer, params, range(3))
    full = [_held(optimizer, p, "exp_avg_sq") for p in params]
    optimizer.param_groups[0]["factored"] = True
    _still(optimizer, params)
    means = []
    for param, value in zip(params, full, strict=True):
        matrix = value.reshape(matrix_shape(param.shape))
        state = optimizer.state[param]
        assert set(state) == {"step", "row_var", "col_var"}
        assert_within(state["row_var"], matrix.mean(1), 1e-5 * matrix.mean(1), "row_var")
        assert_within(state["col_var"], matrix.mean(0), 1e-5 * matrix.mean(0), "col_var")
        means.append((state["row_var"].cpu().double(), state["col_var"].cpu().double()))
    optimizer.param_groups[0]["factored"] = False
    _still(optimizer, params)
    for param, (row, col) in zip(params, means, strict=True):
        expected = (row[:, None] * col / row.mean()).reshape(param.shape)
        assert_within(_held(optimizer, param, "exp_avg_sq"), expected, 1e-5 * expected, "exp_avg_sq")


@pytest.mark.parametrize("factored", [True, False])
def test_a_first_moment_that_comes_and_goes(backend: Any, factored: bool) -> None:
    """The second moment is that of an optimizer whose first moment never changed."""
    params, twins = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, expected = (a8multi.Adafactor8bit(p, factored=factored, lr=0.0) for p in (params, twins))
    run(expected, twins, range(4))
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["beta1"] = 0.9
    run(optimizer, params, range(2, 3))
    assert all(float(_held(optimizer, p, "exp_avg").abs().max()) > 0 for p in params)
    optimizer.param_groups[0]["beta1"] = None
    run(optimizer, params, range(3, 4))
    for param, twin in zip(params, twins, strict=True):
        state, wanted = optimizer.state[param], expected.state[twin]
        assert state.keys() == wanted.keys()
        assert state["step"] == 4
        assert all(torch.equal(state[name], wanted[name]) for name in wanted if name != "step")


def test_one_group_changes_alone() -> None:
    params = parameters([(4096,), (4096,)])
    optimizer = a8multi.AdamW8bit([{"params": [params[0]]}, {"params": [params[1]], "first_moment": "nf4"}])
    run(optimizer, params, range(2))
    kept = optimizer.state[params[1]]["exp_avg"]
    optimizer.param_groups[0]["first_moment"] = "fp32"
    run(optimizer, params, range(2, 3))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[params[1]]["exp_avg"] is kept


def test_an_unchanged_format_is_not_stored_anew() -> None:
    """Toggling and back without a step between leaves every byte."""
    params = parameters([(65, 300)])
    optimizer = a8multi.Adafactor8bit(params, beta1=0.9)
    run(optimizer, params, range(2))
    before = {k: raw(v) for k, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor)}
    tensors = dict(optimizer.state[params[0]])
    optimizer.param_groups[0]["quantize"] = False
    optimizer.param_groups[0]["quantize"] = True
    params[0].grad = None
    optimizer.step()
    assert {k: raw(v) for k, v in optimizer.state[params[0]].items() if isinstance(v, torch.Tensor)} == before
    assert all(optimizer.state[params[0]][k] is v for k, v in tensors.items() if isinstance(v, torch.Tensor))


def test_parameters_of_every_shape_are_converted(backend: Any) -> None:
    params = parameters([*EDGE_SHAPES, TILE_SHAPE], device=backend.device)
    optimizer = a8multi.Adafactor8bit(params, beta1=0.9, min_8bit_size=0)
    for step, change in enumerate(
        [{}, {"quantize": False}, {"factored": False}, {"quantize": True}, {"factored": True}]
    ):
        optimizer.param_groups[0].update(change)
        for param, grad in zip(params, gradients(params, step), strict=True):
            param.grad = grad
        optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize(("before", "after"), [(0, 64), (64, 0), (4, 8)])
def test_another_rank_is_refused_before_anything_is_written(before: int, after: int) -> None:
    """Rank 64 of 64 rows: the projected moments have the shape of the parameter."""
    params = parameters([(128, 96), (64, 96)])
    groups = [{"params": params[:1]}, {"params": params[1:], "apollo_rank": before}]
    optimizer = a8multi.Adafactor8bit(groups, beta1=0.9, factored=False)
    run(optimizer, params, range(2))
    saved = snapshot(optimizer, params)
    optimizer.param_groups[0]["quantize"] = False
    optimizer.param_groups[1]["apollo_rank"] = after
    with pytest.raises(StateFormatError, match=rf"\[1\].* apollo_rank was {before} and is {after} now"):
        run(optimizer, params, range(2, 3))
    assert not differences(snapshot(optimizer, params), saved)
    del optimizer.state[params[1]]
    run(optimizer, params, range(2, 3))
    assert optimizer.state[params[1]]["step"] == 1


def test_half_of_a_factored_moment_is_refused() -> None:
    params = parameters([(65, 300)])
    optimizer = a8multi.Adafactor8bit(params)
    run(optimizer, params, range(1))
    del optimizer.state[params[0]]["col_var"]
    with pytest.raises(StateFormatError, match="row_var in the state"):
        run(optimizer, params, range(1, 2))

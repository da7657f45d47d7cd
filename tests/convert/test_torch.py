"""From torch.optim: what was kept is kept, and the next update is the one that would have come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convert.jobs import FP32, ROUNDING, STEPS, assert_moment, carried, trained, update_error
from optim.helpers import decoded, parameters

import a8multi
from a8multi.plan import matrix_shape


def _of(name: str, **options: Any) -> Any:
    return lambda params: getattr(a8multi, name)(params, **options)


def _torch(name: str, **options: Any) -> Any:
    return lambda params: getattr(torch.optim, name)(params, **options)


# torch's, ours, and theirs by the name of ours.
RULES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "adamw": (
        _torch("AdamW", lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1),
        _of("AdamW8bit", **FP32),
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    ),
    "adam": (
        _torch("Adam", weight_decay=0.1, maximize=True),
        _of("Adam8bit", **FP32),
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    ),
    "sgd": (
        _torch("SGD", lr=0.01, momentum=0.8, dampening=0.1, weight_decay=0.1),
        _of("SGD8bit", lr=0.5, momentum=0.9, first_moment="fp32"),
        {"exp_avg": "momentum_buffer"},
    ),
    "sgd nesterov": (
        _torch("SGD", lr=0.01, momentum=0.8, nesterov=True),
        _of("SGD8bit", lr=0.5, momentum=0.9, first_moment="fp32"),
        {"exp_avg": "momentum_buffer"},
    ),
    "rmsprop": (
        _torch("RMSprop", lr=0.01, alpha=0.9, weight_decay=0.1, momentum=0.5, centered=True),
        _of("RMSprop8bit", momentum=0.5, centered=True, **FP32),
        {"exp_avg": "momentum_buffer", "exp_avg_sq": "square_avg", "exp_avg_slow": "grad_avg"},
    ),
    "rmsprop plain": (
        _torch("RMSprop", lr=0.01, alpha=0.9),
        _of("RMSprop8bit", second_moment="fp32"),
        {"exp_avg_sq": "square_avg"},
    ),
    "adagrad": (
        _torch("Adagrad", lr=0.01, lr_decay=0.1, weight_decay=0.1),
        _of("Adagrad8bit", second_moment="fp32"),
        {"exp_avg_sq": "sum"},
    ),
}


@pytest.mark.parametrize(("make", "ours", "names"), RULES.values(), ids=RULES.keys())
def test_float32_state_is_the_same_and_so_is_the_next_update(make: Any, ours: Any, names: dict[str, str]) -> None:
    job = carried("torch", make, ours)
    for number, param in enumerate(job.params):
        state = job.ours.state[job.twins[number]]
        assert set(state) == {"step", *names}
        assert state["step"] == int(job.peer.state[param].get("step", 1))
        for name, theirs in names.items():
            assert_moment(job, number, name, job.peer.state[param][theirs])
    assert update_error(job) <= ROUNDING


def test_eight_bits() -> None:
    """Every moment to the nearest code, and the next update as near as those codes are: measured 0.031."""
    job = carried("torch", torch.optim.AdamW, a8multi.AdamW8bit)
    for number, param in enumerate(job.params):
        for name in ("exp_avg", "exp_avg_sq"):
            assert_moment(job, number, name, job.peer.state[param][name])
    assert update_error(job) <= 0.04


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_in_sixteen_bits(dtype: torch.dtype) -> None:
    job = carried("torch", torch.optim.AdamW, _of("AdamW8bit", **FP32), dtype=dtype)
    for number, param in enumerate(job.params):
        assert job.peer.state[param]["exp_avg"].dtype is dtype
        assert_moment(job, number, "exp_avg", job.peer.state[param]["exp_avg"])


def test_channels_last_state() -> None:
    def peer(params: Any) -> Any:
        for param in params:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
        return torch.optim.AdamW(params)

    job = carried("torch", peer, _of("AdamW8bit", **FP32), shapes=[(8, 4, 3, 3)])
    assert not job.peer.state[job.params[0]]["exp_avg"].is_contiguous()
    assert_moment(job, 0, "exp_avg", job.peer.state[job.params[0]]["exp_avg"])
    assert update_error(job) <= ROUNDING


# --- Adafactor. ---

MATRICES = ((64, 320), (65, 30), (4097,), (129,), ())


def test_adafactor() -> None:
    make = _torch("Adafactor", lr=3e-3, beta2_decay=-0.7, d=1.5, weight_decay=0.1)
    job = carried("torch", make, _of("Adafactor8bit", quantize=False), shapes=MATRICES)
    for number, param in enumerate(job.params):
        state, theirs = job.ours.state[job.twins[number]], job.peer.state[param]
        assert state["step"] == STEPS
        if param.ndim == 2:
            assert torch.equal(state["row_var"], theirs["row_var"][:, 0])
            assert torch.equal(state["col_var"], theirs["col_var"][0])
        else:
            assert_moment(job, number, "exp_avg_sq", theirs["variance"])
    assert update_error(job) <= ROUNDING


def _estimate(state: Any) -> torch.Tensor:
    row, col = state["row_var"].double(), state["col_var"].double()
    return row * col / row.mean(dim=-2, keepdim=True)


@pytest.mark.parametrize("factored", [True, False])
def test_adafactor_of_more_dimensions(factored: bool) -> None:
    """torch factors over the last two dimensions, ours as one matrix: the moment that its factors stand for is kept."""
    ours = _of("Adafactor8bit", quantize=False, factored=factored)
    job = carried("torch", torch.optim.Adafactor, ours, shapes=[(8, 4, 3, 5), (3, 5, 7)])
    for param, twin in zip(job.params, job.twins, strict=True):
        estimate, state = _estimate(job.peer.state[param]), job.ours.state[twin]
        if factored:
            matrix = estimate.reshape(matrix_shape(param.shape))
            for name, dim in (("row_var", 1), ("col_var", 0)):
                torch.testing.assert_close(state[name].double(), matrix.mean(dim), rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(decoded(state, "exp_avg_sq", param.shape, 0), estimate, rtol=1e-6, atol=0)


def test_element_by_element_from_factors() -> None:
    job = carried(
        "torch", torch.optim.Adafactor, _of("Adafactor8bit", factored=False, block_size=256), shapes=[(64, 320)]
    )
    assert_moment(job, 0, "exp_avg_sq", _estimate(job.peer.state[job.params[0]]), 256)


# --- Groups. ---


def test_groups_keep_what_the_source_had_and_what_is_ours() -> None:
    params = parameters([(64, 320), (129,)])
    peer = torch.optim.AdamW(
        [
            {"params": params[:1], "lr": torch.tensor(0.5)},
            {"params": params[1:], "weight_decay": 0.0, "betas": (0.5, 0.75)},
        ]
    )
    torch.optim.lr_scheduler.ConstantLR(peer, factor=0.5)
    twins = parameters([(64, 320), (129,)])
    ours = a8multi.AdamW8bit(
        [{"params": twins[:1]}, {"params": twins[1:], "block_size": 64}], first_moment="nf4", seed=7
    )
    before = [dict(group) for group in ours.param_groups]
    converted = a8multi.convert_state_dict(peer.state_dict(), "torch", optimizer=ours)
    assert [dict(group) for group in ours.param_groups] == before
    first, second = converted["param_groups"]
    assert (first["lr"], first["weight_decay"], first["first_moment"], first["seed"]) == (0.25, 0.01, "nf4", 7)
    assert type(first["lr"]) is float
    assert float(first["initial_lr"]) == 0.5  # the scheduler's own
    assert (second["weight_decay"], second["betas"], second["block_size"]) == (0.0, (0.5, 0.75), 64)
    assert (first["params"], second["params"]) == ([0], [1])
    assert "amsgrad" not in first
    assert converted["state"] == {}  # nothing was stepped
    ours.load_state_dict(converted)
    assert ours.param_groups[1]["betas"] == (0.5, 0.75)


def test_parameters_without_state_start_anew() -> None:
    params = parameters([(129,), (130,)])
    peer = torch.optim.AdamW(params)
    params[1].grad = torch.ones(130)
    peer.step()
    ours = a8multi.AdamW8bit(parameters([(129,), (130,)]))
    assert set(a8multi.convert_state_dict(peer.state_dict(), "torch", optimizer=ours)["state"]) == {1}


def test_a_learning_rate_on_a_tensor_and_steps_on_the_device() -> None:
    peer, params = trained(torch.optim.AdamW)
    ours = a8multi.AdamW8bit(params, lr=torch.tensor(1.0), capturable=True)
    converted = a8multi.convert_state_dict(peer.state_dict(), "torch", optimizer=ours)
    assert torch.equal(converted["param_groups"][0]["lr"], torch.tensor(1e-3))
    ours.load_state_dict(converted)
    assert ours.state[params[0]]["step"].dtype is torch.int64
    assert int(ours.state[params[0]]["step"]) == STEPS

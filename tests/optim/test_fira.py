"""Fira's limiter of projected updates switched off: the steps against float64, what is stored, every way to say it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, differences, gradients, parameters, run, snapshot
from oracle import adam, apollo
from torch import Tensor

import a8multi
from a8multi.backend.torch_formats import random_integers
from a8multi.plan import matrix_shape

SHAPES = ((65, 300), (300, 64), (64, 3, 3, 3))
RANK, GAP = 8, 3
APOLLO = {"rank": RANK, "update_proj_gap": GAP, "quantize": False}


def _growing(params: list[Any], step: int) -> list[Tensor]:
    """Gradients of which the first cancel each other and the others agree: the updates grow, and a limiter acts."""
    sign = -1.0 if step in (1, 3) else 1.0
    pairs = zip(gradients(params, 0), gradients(params, step), strict=True)
    return [sign * (common + 0.1 * own) for common, own in pairs]


class _Reference:
    """The paper's algorithm without its limiter, of one matrix."""

    def __init__(self, d: float) -> None:
        self._d = d
        self._moments: adam.Moments | None = None

    def step(self, param: Tensor, grad: Tensor, step: int) -> Tensor:
        """The new parameter, float64."""
        shape = matrix_shape(param.shape)
        p, g = param.reshape(shape), grad.double().reshape(shape)
        high = shape[0] > shape[1]
        p, g = (p.T, g.T) if high else (p, g)
        drawn = random_integers(0, (step - 1) // GAP, p.shape[0], RANK * p.shape[0], torch.device("cpu"))
        projection = drawn.double().view(RANK, -1) / (2 * math.sqrt(RANK))
        zeros = torch.zeros(RANK, p.shape[1], dtype=torch.float64)
        old = self._moments or adam.Moments(zeros, zeros)
        new, self._moments = apollo.apollo(p, g, old, step, projection, lr=1.0)
        update = p - new
        if self._d:
            update = update / max(1.0, float(update.square().mean().sqrt()) / self._d)
        new = p * (1 - 1e-2 * 0.1) - 1e-2 * update
        return (new.T if high else new).reshape(param.shape)


@pytest.mark.parametrize("d", [0.0, 0.15], ids=["whole", "clipped"])
def test_equals_the_reference_without_a_limiter(d: float, backend: BackendCase) -> None:
    made = [parameters(SHAPES, device=backend.device) for _ in range(2)]
    free, limited = (
        a8multi.APOLLO8bit(params, lr=1e-2, weight_decay=0.1, enable_fira=on, d=d, **APOLLO)
        for params, on in zip(made, (False, True), strict=True)
    )
    references = [_Reference(d) for _ in SHAPES]
    apart = 0.0
    for step in range(1, 8):
        before = [p.detach().cpu().double() for p in made[0]]
        grads = _growing(made[0], step)
        apply(free, made[0], grads)
        apply(limited, made[1], _growing(made[1], step))
        for i, (p, old, g) in enumerate(zip(made[0], before, grads, strict=True)):
            expected = references[i].step(old, g.cpu(), step)
            found, other = (q.detach().cpu().double() for q in (p, made[1][i]))
            assert (found - expected).norm() <= 1e-4 * (expected - old).norm() + 1e-7 * old.norm(), (i, step)
            apart = max(apart, float((found - other).norm() / (found - old).norm()))
    assert apart > 0.1  # with the limiter it is another run
    assert all("update_norm" not in free.state[p] for p in made[0])
    assert all(float(limited.state[p]["update_norm"]) > 0 for p in made[1])


def _of_apollo(params: Any) -> Any:
    return a8multi.APOLLO8bit(params, enable_fira=False, **APOLLO)


def _by_the_name_of_adafactor(params: Any) -> Any:
    return a8multi.APOLLO8bit(params, enable_fira_for_apollo=False, **APOLLO)


def _in_a_group(params: Any) -> Any:
    return a8multi.APOLLO8bit([{"params": params, "enable_fira": False}], **APOLLO)


def _of_adafactor(params: Any) -> Any:
    # Adam in the place of what is Adafactor's own.
    plain: dict[str, Any] = {"d": 0.0, "relative_step": False, "scale_parameter": False, "scale_weight_decay": False}
    return a8multi.Adafactor8bit(
        params,
        beta1=0.9,
        beta2=0.999,
        eps=(1e-8, 0.0),
        quantize=False,
        apollo_rank=RANK,
        apollo_update_proj_gap=GAP,
        enable_fira_for_apollo=False,
        **plain,
    )


@pytest.mark.parametrize("make", [_by_the_name_of_adafactor, _in_a_group, _of_adafactor])
def test_however_it_is_said(make: Any) -> None:
    runs = []
    for each in (_of_apollo, make):
        params = parameters(SHAPES)
        optimizer = each(params)
        for step in range(4):
            apply(optimizer, params, _growing(params, step))
        runs.append(snapshot(optimizer, params))
    assert not differences(*runs)


def test_groups_with_and_without() -> None:
    """Each as by itself, though both are in one call."""
    params = parameters(SHAPES[:2])
    alone = [parameters(SHAPES[:2])[i] for i in range(2)]
    groups = [{"params": params[:1], "enable_fira": False}, {"params": params[1:]}]
    optimizer = a8multi.APOLLO8bit(groups, **APOLLO)
    free, limited = a8multi.APOLLO8bit(alone[:1], enable_fira=False, **APOLLO), a8multi.APOLLO8bit(alone[1:], **APOLLO)
    for step in range(5):
        grads = _growing(params, step)
        apply(optimizer, params, grads)
        apply(free, alone[:1], grads[:1])
        apply(limited, alone[1:], grads[1:])
    assert not differences(snapshot(optimizer, params), snapshot(free, alone[:1]) + snapshot(limited, alone[1:]))


def test_changed_between_steps(backend: BackendCase) -> None:
    """Off: the norm is dropped. On again: the next step has none to be limited by, and is kept to limit the others."""
    params = parameters(SHAPES[:1], device=backend.device)
    optimizer = a8multi.APOLLO8bit(params, **APOLLO)
    run(optimizer, params, range(2))
    assert "update_norm" in optimizer.state[params[0]]
    optimizer.param_groups[0]["enable_fira_for_apollo"] = False
    run(optimizer, params, range(2, 3))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.param_groups[0]["enable_fira_for_apollo"] = True
    norms = []
    for scale in (1e-2, 1e-1):
        run(optimizer, params, range(3, 4), scale=scale)
        norms.append(float(optimizer.state[params[0]]["update_norm"]))
    assert 0 < norms[1] <= norms[0] * 1.01 * (1 + 1e-6)


def test_state_of_the_other_kind_is_refused() -> None:
    params = parameters(SHAPES[:1])
    optimizer = _of_apollo(params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(a8multi.StateFormatError, match="enable_fira_for_apollo=False"):
        a8multi.APOLLO8bit(params, **APOLLO).load_state_dict(saved)
    again = _of_apollo(params)
    again.load_state_dict(saved)
    assert not differences(snapshot(again, params), snapshot(optimizer, params))


def test_it_is_of_projected_parameters_alone() -> None:
    """As enable_fira_for_adafactor is of the others."""
    for options, limited in (
        ({}, [True, False]),
        ({"enable_fira_for_adafactor": True, "enable_fira_for_apollo": False}, [False, True]),
    ):
        params = parameters([(64, 96), (70,)])
        optimizer = a8multi.Adafactor8bit(params, apollo_rank=RANK, **options)
        run(optimizer, params, range(1))
        assert ["update_norm" in optimizer.state[p] for p in params] == limited

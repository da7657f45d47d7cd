"""APOLLO: the steps against float64, the projection, resuming, groups with and without it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, differences, gradients, parameters, run, snapshot
from oracle import adafactor, adam, apollo
from torch import Tensor

import a8multi
from a8multi.backend.torch_formats import random_integers
from a8multi.optim import projection

SHAPES = ((65, 300), (512, 256), (300, 64), (64, 3, 3, 3), (129,))
GAP = 3


def _reference(param: Tensor, grad: Tensor, held: dict[str, Any], step: int, options: dict[str, Any]) -> Tensor:
    """The oracle's step with the limiter, on a matrix. Returns the new parameter."""
    rank, lr = options["rank"], options["lr"]
    high = param.shape[0] > param.shape[1]
    p, g = (param.T, grad.double().T) if high else (param, grad.double())
    drawn = random_integers(0, (step - 1) // GAP, p.shape[0], rank * p.shape[0], torch.device("cpu"))
    projection = drawn.double().view(rank, -1) / (2 * math.sqrt(rank))
    if "moments" not in held:
        low = projection @ g
        held["moments"] = adam.Moments(torch.zeros_like(low), torch.zeros_like(low))
    new, held["moments"] = apollo.apollo(
        p,
        g,
        held["moments"],
        step,
        projection,
        lr=1.0,
        scale=math.sqrt(options["scale"]),
        scale_type=options["scale_type"],
        betas=(options["beta1"], 0.999),
    )
    update, held["norm"] = adafactor.limited(p - new, held.get("norm", 0.0), 1.01)
    new = p * (1 - lr * 0.1) - lr * update
    return new.T if high else new


@pytest.mark.parametrize("options", [
    {"rank": 16, "scale_type": "channel", "scale": 1.0, "beta1": 0.9},
    {"rank": 16, "scale_type": "channel", "scale": 1.0, "beta1": 0.0},
    {"rank": 1, "scale_type": "tensor", "scale": 128.0, "beta1": 0.9},
], ids=["channel", "without momentum", "mini"])  # fmt: skip
def test_the_papers_algorithm(options: dict[str, Any], backend: BackendCase) -> None:
    options = {**options, "lr": 1e-2}
    shapes = SHAPES[:4]
    params = parameters(shapes, device=backend.device)
    optimizer = a8multi.APOLLO8bit(
        params,
        lr=options["lr"],
        rank=options["rank"],
        update_proj_gap=GAP,
        scale_type=options["scale_type"],
        scale=options["scale"],
        betas=(options["beta1"], 0.999),
        weight_decay=0.1,
        quantize=False,
    )
    held: list[dict[str, Any]] = [{} for _ in params]
    for step in range(1, 9):
        before = [p.detach().cpu().double() for p in params]
        grads = gradients(params, step)
        # Sizes that jump, so that the limiter has something to do.
        grads = [g * (1 + 4 * (step % 3 == 0)) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            shape = (64, 27) if p.ndim == 4 else tuple(p.shape)
            old = before[i].reshape(shape)
            expected = _reference(old, g.cpu().reshape(shape), held[i], step, options)
            found = p.detach().cpu().double().reshape(shape)
            assert (found - expected).norm() <= 1e-4 * (expected - old).norm() + 1e-7 * old.norm(), (i, step)


MAKES: dict[str, Callable[..., Any]] = {
    "nf4": lambda params: a8multi.Adafactor8bit(
        params,
        apollo_rank=16,
        apollo_update_proj_gap=GAP,
        beta1=0.9,
        beta2=0.999,
        relative_step=False,
        first_moment="nf4",
    ),
    "no momentum": lambda params: a8multi.Adafactor8bit(params, apollo_rank=16, apollo_update_proj_gap=GAP),
    "factorized": lambda params: a8multi.Adafactor8bit(
        params, apollo_rank=16, apollo_update_proj_gap=GAP, apollo_factorize=True, beta1=0.9
    ),
    "apollo8bit": lambda params: a8multi.APOLLO8bit(params, rank=16, update_proj_gap=GAP),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


@makes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_in_the_middle_of_a_gap(make: Callable[..., Any], dtype: torch.dtype, backend: BackendCase) -> None:
    params = parameters(SHAPES, dtype, backend.device)
    optimizer = make(params)
    run(optimizer, params, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(optimizer, params, range(4, 9))
    resumed = make(twins)
    resumed.load_state_dict(saved)
    run(resumed, twins, range(4, 9))
    assert not differences(snapshot(resumed, twins), snapshot(optimizer, params))


@makes
def test_replicas_stay_identical(make: Callable[..., Any]) -> None:
    """The projection follows from seed and step alone, not from a device's generator."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params = parameters(SHAPES)
        optimizer = make(params)
        run(optimizer, params, range(4))
        runs.append(snapshot(optimizer, params))
    assert not differences(*runs)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_waves_change_no_bit(scale_type: str, backend: BackendCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks differ, so a wave of several matrices has gains of its own for each, and one of a single matrix has not."""
    steps = []
    for least, count in ((1 << 23, 1), (1, 4)):
        monkeypatch.setattr(projection, "_LEAST", least)
        params = parameters([*SHAPES, (20, 30)], device=backend.device)
        optimizer = a8multi.APOLLO8bit(params, rank=32, update_proj_gap=GAP, scale_type=scale_type, min_8bit_size=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(optimizer, params, range(5))
        (work,) = optimizer._roster.works.values()
        assert len(work.projection._waves) == count
        steps.append(snapshot(optimizer, params))
    assert not differences(*steps)


def test_parameters_that_are_steps_apart_have_their_own_random_matrix() -> None:
    """One that began later is in an earlier interval, though of the same size and in the same wave."""
    together, alone = parameters([(64, 128), (64, 128)]), parameters([(64, 128), (64, 128)])
    optimizer = a8multi.APOLLO8bit(together, rank=8, update_proj_gap=GAP, seed=3)
    for step in range(6):
        grads: list[Tensor | None] = [*gradients(together, step)]
        apply(optimizer, together, [grads[0], None if step < 2 else grads[1]])
    late = a8multi.APOLLO8bit(alone, rank=8, update_proj_gap=GAP, seed=3)
    for step in range(2, 6):
        apply(late, alone, [None, gradients(alone, step)[1]])
    assert not differences(snapshot(optimizer, together)[1:], snapshot(late, alone)[1:])


def test_only_the_last_random_matrix_of_a_size_is_kept() -> None:
    params = parameters([(64, 128), (64, 300), (32, 64)])
    optimizer = a8multi.APOLLO8bit(params, rank=8, update_proj_gap=1)
    run(optimizer, params, range(3))
    (work,) = optimizer._roster.works.values()
    kept = {(seed, *matrix.shape): taken for (_, seed, *_), (matrix, taken) in work.drawn._kept.items()}
    assert kept == {(0, 8, 32): 2, (0, 8, 64): 2}


def test_the_random_matrix_is_nearly_normal() -> None:
    def draw(seed: int, interval: int) -> Tensor:
        return random_integers(seed, interval, 2048, 256 * 2048, torch.device("cpu")).view(256, 2048).float()

    drawn = draw(0, 0)
    assert drawn.mean().abs() < 0.02
    assert abs(float(drawn.var()) - 4.0) < 0.05
    assert torch.equal(drawn, drawn.bfloat16().float())
    for other in ((0, 1), (1, 0)):
        again = draw(*other)
        assert abs(float((drawn * again).mean())) < 0.05
    # Rows and columns have nothing to do with each other.
    for a, b in ((drawn[0], drawn[1]), (drawn[:, 0], drawn[:, 1]), (drawn[0, :-1], drawn[0, 1:])):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 0.2


def test_a_rank_above_the_matrix_is_lowered_with_one_warning() -> None:
    params = parameters([(8, 300), (300, 16), (64, 64)])
    optimizer = a8multi.APOLLO8bit(params, rank=32)
    with pytest.warns(UserWarning, match="^rank=32 is above") as caught:
        run(optimizer, params, range(1))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, params, range(1, 3))
    assert optimizer.state[params[0]]["exp_avg"].shape == (8, 300)


@pytest.mark.parametrize("wrapped", [False, True], ids=["", "by a scheduler"])
def test_the_warning_comes_once_an_optimizer_and_points_at_the_call(wrapped: bool) -> None:
    params = parameters([(8, 300), (300, 16)])
    optimizer = a8multi.Adafactor8bit(params[:1], apollo_rank=32)
    if wrapped:
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for param, grad in zip(params, gradients(params, step), strict=True):
                param.grad = grad
            optimizer.step()
            if step == 0:
                optimizer.add_param_group({"params": params[1:]})
    assert [str(each.message)[:14] for each in caught] == ["apollo_rank=32"]
    assert caught[0].filename == __file__


def test_a_zero_first_gradient_does_not_lock_the_limiter() -> None:
    params = parameters([(64, 128)])
    optimizer = a8multi.APOLLO8bit(params, rank=8)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    before = params[0].detach().clone()
    twin = [torch.nn.Parameter(before.clone())]
    other = a8multi.APOLLO8bit(twin, rank=8)
    params[0].grad = twin[0].grad = gradients(params, 1)[0]
    optimizer.step()
    other.step()
    # Two steps in, the bias corrections differ; the size of the step does not.
    ratio = float((params[0].detach() - before).norm() / (twin[0].detach() - before).norm())
    assert 0.5 < ratio < 2


def test_strided_parameters_and_gradients() -> None:
    plain = parameters([(64, 128)])
    strided = [torch.nn.Parameter(plain[0].detach().clone().t().contiguous().t())]
    assert not strided[0].is_contiguous()
    one, other = a8multi.APOLLO8bit(plain, rank=8), a8multi.APOLLO8bit(strided, rank=8)
    for step in range(3):
        plain[0].grad = gradients(plain, step)[0]
        strided[0].grad = plain[0].grad.t().contiguous().t()
        one.step()
        other.step()
        torch.testing.assert_close(strided[0], plain[0], rtol=1e-6, atol=1e-7)


def test_groups_with_and_without_projection() -> None:
    params = parameters([(64, 128), (128, 64), (70,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "apollo_rank": 0}]
    optimizer = a8multi.APOLLO8bit(groups, rank=8)
    run(optimizer, params, range(3))
    assert optimizer.state[params[0]]["exp_avg_sq"].shape == (8, 128)
    assert optimizer.state[params[1]]["exp_avg_sq"].shape == (128, 64)
    assert "update_norm" not in optimizer.state[params[1]]


def test_a_projected_moment_is_int8_unless_one_says_otherwise() -> None:
    def stored(**options: Any) -> list[torch.dtype]:
        params = parameters([(64, 512), (8200,)])
        optimizer = a8multi.Adafactor8bit(params, beta1=0.9, apollo_rank=32, min_8bit_size=0, **options)
        run(optimizer, params, range(1))
        return [optimizer.state[p]["exp_avg"].dtype for p in params]

    assert stored() == [torch.int8, torch.uint8]
    assert stored(first_moment="nf4") == [torch.uint8, torch.uint8]
    assert stored(first_moment="int8") == [torch.int8, torch.int8]


def test_what_is_not_projected_follows_adamw() -> None:
    params, twins = parameters([(300,)]), parameters([(300,)])
    optimizer = a8multi.APOLLO8bit(params, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        params[0].grad = twins[0].grad = gradients(params, step)[0]
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params[0], twins[0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "^rank must be an integer >= 0"),
        ({"rank": 2.5}, "^rank must be an integer"),
        ({"update_proj_gap": 0}, "^update_proj_gap"),
        ({"scale_type": "row"}, "^scale_type must be one of channel, tensor"),
        ({"scale": 0.0}, "^scale must"),
        ({"eps": 0.0}, "^eps must"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"beta3": 0.9999, "factored": True}, "exclude each other"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a8multi.APOLLO8bit(parameters([(8, 8)]), **options)


@pytest.mark.parametrize(
    "change",
    [{"seed": 5}, {"apollo_scale": 2.0}, {"apollo_scale_type": "tensor"}, {"apollo_update_proj_gap": 1}],
    ids=lambda change: next(iter(change)),
)
def test_options_that_change_between_steps_count(change: dict[str, Any]) -> None:
    """At once: as for an optimizer that has kept nothing of the steps before."""
    trained = []
    for forgets in (False, True):
        params = parameters(((48, 96), (96, 48)))
        optimizer = a8multi.Adafactor8bit(params, lr=1e-2, beta1=0.9, apollo_rank=8)
        run(optimizer, params, range(2))
        optimizer.param_groups[0].update(change)
        if forgets:
            optimizer._roster = None
        run(optimizer, params, range(2, 4))
        trained.append(snapshot(optimizer, params))
    assert not differences(*trained)
    unchanged = parameters(((48, 96), (96, 48)))
    run(a8multi.Adafactor8bit(unchanged, lr=1e-2, beta1=0.9, apollo_rank=8), unchanged, range(4))
    assert not torch.equal(unchanged[0], params[0])


def test_a_step_that_fails_counts_as_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projected parameters may have been written when a later call fails; autograd has to know."""
    params = parameters([(48, 96), (96, 48)])
    optimizer = a8multi.APOLLO8bit(params, rank=8)
    run(optimizer, params, range(1))
    versions = [param._version for param in params]

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(type(optimizer._backend(params[0].device)), "adafactor_scaled", fail)
    with pytest.raises(RuntimeError, match="device is gone"):
        run(optimizer, params, range(1, 2))
    assert all(param._version > before for param, before in zip(params, versions, strict=True))


@pytest.mark.parametrize("kind", [
    lambda params: a8multi.APOLLO8bit(params, rank=256, weight_decay=0.0),
    lambda params: a8multi.APOLLO8bit(params, rank=1, scale_type="tensor", scale=128.0, weight_decay=0.0),
    lambda params: a8multi.Adafactor8bit(params, apollo_rank=32, beta1=0.9, beta2=0.999, weight_decay=0.0),
    lambda params: a8multi.APOLLO8bit(params, rank=256, enable_fira=True, weight_decay=0.0),
], ids=["channel", "mini", "adafactor", "fira"])  # fmt: skip
@pytest.mark.parametrize("zero", ["rows", "columns", "all"])
def test_channels_without_a_gradient_after_one_stay_finite(kind: Any, zero: str, backend: BackendCase) -> None:
    """Rows of tokens that a batch lacks, dead features, idle experts: their averages are not zero (pitfall 4)."""
    params = parameters([(300, 512), (512, 300)], device=backend.device)
    optimizer = kind(params)
    for step in range(4):
        grads = gradients(params, step, scale=1.0)
        if step:
            for grad in grads:
                {"rows": grad[::3], "columns": grad[:, ::3], "all": grad}[zero].zero_()
        before = [param.detach().clone() for param in params]
        apply(optimizer, params, grads)
        for param, old, grad in zip(params, before, grads, strict=True):
            assert param.isfinite().all()
            assert torch.equal(param[grad == 0], old[grad == 0])  # the update is the gradient, scaled

"""APOLLO with steps that are counted on the device: the bits of steps counted by the host, and steps that are skipped.

On the CPU, where the very code that a GPU runs is in the host library. Graphs: test_cuda_graph.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, counted, differences, gradients, parameters, run, snapshot

import a8multi
from a8multi.backend.registry import backend_for
from a8multi.backend.torch_formats import random_integers
from a8multi.errors import BackendUnavailable, NativeError
from a8multi.optim import projection

# One that is not projected, two of a size, one of more dimensions.
SHAPES = ((65, 90), (96, 64), (64, 96), (129,), (16, 3, 5, 5))
GAP = 3
MAKES: dict[str, Callable[..., Any]] = {
    "apollo": lambda params, **o: a8multi.APOLLO8bit(params, rank=8, update_proj_gap=GAP, min_8bit_size=512, **o),
    "without momentum": lambda params, **o: a8multi.APOLLO8bit(
        params, rank=8, update_proj_gap=GAP, betas=(0.0, 0.99), first_moment="fp32", **o
    ),
    "mini": lambda params, **o: a8multi.APOLLO8bit(
        params, rank=1, update_proj_gap=GAP, scale_type="tensor", scale=128.0, **o
    ),
    "factorized": lambda params, **o: a8multi.Adafactor8bit(
        params, apollo_rank=8, apollo_update_proj_gap=GAP, apollo_factorize=True, beta1=0.9, **o
    ),
    "beta2 decays": lambda params, **o: a8multi.Adafactor8bit(params, apollo_rank=8, apollo_update_proj_gap=GAP, **o),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
LIVE: dict[str, dict[str, bool]] = {
    "capturable": {"capturable": True},
    "skip": {"skip_nonfinite": True},
    "both": {"capturable": True, "skip_nonfinite": True},
}
lives = pytest.mark.parametrize("options", LIVE.values(), ids=LIVE.keys())


def _same(one: Any, params: Any, other: Any, twins: Any) -> None:
    assert not differences(counted(one, params), counted(other, twins))


def _pair(backend: BackendCase, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> tuple[Any, Any]:
    return parameters(shapes, dtype, backend.device), parameters(shapes, dtype, backend.device)


@lives
@makes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_steps_counted_by_the_host(make: Any, options: Any, dtype: Any, backend: BackendCase) -> None:
    """Over four random matrices; one parameter's gradient comes and goes, so it is in intervals of its own."""
    params, twins = _pair(backend, dtype)
    plain, counting = make(params), make(twins, **options)
    for step in range(11):
        present = [None if i == 1 and step % 4 == 2 else g for i, g in enumerate(gradients(params, step))]
        for optimizer, each in ((plain, params), (counting, twins)):
            optimizer.param_groups[0]["lr"] = torch.tensor(1e-2 / (1 + step)) if step % 2 else 1e-2
            apply(optimizer, each, present)
    _same(counting, twins, plain, params)
    assert [int(counting.state[p]["step"]) for p in twins] == [11, 8, 11, 11, 11]


@lives
@makes
def test_what_is_not_contiguous(make: Any, options: Any, backend: BackendCase) -> None:
    """A parameter and a gradient, beside others in the plan and with nothing in it."""
    for shapes in (((64, 70), (40, 30), (48, 30)), ((64, 70),)):
        params, twins = _pair(backend, shapes=shapes)
        for each in (params, twins):
            each[0].data = each[0].data.t().contiguous().t()
        plain, counting = make(params), make(twins, **options)
        for step in range(5):
            grads = gradients(params, step)
            grads[-1] = grads[-1].t().contiguous().t()
            apply(plain, params, grads)
            apply(counting, twins, [g.clone() for g in grads])
        _same(counting, twins, plain, params)


@makes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_steps_leave_no_trace(make: Any, dtype: Any, backend: BackendCase) -> None:
    """The first step, those that would have drawn another matrix, and two in a row."""
    params, twins = _pair(backend, dtype)
    skipping, plain = make(params, skip_nonfinite=True), make(twins)
    bad = 0
    for step in range(8):
        grads = gradients(params, step)
        for _ in range((1, 0, 0, 2, 1, 0, 1, 0)[step]):
            broken = [g.clone() for g in grads]
            broken[bad % len(broken)].view(-1)[-1] = (float("nan"), float("inf"), -float("inf"))[bad % 3]
            before = snapshot(skipping, params) if step else None
            apply(skipping, params, broken)
            bad += 1
            assert before is None or not differences(snapshot(skipping, params), before)
        apply(skipping, params, grads)
        apply(plain, twins, grads)
    assert skipping.skipped_steps == bad == 5
    _same(skipping, params, plain, twins)


@pytest.mark.parametrize("where", range(3))
def test_every_gradient_is_looked_at(where: int, backend: BackendCase) -> None:
    """Of a strided parameter that is projected, of one in the plan of those, and of one in the other plan."""
    params = parameters([(64, 32), (48, 32), (100,)], device=backend.device)
    optimizer = a8multi.APOLLO8bit(params, rank=4, skip_nonfinite=True)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    grads = gradients(params, 1)
    grads[0] = grads[0].t().contiguous().t()
    grads[where][(3, 5) if grads[where].ndim == 2 else 5] = float("inf")
    apply(optimizer, params, grads)
    assert optimizer.skipped_steps == 1
    assert not differences(snapshot(optimizer, params), before)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype: Any, strided: bool, backend: BackendCase) -> None:
    """Gradients are divided before they are projected: the bits of gradients that were never scaled."""
    params, twins = _pair(backend, dtype, [(64, 32), (48, 32), (100,)])
    optimizer, plain = MAKES["apollo"](params, skip_nonfinite=True), MAKES["apollo"](twins)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0, growth_interval=2)
    for step in range(7):
        grads = gradients(params, step)
        overflows = step == GAP
        scaler.scale(torch.zeros((), device=backend.device))
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            p.grad = g * scaler.get_scale() if not overflows else torch.full_like(g, float("inf"))
            if strided and i == 0:
                p.grad = p.grad.t().contiguous().t()
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            grads[0] = grads[0].t().contiguous().t() if strided else grads[0]
            apply(plain, twins, grads)
    assert optimizer.skipped_steps == 1
    _same(optimizer, params, plain, twins)


def test_groups_of_both_kinds(backend: BackendCase) -> None:
    """Matrices of one size whose steps are counted here, there and here; the middle one is late by two steps."""
    params, twins = _pair(backend, shapes=((64, 96), (64, 96), (64, 96), (50,)))
    mixed = MAKES["apollo"]([{"params": p, "capturable": i % 2 == 1} for i, p in enumerate(params)])
    plain = MAKES["apollo"]([{"params": p} for p in twins])
    for step in range(9):
        grads = [None if i == 1 and step < 2 else g for i, g in enumerate(gradients(params, step))]
        apply(mixed, params, grads)
        apply(plain, twins, grads)
    assert [isinstance(mixed.state[p]["step"], torch.Tensor) for p in params] == [False, True, False, True]
    _same(mixed, params, plain, twins)


def test_a_counter_that_the_user_sets(backend: BackendCase) -> None:
    params, twins = _pair(backend)
    counting, plain = MAKES["apollo"](params, capturable=True), MAKES["apollo"](twins)
    for optimizer, each in ((counting, params), (plain, twins)):
        run(optimizer, each, range(2))
        for i, steps in ((0, 7), (2, 100)):
            state = optimizer.state[each[i]]
            state["step"] = state["step"].fill_(steps) if optimizer is counting else steps
        run(optimizer, each, range(2, 6))
    _same(counting, params, plain, twins)


@lives
@makes
def test_switched_on_and_off_and_resumed(make: Any, options: Any) -> None:
    params, twins = parameters(SHAPES), parameters(SHAPES)
    plain, switching = make(params), make(twins)
    run(plain, params, range(2))
    run(switching, twins, range(2))
    saved = copy.deepcopy(switching.state_dict())
    switching = make(twins, **options)
    switching.load_state_dict(saved)
    run(plain, params, range(2, 5))
    run(switching, twins, range(2, 5))
    switching.param_groups[0].update(dict.fromkeys(options, False))
    run(plain, params, range(5, 8))
    run(switching, twins, range(5, 8))
    assert all(type(switching.state[p]["step"]) is int for p in twins)
    _same(switching, twins, plain, params)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """capture(True) makes torch say that the current stream is capturing."""

    def set_to(capturing: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    return set_to


@lives
@makes
def test_a_captured_step_has_memory_of_its_own(
    make: Any, options: Any, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretended capture, which runs here: the bits are the same, and eager steps share nothing with it."""
    ran: list[projection.Projection] = []
    usual = projection.Projection.run
    monkeypatch.setattr(projection.Projection, "run", lambda self, *more: (ran.append(self), usual(self, *more)))
    options = {**options, "capturable": True}
    params, twins = parameters(SHAPES), parameters(SHAPES)
    plain, optimizer = make(params), make(twins, **options)
    with a8multi.use_backend("cpu"):
        run(plain, params, range(8))
        run(optimizer, twins, range(2))
        (work,) = optimizer._roster.works.values()
        held = work.projection, dict(work.drawn._kept)
        assert ran[-2:] == [work.projection] * 2
        capture(True)
        run(optimizer, twins, range(2, 5))
        assert len({work.projection, *ran[-3:]}) == 4
        assert (work.projection, work.drawn._kept) == held
        assert work.projecting is None
        capture(False)
        run(optimizer, twins, range(5, 8))
    _same(optimizer, twins, plain, params)


def test_a_captured_step_may_be_the_first_of_a_plan(capture: Any) -> None:
    """Its plans are the graph's: eager steps make their own."""
    params = parameters(SHAPES)
    plain = MAKES["apollo"](params)
    with a8multi.use_backend("cpu"):
        run(plain, params, range(2))
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        loaded = MAKES["apollo"](twins, capturable=True)
        loaded.load_state_dict(plain.state_dict())
        run(loaded, twins, range(2, 3))
        loaded._roster = None  # as after a change of the groups
        capture(True)
        run(loaded, twins, range(3, 4))
        (work,) = loaded._roster.works.values()
        assert work.projection is None
        capture(False)
        run(loaded, twins, range(4, 6))
        assert work.projection is not None
        run(plain, params, range(2, 6))
    _same(loaded, twins, plain, params)


def test_the_torch_backend_cannot_be_captured(capture: Any) -> None:
    params = parameters(SHAPES)
    optimizer = MAKES["apollo"](params, capturable=True)
    with a8multi.use_backend("torch"):
        run(optimizer, params, range(1))
        before = snapshot(optimizer, params)
        capture(True)
        with pytest.raises(BackendUnavailable, match="CUDA graph"):
            run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)


# --- The random matrix. ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 300), (255, 257)], ids=str)
def test_draw_and_the_formula_in_plain_torch(shape: Any, dtype: Any, backend: BackendCase) -> None:
    drawing = backend_for(torch.device(backend.device), "adafactor")
    seed = 0x1234567890ABCDEF
    for taken in (0, 6, 7, 13, 700, 7 * ((1 << 31) + 5)):
        matrix = torch.full(shape, 99.0, dtype=dtype, device=backend.device)
        drawing.draw(matrix, torch.tensor(taken, device=backend.device), None, 7, seed, shape[1])
        expected = random_integers(seed, taken // 7, shape[1], matrix.numel(), matrix.device)
        assert torch.equal(matrix, expected.to(dtype).view(shape)), taken


def test_draw_writes_only_when_the_interval_is_another(backend: BackendCase) -> None:
    drawing = backend_for(torch.device(backend.device), "adafactor")
    for before, taken in ((0, 6), (7, 8), (13, 7), (6, 7), (14, 13), (0, 70)):
        matrix = torch.full((4, 6), 99.0, device=backend.device)
        counters = [torch.tensor(k, device=backend.device) for k in (taken, before)]
        drawing.draw(matrix, *counters, 7, 3, 6)
        assert bool((matrix == 99.0).all()) is (before // 7 == taken // 7), (before, taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap": 0}, "gap 0"),
        ({"matrix": torch.zeros(4, dtype=torch.float16)}, "dtype 2"),
        ({"taken": torch.zeros(16, dtype=torch.uint8)[1:9].view(torch.int8)}, "misaligned"),
    ],
    ids=["gap", "dtype", "alignment"],
)
def test_draw_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"matrix": torch.zeros(4), "taken": torch.tensor(0), "before": None, "gap": 1, "seed": 0}
    with a8multi.use_backend("cpu"):
        drawing = backend_for(torch.device("cpu"), "adafactor")
        with pytest.raises(NativeError, match=message):
            drawing.draw(**{**arguments, "noise_id": 0, **change})

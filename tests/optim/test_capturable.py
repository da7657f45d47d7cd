"""capturable=True: steps are counted in tensors, and the bits are those of steps counted in integers.

On the CPU, where the very code that derives on a GPU runs in the host library. Graphs: test_cuda_graph.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, counted, differences, gradients, parameters, run, snapshot

import a8multi
from a8multi.backend import marshal
from a8multi.errors import BackendUnavailable
from a8multi.plan import Live
from a8multi.plan.schedule import SCHEDULE

SHAPES = ((65, 300), (4097,), (129,), (3, 5, 7), ())
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": a8multi.AdamW8bit,
    "adam nf4": lambda params, **o: a8multi.Adam8bit(params, weight_decay=0.1, first_moment="nf4", **o),
    "sgd dampened": lambda params, **o: a8multi.SGD8bit(params, momentum=0.9, dampening=0.3, **o),
    "adagrad": lambda params, **o: a8multi.Adagrad8bit(params, lr_decay=0.1, **o),
    "ademamix": lambda params, **o: a8multi.AdEMAMix8bit(params, t_alpha=12, t_beta3=15, **o),
    "lamb": a8multi.LAMB8bit,
    "factored": a8multi.Adafactor8bit,
    "corrected": lambda params, **o: a8multi.Adafactor8bit(params, beta1=0.9, relative_step=False, **o),
    "fixed beta2": lambda params, **o: a8multi.Adafactor8bit(
        params, beta1=0.9, beta2=0.99, relative_step=False, factored=False, **o
    ),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def _train(optimizer: Any, params: Any, steps: range) -> None:
    sets = [gradients(params, k) for k in range(4)]
    for step in steps:
        # One parameter's gradient comes and goes: it has steps of its own.
        grads = [None if i == 1 and step % 5 == 2 else g for i, g in enumerate(sets[step % 4])]
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2 / (1 + step)) if step % 2 else 1e-2
        apply(optimizer, params, grads)


@makes
def test_the_bits_of_a_hundred_steps(make: Any, backend: BackendCase) -> None:
    params, twins = parameters(SHAPES, device=backend.device), parameters(SHAPES, device=backend.device)
    plain, counting = make(params), make(twins, capturable=True)
    steps = range(100 if backend.name != "torch" else 20)
    _train(plain, params, steps)
    _train(counting, twins, steps)
    assert not differences(counted(counting, twins), counted(plain, params))
    assert int(counting.state[twins[1]]["step"]) == len(steps) * 4 // 5
    for param in twins:
        step = counting.state[param]["step"]
        assert (step.dtype, step.shape, step.device) == (torch.int64, (), param.device)


@makes
def test_what_is_not_contiguous_counts_once(make: Any, backend: BackendCase) -> None:
    """Plans of a step share its counters; here none of them is the whole, or there is none."""
    for shapes in (((64, 70), (40, 30, 5, 2)), ((64, 70),)):
        params, twins = parameters(shapes, device=backend.device), parameters(shapes, device=backend.device)
        for each in (params, twins):
            each[0].data = each[0].data.t().contiguous().t()
        optimizers = make(params), make(twins, capturable=True)
        for optimizer, each in zip(optimizers, (params, twins), strict=True):
            run(optimizer, each, range(4))
        assert not differences(counted(optimizers[1], twins), counted(optimizers[0], params))


def test_groups_of_both_kinds(backend: BackendCase) -> None:
    def groups(params: Any) -> Any:
        return [{"params": params[:2], "capturable": True}, {"params": params[2:], "lr": 1e-4}]

    params, twins = parameters(SHAPES, device=backend.device), parameters(SHAPES, device=backend.device)
    mixed, plain = a8multi.AdamW8bit(groups(params)), a8multi.AdamW8bit(groups(twins))
    plain.param_groups[0]["capturable"] = False
    run(mixed, params, range(4))
    run(plain, twins, range(4))
    assert [isinstance(mixed.state[p]["step"], torch.Tensor) for p in params] == [True, True, False, False, False]
    assert not differences(counted(mixed, params), counted(plain, twins))


@makes
def test_switched_on_and_off(make: Any) -> None:
    params, twins = parameters(SHAPES), parameters(SHAPES)
    plain, switching = make(params), make(twins)
    for step in range(6):
        switching.param_groups[0]["capturable"] = step % 4 > 1
        run(plain, params, range(step, step + 1))
        run(switching, twins, range(step, step + 1))
        assert isinstance(switching.state[twins[0]]["step"], torch.Tensor) is (step % 4 > 1)
    assert not differences(counted(switching, twins), counted(plain, params))


def test_an_unchanged_model_is_surveyed_once() -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params, capturable=True)
    run(optimizer, params, range(1))
    first, counter = optimizer._roster, optimizer.state[params[0]]["step"]
    run(optimizer, params, range(1, 4))
    assert optimizer._roster is first
    assert optimizer.state[params[0]]["step"] is counter
    assert int(counter) == 4


@pytest.mark.parametrize("written", [lambda step: step.fill_(1000), lambda step: torch.tensor(1000)])
def test_a_counter_that_the_user_sets(written: Any) -> None:
    params, twins = parameters(SHAPES), parameters(SHAPES)
    counting, plain = a8multi.AdamW8bit(params, capturable=True), a8multi.AdamW8bit(twins)
    for optimizer, each in ((counting, params), (plain, twins)):
        run(optimizer, each, range(2))
        state = optimizer.state[each[1]]
        state["step"] = written(state["step"]) if optimizer is counting else 1000
        run(optimizer, each, range(2, 4))
    assert not differences(counted(counting, params), counted(plain, twins))
    assert [int(counting.state[p]["step"]) for p in params] == [4, 1002, 4, 4, 4]


# --- Saving and loading. ---


@pytest.mark.parametrize("loads", [False, True], ids=["into integers", "into tensors"])
@pytest.mark.parametrize("saves", [False, True], ids=["integers", "tensors"])
@makes
def test_checkpoints_go_either_way(make: Any, saves: bool, loads: bool) -> None:
    params = parameters(SHAPES)
    optimizer = make(params, capturable=saves)
    run(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(twins, capturable=loads)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["capturable"] is loads
    assert all(isinstance(state["step"], torch.Tensor if loads else int) for state in resumed.state.values())
    saved = optimizer.state[params[0]]["step"]
    assert saved is not resumed.state[twins[0]]["step"] or isinstance(saved, int)
    run(optimizer, params, range(3, 6))
    run(resumed, twins, range(3, 6))
    assert not differences(counted(resumed, twins), counted(optimizer, params))


def test_a_checkpoint_from_before_the_option() -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["capturable"]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = a8multi.AdamW8bit(twins, capturable=True)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["capturable"] is True
    run(optimizer, params, range(2, 4))
    run(resumed, twins, range(2, 4))
    assert not differences(counted(resumed, twins), counted(optimizer, params))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_count_by_themselves(how: str) -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params, capturable=True)
    run(optimizer, params, range(2))
    both = (optimizer, params)
    other, twins = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    run(other, twins, range(2, 5))
    assert int(optimizer.state[params[0]]["step"]) == 2
    run(optimizer, params, range(2, 5))
    assert not differences(snapshot(other, twins), snapshot(optimizer, params))


def test_a_pickle_from_before_the_option() -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    saved = optimizer.__getstate__()
    del saved["param_groups"][0]["capturable"]
    optimizer.__setstate__(saved)
    run(optimizer, params, range(1))
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize("kind", [a8multi.AdamW8bit, a8multi.Adafactor8bit, a8multi.Lion8bit])
def test_capturable_is_a_flag(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="capturable"):
        kind(parameters([(8,)]), capturable=value)


# --- During a capture, which is pretended here. ---


@pytest.fixture
def capture() -> Callable[[pytest.MonkeyPatch], None]:
    """capture(monkeypatch) makes torch say that the current stream is capturing."""

    def begin(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


@makes
def test_a_capture_needs_capturable(make: Any, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = make(params)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match="capturable=True"):
        run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)


@makes
def test_a_capture_needs_a_step_before(make: Any, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = make(params, capturable=True)
    with monkeypatch.context() as pretended:
        capture(pretended)
        with pytest.raises(RuntimeError, match=r"before it has run like this since .* built or loaded"):
            run(optimizer, params, range(1))
        assert not optimizer.state
    run(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer, params)
    with monkeypatch.context() as pretended:
        capture(pretended)
        with pytest.raises(RuntimeError, match=r"before it has run like this since .* built or loaded"):
            run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)
    run(optimizer, params, range(1, 2))
    late = parameters([(70,)])
    optimizer.add_param_group({"params": late})
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[0\] is not there yet"):
        run(optimizer, [*params, *late], range(2, 3))
    assert late[0] not in optimizer.state


def test_a_capture_needs_a_step_that_did_something(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, and with the flags of skip_nonfinite: a graph that makes them clears them at every replay."""
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params, capturable=True, skip_nonfinite=True)
    run(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    with monkeypatch.context() as pretended:
        capture(pretended)
        with pytest.raises(RuntimeError, match=r"before it has run like this"):
            run(optimizer, params, range(1, 2))
    optimizer = a8multi.AdamW8bit(params, capturable=True)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["skip_nonfinite"] = True
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match=r"before it has run like this"):
        run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)


@makes
def test_a_capture_after_a_step(make: Any, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = make(params, capturable=True)
    run(optimizer, params, range(1))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(twins, capturable=True)
    loaded.load_state_dict(optimizer.state_dict())
    # Whatever the environment forces: torch cannot be captured, see below.
    with a8multi.use_backend("cpu"):
        run(optimizer, params, range(1, 2))
        run(loaded, twins, range(1, 2))
        capture(monkeypatch)
        run(optimizer, params, range(2, 3))
        run(loaded, twins, range(2, 3))
    assert not differences(snapshot(loaded, twins), snapshot(optimizer, params))
    assert int(optimizer.state[params[0]]["step"]) == 3


def test_the_torch_backend_cannot_be_captured(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params, capturable=True)
    with a8multi.use_backend("torch"):
        run(optimizer, params, range(1))
        before = snapshot(optimizer, params)
        capture(monkeypatch)
        with pytest.raises(BackendUnavailable, match="CUDA graph"):
            run(optimizer, params, range(1, 2))
    assert not differences(snapshot(optimizer, params), before)


def test_a_captured_step_has_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is main memory here: only who owns what matters, and what is copied at a replay."""
    pinned: list[torch.Tensor] = []

    def empty(size: int) -> torch.Tensor:
        pinned.append(torch.empty(size, dtype=torch.uint8))
        return pinned[-1]

    monkeypatch.setattr(marshal, "_pinned", empty)
    monkeypatch.setattr(marshal, "_staging", marshal._Staging())
    params = parameters([(65, 300)])
    optimizer = a8multi.Adafactor8bit(params, capturable=True)
    run(optimizer, params, range(1))
    (work,) = optimizer._roster.works.values()
    work.plan.grads = gradients(params, 1)
    work.plan.address()
    tables = [work.plan.tensors, work.plan.chunks, work.plan.tiles]
    live = Live(np.empty(0, SCHEDULE), [], [], [], capturing=True)
    size = marshal._starts_of(tables)[1]
    marshal._staging.reserve(size)
    assert [t.numel() for t in pinned] == [2 * size]

    for _ in range(2):
        before = len(pinned)
        found = marshal._captured(work.plan, tables, live)
        assert len(pinned) == before, "nothing is allocated during a capture"
        memory = live.kept[-1]
        for address, table in zip(found, tables, strict=True):
            at = address - memory.data_ptr()
            assert memory[at : at + table.nbytes].numpy().tobytes() == table.tobytes()
    assert live.kept[0].data_ptr() != live.kept[1].data_ptr()
    first, second = marshal._staging._taken
    # What a replay copies stays as it was: later captures have other pinned memory.
    assert first.data_ptr() + size == second.data_ptr()
    assert first[: tables[0].nbytes].equal(live.kept[0][: tables[0].nbytes])
    assert marshal.scratch_of(work.plan, live) is not work.plan.scratch
    live.capturing = False
    assert marshal.scratch_of(work.plan, live) is work.plan.scratch

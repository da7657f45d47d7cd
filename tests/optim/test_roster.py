"""A step that compares with what the last one checked gives the bits of one that checks everything anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.helpers import apply, differences, gradients, parameters, run, snapshot

import a8multi
from a8multi.optim import reader

SHAPES = ((64, 64), (4097,), (1,), (0,), (33,))
KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda params: a8multi.AdamW8bit(_groups(params), lr=1e-2, betas=[0.9, 0.99], min_quantized_numel=0),
    "factored": lambda params: a8multi.Adafactor8bit(_groups(params), beta1=0.9),
    "full": lambda params: a8multi.Adafactor8bit(_groups(params), factored=False, min_8bit_size=0),
}


def _groups(params: Any) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]


# --- What may happen between two steps. Receives the optimizer, its parameters and the gradients of the next step. ---


def _nothing(optimizer: Any, params: Any, grads: Any) -> None:
    pass


def _lr(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[1]["lr"] = 0.5


def _lr_tensor(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)


def _option(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[0]["maximize"] = True


def _option_in_place(optimizer: Any, params: Any, grads: Any) -> None:
    group = optimizer.param_groups[0]
    if "betas" in group:
        group["betas"][0] = 0.5
    else:
        group["weight_decay"] = 0.2


def _format(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[0]["block_size"] = 64
    optimizer.param_groups[0]["first_moment"] = "fp32"


def _a_group_replaced(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.5}


def _a_parameter_to_another_group(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))


def _state_step(optimizer: Any, params: Any, grads: Any) -> None:
    optimizer.state[params[1]]["step"] = 1000


def _state_without_step(optimizer: Any, params: Any, grads: Any) -> None:
    del optimizer.state[params[1]]["step"]


def _state_of_one_element(optimizer: Any, params: Any, grads: Any) -> None:
    """Replaced by an equal one, which the comparison of the whole state cannot tell from the old."""
    for state in optimizer.state.values():
        state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() == 1})


def _state_exchanged(optimizer: Any, params: Any, grads: Any) -> None:
    state = optimizer.state[params[0]]
    state.update({k: v.flip(0) for k, v in state.items() if isinstance(v, torch.Tensor)})


def _state_transposed(optimizer: Any, params: Any, grads: Any) -> None:
    """Of the right shape and type, but not contiguous."""
    state = optimizer.state[params[0]]
    state.update({k: v.t().contiguous().t() for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim == 2})


def _all_states_replaced(optimizer: Any, params: Any, grads: Any) -> None:
    kind = type(optimizer.state)
    optimizer.state = kind(dict, {p: dict(s) for p, s in optimizer.state.items()})


def _a_state_replaced_by_its_copy(optimizer: Any, params: Any, grads: Any) -> None:
    """The same tensors in another dictionary, where the step is counted from now on."""
    optimizer.state[params[0]] = dict(optimizer.state[params[0]])


def _a_state_of_another_owner(optimizer: Any, params: Any, grads: Any) -> None:
    """The same states in the same order, but this parameter has none."""
    owned = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update({torch.nn.Parameter(p.detach()) if p is params[1] else p: state for p, state in owned})


def _a_parameter_replaced_by_an_equal_one(optimizer: Any, params: Any, grads: Any) -> None:
    """Of one element, which a comparison of whole lists cannot tell from the old."""
    optimizer.param_groups[1]["params"][0] = torch.nn.Parameter(params[2].detach().clone())


def _state_looked_at(optimizer: Any, params: Any, grads: Any) -> None:
    """optimizer.state makes an empty entry for a parameter that it does not know."""
    assert optimizer.state[params[3]] == {}


def _data_replaced(optimizer: Any, params: Any, grads: Any) -> None:
    params[1].data = params[1].data.flip(0)


def _data_transposed(optimizer: Any, params: Any, grads: Any) -> None:
    """The same memory, read in another order."""
    params[0].data = params[0].data.t()


def _data_cast(optimizer: Any, params: Any, grads: Any) -> None:
    params[0].data = params[0].data.bfloat16()
    grads[0] = grads[0].bfloat16()


def _gradient_missing(optimizer: Any, params: Any, grads: Any) -> None:
    grads[0] = None


def _gradient_transposed(optimizer: Any, params: Any, grads: Any) -> None:
    grads[0] = grads[0].t()


def _gradient_of_odd_strides(optimizer: Any, params: Any, grads: Any) -> None:
    """A stride that no element has."""
    grads[2] = torch.as_strided(grads[2], (1,), (17,))


def _gradient_shared(optimizer: Any, params: Any, grads: Any) -> None:
    grads[2] = params[2].detach()


def _frozen(optimizer: Any, params: Any, grads: Any) -> None:
    params[0].requires_grad_(False)


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("_") and callable(value)]
CHANGES = [change for change in CHANGES if getattr(change, "__module__", "") == __name__ and change is not _groups]


def _train(make: Any, change: Any, careful: bool) -> list[Any]:
    """Two steps, the change, two more. careful: every step looks at everything."""
    params = parameters(SHAPES)
    optimizer = make(params)
    found = []
    for step in range(4):
        grads = gradients([torch.empty(s) for s in SHAPES], step)
        if step == 2:
            change(optimizer, params, grads)
        elif step == 3:
            grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
        if careful:
            optimizer._roster = None
        apply(optimizer, params, grads)
        found.append(snapshot(optimizer, params))
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_what_changes_between_steps_is_noticed(make: Any, change: Any) -> None:
    expected = _train(make, change, careful=True)
    for step, found in enumerate(_train(make, change, careful=False)):
        assert not differences(found, expected[step]), f"step {step}"


@pytest.fixture
def no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_find", lambda: "not in this test")


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_an_unchanged_model_is_surveyed_once(make: Any, read: bool, request: pytest.FixtureRequest) -> None:
    """New gradients, learning rates and options that decide no format need no other survey."""
    if not read:
        request.getfixturevalue("no_reader")
    params = parameters(SHAPES)
    optimizer = make(params)
    run(optimizer, params, range(1))
    first = optimizer._roster
    for step in range(1, 5):
        optimizer.param_groups[0].update(lr=0.1**step, weight_decay=0.1**step)
        run(optimizer, params, range(step, step + 1))
        assert optimizer._roster is first
    assert {state["step"] for state in optimizer.state.values()} == {5}


@pytest.mark.usefixtures("no_reader")
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_without_a_reader_the_same_changes_are_noticed(make: Any) -> None:
    for change in CHANGES:
        expected = _train(make, change, careful=True)
        assert not differences(_train(make, change, careful=False)[-1], expected[-1]), change.__name__


def test_parameters_at_different_steps_stay_in_one_roster() -> None:
    params = parameters([(4097,), (65, 300)])
    optimizer, twins = a8multi.AdamW8bit(params), parameters([(4097,), (65, 300)])
    careful = a8multi.AdamW8bit(twins)
    for each, of in ((optimizer, params), (careful, twins)):
        grads = gradients(of, 0)
        apply(each, of, [grads[0], None])
    for step in range(1, 4):
        run(optimizer, params, range(step, step + 1))
        careful._roster = None
        run(careful, twins, range(step, step + 1))
    assert [optimizer.state[p]["step"] for p in params] == [4, 3]
    assert not differences(snapshot(optimizer, params), snapshot(careful, twins))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_gradients_are_not_kept(make: Any) -> None:
    """Their memory is the next backward's: an optimizer that held them would double it."""
    params = parameters(SHAPES)
    optimizer = make(params)
    for step in range(3):
        grads = [torch.ones(s) for s in SHAPES]
        held = [weakref.ref(g) for g in grads]
        apply(optimizer, params, grads)
        del grads
        for param in params:
            param.grad = None
        gc.collect()
        assert not any(ref() is not None for ref in held), f"step {step}"


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_errors_after_many_good_steps(make: Any) -> None:
    """Nothing is written, and the next good step goes on."""
    params = parameters(SHAPES)
    optimizer = make(params)
    run(optimizer, params, range(3))

    def sparse() -> None:
        params[4].grad = torch.zeros(33).to_sparse()

    def reshaped() -> None:
        params[0].data = params[0].data.reshape(32, 128)

    def option() -> None:
        optimizer.param_groups[1]["weight_decay"] = float("nan")

    def rate() -> None:
        optimizer.param_groups[1]["lr"] = torch.tensor(float("nan"))

    for spoil in (sparse, reshaped, option, rate):
        data, kept = params[0].data, [dict(g) for g in optimizer.param_groups]
        for param, grad in zip(params, gradients(params, 9), strict=True):
            param.grad = grad
        spoil()
        before = snapshot(optimizer, params)
        with pytest.raises(ValueError, match=r"sparse|shape|weight_decay|lr"):
            optimizer.step()
        assert not differences(snapshot(optimizer, params), before), spoil.__name__
        params[0].data = data
        for group, good in zip(optimizer.param_groups, kept, strict=True):
            group.update(good)
    run(optimizer, params, range(3, 5))
    assert {state["step"] for state in optimizer.state.values()} == {5}


@pytest.mark.parametrize("as_list", [False, True])
def test_a_decay_written_in_place_is_used(as_list: bool) -> None:
    """In a list, or as a tensor in a tuple: the very same objects then have other values."""
    sets = [parameters(SHAPES) for _ in range(2)]
    beta = torch.tensor(0.75)
    betas = [[0.75, 0.99], [0.75, 0.99]] if as_list else [(beta, 0.99), (beta, 0.99)]
    optimizers = [a8multi.AdamW8bit(p, betas=b) for p, b in zip(sets, betas, strict=True)]
    for step in range(4):
        if step == 2:
            beta.fill_(0.5)
            for each in betas if as_list else ():
                each[0] = 0.5
        optimizers[1]._roster = None
        for optimizer, params in zip(optimizers, sets, strict=True):
            run(optimizer, params, range(step, step + 1))
        assert not differences(snapshot(optimizers[0], sets[0]), snapshot(optimizers[1], sets[1])), f"step {step}"


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_an_optimizer_is_freed_at_once(make: Any) -> None:
    """What it remembers of a step does not hold it: its state is half of a model, and would wait for the collector."""
    params = parameters(SHAPES)
    optimizer = make(params)
    run(optimizer, params, range(2))
    held = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("make", "name"), [(KINDS["adamw"], "betas"), (KINDS["factored"], "eps")])
def test_an_option_written_in_place_is_checked(make: Any, name: str) -> None:
    params = parameters(SHAPES)
    optimizer = make(params)
    optimizer.param_groups[0][name] = list(optimizer.param_groups[0][name])
    run(optimizer, params, range(2))
    optimizer.param_groups[0][name][1] = float("nan")
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=name):
        run(optimizer, params, range(2, 3))
    assert not differences(snapshot(optimizer, params), before)

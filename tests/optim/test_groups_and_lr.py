"""Learning rates, schedulers, groups, closures and hooks: what torch.optim.Optimizer's users do with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.helpers import apply, differences, gradients, parameters, run, snapshot
from torch.optim.optimizer import register_optimizer_step_post_hook

import a8multi

KINDS = [
    a8multi.AdamW8bit,
    a8multi.Adam8bit,
    a8multi.Adafactor8bit,
    a8multi.Lion8bit,
    a8multi.RMSprop8bit,
    a8multi.SGD8bit,
    a8multi.Adagrad8bit,
    a8multi.AdEMAMix8bit,
    a8multi.LAMB8bit,
    a8multi.LARS8bit,
]
# What a small regression is learnt with, where the learning rate of Adam is not it.
LEARNS = {
    a8multi.Lion8bit: {"lr": 1e-3},
    a8multi.RMSprop8bit: {"lr": 1e-3},
    a8multi.SGD8bit: {"lr": 0.03, "momentum": 0.9},
    a8multi.Adagrad8bit: {"lr": 0.05},
    a8multi.LARS8bit: {"lr": 5.0, "momentum": 0.9},
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_lr_is_read_at_every_step(kind: Any) -> None:
    """Pitfalls 2 and 20: as a float and as a 0-d tensor, written in place or replaced."""
    shapes = [(4097,), (65, 300)]
    rates = [1e-2, 1e-3, 5e-2, 0.0]
    tensor = torch.tensor(rates[0])
    sets = [parameters(shapes) for _ in range(3)]
    plain, in_place, replaced = kind(sets[0], lr=rates[0]), kind(sets[1], lr=tensor), kind(sets[2], lr=rates[0])
    for step, rate in enumerate(rates):
        plain.param_groups[0]["lr"] = rate
        tensor.fill_(rate)
        replaced.param_groups[0]["lr"] = torch.tensor([rate])
        for optimizer, params in zip((plain, in_place, replaced), sets, strict=True):
            before = [p.detach().clone() for p in params]
            apply(optimizer, params, gradients(params, step))
            moved = any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
            assert moved is (rate > 0)
    # float32 holds none of these rates exactly, and either way that is what the kernels see.
    assert not differences(snapshot(in_place, sets[1]), snapshot(plain, sets[0]))
    assert not differences(snapshot(replaced, sets[2]), snapshot(plain, sets[0]))


def test_a_larger_lr_moves_further(kind: Any) -> None:
    """In proportion: twice the rate, twice the way of the first step."""
    ways = []
    for rate in (1e-3, 2e-3):
        params = [torch.nn.Parameter(torch.ones(64))]
        options = {"weight_decay": 0.0}
        optimizer = kind(params, lr=rate, **options)
        apply(optimizer, params, [torch.ones(64)])
        ways.append(float((params[0].detach() - 1).abs().max()))
    assert ways[1] == pytest.approx(2 * ways[0], rel=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lambda_lr_with_several_groups(kind: Any, as_tensor: bool) -> None:
    params = parameters([(64,), (4096,), (8, 8)])
    rates = (1e-2, 1e-3, 1e-1)
    given = [{"params": [p], "lr": torch.tensor(r) if as_tensor else r} for p, r in zip(params, rates, strict=True)]
    optimizer = kind(given)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0, lambda t: float(t < 2)])
    twins = parameters([(64,), (4096,), (8, 8)])
    by_hand = kind([{"params": [p], "lr": r} for p, r in zip(twins, rates, strict=True)])
    for step in range(4):
        for group, rate in zip(by_hand.param_groups, (1e-2 * 0.5**step, 1e-3, 1e-1 * (step < 2)), strict=True):
            group["lr"] = rate
        run(optimizer, params, range(step, step + 1))
        run(by_hand, twins, range(step, step + 1))
        scheduler.step()
    if not as_tensor:
        assert not differences(snapshot(optimizer, params), snapshot(by_hand, twins))
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-8)


def test_one_cycle_turns_betas_too() -> None:
    params, twins = parameters([(64,), (4096,)]), parameters([(64,), (4096,)])
    fp32 = {"first_moment": "fp32", "second_moment": "fp32", "lr": 1e-2}
    ours = a8multi.AdamW8bit([{"params": [p]} for p in params], **fp32)
    theirs = torch.optim.AdamW([{"params": [p]} for p in twins], lr=1e-2)
    options = {"max_lr": [1e-2, 3e-2], "total_steps": 10}
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, **options) for o in (ours, theirs)]
    for step in range(9):
        run(ours, params, range(step, step + 1))
        run(theirs, twins, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert ours.param_groups[0]["betas"][0] != 0.9
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_first_parameter_without_gradient(kind: Any, frozen: bool) -> None:
    """Pitfall 2. Nothing happens to it, and it gets no state."""
    params = parameters([(4097,), (65, 300)])
    params[0].requires_grad_(not frozen)
    old = params[0].detach().clone()
    optimizer = kind(params, weight_decay=0.1)
    for step in range(3):
        apply(optimizer, params, [None, gradients(params, step)[1]])
    assert torch.equal(params[0], old)
    assert params[0] not in optimizer.state or not optimizer.state[params[0]]
    assert optimizer.state[params[1]]["step"] == 3


def test_each_parameter_counts_its_own_steps(kind: Any) -> None:
    """Gradients that come and go: as if each parameter had an optimizer to itself, of the same number."""
    params, twins = parameters([(4097,), (300,)]), parameters([(4097,), (300,)])
    optimizer, expected = kind(params), kind(twins)
    for step in range(6):
        grads = gradients(params, step)
        present = (step % 2 == 0, step >= 3)
        apply(optimizer, params, [g if here else None for g, here in zip(grads, present, strict=True)])
        for i, here in enumerate(present):
            if here:
                apply(expected, twins, [g if i == k else None for k, g in enumerate(grads)])
    assert [optimizer.state[p]["step"] for p in params] == [3, 3]
    assert not differences(snapshot(optimizer, params), snapshot(expected, twins))


def test_groups_keep_their_own_options(kind: Any) -> None:
    """Two groups give the bits of two optimizers; without noise, which depends on the parameter's number."""
    params, twins = parameters([(4097,), (65, 300)]), parameters([(4097,), (65, 300)])
    optimizer = kind(
        [{"params": [params[0]], "lr": 1e-2}, {"params": [params[1]], "weight_decay": 0.3, "maximize": True}],
        stochastic_rounding=False,
    )
    alone = [
        kind([twins[0]], lr=1e-2, stochastic_rounding=False),
        kind([twins[1]], weight_decay=0.3, maximize=True, stochastic_rounding=False),
    ]
    for step in range(3):
        grads = gradients(params, step)
        apply(optimizer, params, grads)
        for i in range(2):
            apply(alone[i], [twins[i]], [grads[i]])
    for i in range(2):
        assert not differences(snapshot(optimizer, [params[i]]), snapshot(alone[i], [twins[i]]))


def test_a_group_added_in_the_middle(kind: Any) -> None:
    params = parameters([(4097,), (65, 300)])
    twins = parameters([(4097,), (65, 300)])
    optimizer = kind(params[:1])
    both = kind([{"params": twins[:1]}, {"params": twins[1:], "lr": 3e-3}])
    for step in range(2):
        grads = gradients(params, step)
        apply(optimizer, params[:1], grads[:1])
        apply(both, twins, [grads[0], None])
    optimizer.add_param_group({"params": params[1:], "lr": 3e-3})
    run(optimizer, params, range(2, 4))
    run(both, twins, range(2, 4))
    assert [optimizer.state[p]["step"] for p in params] == [4, 2]
    assert not differences(snapshot(optimizer, params), snapshot(both, twins))


def test_named_parameters(kind: Any) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = kind(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    model.bias.grad = model.bias.grad.to_sparse()
    with pytest.raises(ValueError, match="bias"):
        optimizer.step()


# --- Closures and hooks. ---


def test_closure(kind: Any) -> None:
    """Pitfall 24: called once, with gradients enabled, before the step; its loss is returned."""
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = kind([param], lr=0.1)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert loss.item() == 9.0
    assert 0 < param.item() < 3.0
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(kind: Any, set_to_none: bool) -> None:
    params = parameters([(64,)])
    optimizer = kind(params, weight_decay=0.0)
    run(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=set_to_none)
    assert (params[0].grad is None) is set_to_none
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == (1 if set_to_none else 2)


def test_step_hooks(kind: Any) -> None:
    params = parameters([(64,)])
    optimizer = kind(params)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", len(o.state))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o.state[params[0]]["step"])))
    run(optimizer, params, range(1))
    assert seen == [("before", 0), ("after", 1)]


def test_step_hooks_receive_what_step_was_called_with() -> None:
    optimizer = a8multi.AdamW8bit(parameters([(64,)]))
    seen: list[Any] = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append((args, kwargs))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append((args, kwargs))),
    ]
    closure = lambda: 5.0  # noqa: E731
    assert (optimizer.step(), optimizer.step(closure), optimizer.step(closure=closure)) == (None, 5.0, 5.0)
    wanted: list[Any] = [((optimizer,), {}), ((optimizer, closure), {}), ((optimizer,), {"closure": closure})]
    assert seen == [call for call in wanted for _ in range(2)]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 6


class _OwnStep(a8multi.AdamW8bit):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_step_hooks_run_once_around_a_step_that_was_overridden() -> None:
    params = parameters([(64,)])
    optimizer = _OwnStep(params)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(optimizer, params, range(1))
    assert seen == ["before", "after"]


def test_a_profile_names_the_step(kind: Any) -> None:
    optimizer = kind(parameters([(64,)]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events() if "step" in event.name]
    assert names == [f"Optimizer.step#{type(optimizer).__name__}.step"]


def test_gradients_are_off_in_a_step_and_on_again_after_it() -> None:
    """Also after one that fails; parameters of another layout are written by torch."""
    params = parameters([(65, 300)])
    params[0].data = params[0].data.t()
    optimizer = a8multi.AdamW8bit(params)
    apply(optimizer, params, [torch.ones(300, 65)])
    assert torch.is_grad_enabled()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert torch.is_grad_enabled()


def test_nothing_to_do(kind: Any) -> None:
    params = parameters([(64,), (0,), (0, 5)])
    optimizer = kind(params)
    optimizer.step()
    assert not optimizer.state
    apply(optimizer, params, [None, torch.zeros(0), torch.zeros(0, 5)])
    assert not any(optimizer.state.values())


def test_a_model_learns(kind: Any) -> None:
    """End to end, through autograd: the loss of a small regression falls to a hundredth."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
    inputs = torch.randn(64, 16)
    targets = inputs[:, :1] * inputs[:, 1:2]
    optimizer = kind(model.parameters(), **LEARNS.get(kind, {"lr": 1e-2}))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]

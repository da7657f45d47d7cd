"""skip_nonfinite: steps whose gradients are not all finite leave no trace, with and without torch's GradScaler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, differences, gradients, parameters, run, snapshot

import a8multi

SHAPES = ((65, 300), (4097,), (129,), (3, 5, 7), ())
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": a8multi.AdamW8bit,
    "lion": a8multi.Lion8bit,
    "lamb": a8multi.LAMB8bit,
    "factored": a8multi.Adafactor8bit,
    "came": a8multi.CAME8bit,
    "full": lambda params, **o: a8multi.Adafactor8bit(
        params, factored=False, beta1=0.9, beta2=0.99, relative_step=False, enable_fira_for_adafactor=True, **o
    ),
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
BAD = (float("nan"), float("inf"), -float("inf"))


def _plain(found: list[dict[str, Any]], optimizer: Any, params: Any) -> list[dict[str, Any]]:
    for held, param in zip(found, params, strict=True):
        if "step" in held:
            held["step"] = int(optimizer.state[param]["step"])
    return found


@makes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_steps_leave_no_trace(make: Any, dtype: torch.dtype, backend: BackendCase) -> None:
    """The bits are those of a run without the bad steps, and of one without the option."""
    params, twins, others = (parameters(SHAPES, dtype, backend.device) for _ in range(3))
    skipping, clean, plain = make(params, skip_nonfinite=True), make(twins, skip_nonfinite=True), make(others)
    bad = 0
    for step in range(7):
        grads = gradients(params, step)
        if step % 3 == 1:
            broken = [g.clone() for g in grads]
            place = broken[step % len(broken)]
            place.view(-1)[place.numel() // 2] = BAD[bad % 3]
            apply(skipping, params, broken)
            bad += 1
        apply(skipping, params, grads)
        apply(clean, twins, grads)
        apply(plain, others, grads)
    assert (skipping.skipped_steps, clean.skipped_steps, plain.skipped_steps) == (bad, 0, 0)
    found = _plain(snapshot(skipping, params), skipping, params)
    assert not differences(found, _plain(snapshot(clean, twins), clean, twins))
    assert not differences(found, _plain(snapshot(plain, others), plain, others))


@makes
def test_the_first_step_may_be_bad(make: Any, backend: BackendCase) -> None:
    params, twins = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, reference = make(params, skip_nonfinite=True), make(twins)
    grads = gradients(params, 0)
    grads[0].view(-1)[-1] = float("inf")
    apply(optimizer, params, grads)
    assert optimizer.skipped_steps == 1
    run(optimizer, params, range(3))
    run(reference, twins, range(3))
    found = _plain(snapshot(optimizer, params), optimizer, params)
    assert not differences(found, _plain(snapshot(reference, twins), reference, twins))


def test_strided_gradients_are_looked_at(backend: BackendCase) -> None:
    params = parameters([(64, 32), (100,)], device=backend.device)
    optimizer = a8multi.AdamW8bit(params, skip_nonfinite=True)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    grads = gradients(params, 1)
    grads[0] = grads[0].t().contiguous().t()
    grads[0][3, 5] = float("nan")
    apply(optimizer, params, grads)
    assert optimizer.skipped_steps == 1
    assert not differences(snapshot(optimizer, params), before)


@pytest.mark.parametrize("overflows", [False, True])
def test_grad_scaler(overflows: bool, backend: BackendCase) -> None:
    """The scaler hands over its scale and what it has found, and moves on as with torch's own optimizers."""
    params, twins = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, reference = a8multi.AdamW8bit(params, skip_nonfinite=True), a8multi.AdamW8bit(twins)
    scalers = [torch.amp.GradScaler(backend.device, init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        grads = gradients(params, step)
        if overflows and step == 2:
            grads[1][7] = float("inf")
        for scaler, chosen, tensors in zip(scalers, (optimizer, reference), (params, twins), strict=True):
            scaler.scale(torch.zeros((), device=backend.device))
            for p, g in zip(tensors, grads, strict=True):
                p.grad = g * scaler.get_scale()
            scaler.step(chosen)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert optimizer.skipped_steps == int(overflows)
    assert not hasattr(optimizer, "grad_scale")
    for p, q in zip(params, twins, strict=True):
        # One divides by the scale, the other multiplies by its reciprocal: powers of two, so both are exact.
        assert torch.equal(p, q)


UNSCALED = {**MAKES, "apollo": lambda params, **o: a8multi.APOLLO8bit(params, rank=4, update_proj_gap=2, **o)}


@pytest.mark.parametrize("skips", [False, True], ids=["scaler skips", "optimizer skips"])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("make", UNSCALED.values(), ids=UNSCALED.keys())
def test_unscaled_and_clipped_gradients(make: Any, bad: float | None, skips: bool, backend: BackendCase) -> None:
    """GradScaler.unscale_ and clip_grad_norm_ before the step: the bits of steps without a scaler."""
    params, twins = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, reference = make(params, skip_nonfinite=skips), make(twins)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0, growth_interval=2)
    for step in range(5):
        grads = gradients(params, step)
        spoilt = bad is not None and step == 2
        if spoilt:
            grads[1][7] = bad
        scaler.scale(torch.zeros((), device=backend.device))
        for p, g in zip(params, grads, strict=True):
            p.grad = g * scaler.get_scale()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        if not spoilt:
            assert norm > 0.5, "nothing was clipped"
            for p, g in zip(twins, grads, strict=True):
                p.grad = g
            torch.nn.utils.clip_grad_norm_(twins, 0.5)
            reference.step()
    assert scaler.get_scale() == (4096.0 if bad is None else 2048.0)
    assert optimizer.skipped_steps == int(skips and bad is not None)
    found = _plain(snapshot(optimizer, params), optimizer, params)
    assert not differences(found, _plain(snapshot(reference, twins), reference, twins))


def test_what_the_scaler_has_found_counts(backend: BackendCase) -> None:
    """Though the gradients have been mended since: as with torch's own optimizers, the step is skipped."""
    params = parameters(SHAPES, device=backend.device)
    optimizer = a8multi.AdamW8bit(params, skip_nonfinite=True)
    run(optimizer, params, range(1))
    before = snapshot(optimizer, params)
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=backend.device))
    for p, g in zip(params, gradients(params, 1), strict=True):
        p.grad = g
    params[1].grad[7] = float("inf")  # type: ignore[index]
    scaler.unscale_(optimizer)
    params[1].grad[7] = 0.0  # type: ignore[index]
    scaler.step(optimizer)
    scaler.update()
    assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 512.0)
    assert not differences(snapshot(optimizer, params), before)


@makes
def test_steps_without_gradients_keep_the_count(make: Any, backend: BackendCase) -> None:
    params = parameters(SHAPES, device=backend.device)
    optimizer = make(params, skip_nonfinite=True)

    def skipped_after(grads: list[Any]) -> int:
        optimizer.zero_grad(set_to_none=True)
        apply(optimizer, params, grads)
        return int(optimizer.skipped_steps)

    bad = gradients(params, 0)
    bad[2][5] = float("nan")
    none = [None] * len(params)
    assert [skipped_after(grads) for grads in (none, bad, none, gradients(params, 1), none, bad, none)] == [
        *(0, 1, 1, 1, 1, 2, 2)
    ]


def test_without_the_option_the_scaler_reads_back_itself() -> None:
    assert not a8multi.AdamW8bit(parameters([(8,)]))._step_supports_amp_scaling


def test_steps_become_numbers_again() -> None:
    """State saved with the option loads without it, and the other way round."""
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params, skip_nonfinite=True)
    run(optimizer, params, range(2))
    plain = a8multi.AdamW8bit(params)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.state[params[0]]["step"] == 2
    assert not plain.param_groups[0]["skip_nonfinite"]
    again = a8multi.AdamW8bit(params, skip_nonfinite=True)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.state[params[0]]["step"], torch.tensor(2))


def test_the_same_in_all_groups() -> None:
    params = parameters([(8,), (9,)])
    optimizer = a8multi.AdamW8bit([{"params": params[:1]}, {"params": params[1:], "skip_nonfinite": True}])
    with pytest.raises(ValueError, match="skip_nonfinite must be the same in all groups"):
        run(optimizer, params, range(1))


@pytest.mark.parametrize("kind", [a8multi.AdamW8bit, a8multi.Adafactor8bit, a8multi.CAME8bit, a8multi.Lion8bit])
def test_a_flag(kind: Any) -> None:
    with pytest.raises(ValueError, match="skip_nonfinite must be True or False"):
        kind(parameters([(8,)]), skip_nonfinite=1)

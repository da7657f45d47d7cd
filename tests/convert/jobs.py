"""A job that is carried over: some steps of the other optimizer, its state dict through a file, a step of both."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from optim.helpers import apply, assert_within, code_spacing, decoded, gradients, parameters, run
from torch import Tensor
from torch.nn import Parameter

import a8multi

# Quantised by everybody; not by torchao (not whole blocks); small; of no and of three dimensions.
SHAPES = ((64, 320), (65, 300), (4097,), (129,), (3, 5, 7), ())
FP32 = {"first_moment": "fp32", "second_moment": "fp32"}
# Between two float32 computations of one rule, relative, of a whole update: the parameter's own rounding is most of it.
ROUNDING = 1e-5
STEPS = 6


class Job(NamedTuple):
    """The other optimizer over its parameters, and ours over copies of them, with its state."""

    peer: torch.optim.Optimizer
    params: list[Parameter]
    ours: torch.optim.Optimizer
    twins: list[Parameter]


def trained(
    make: Callable[..., Any], shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, **how: Any
) -> tuple[torch.optim.Optimizer, list[Parameter]]:
    params = parameters(shapes, dtype)
    peer = make(params)
    run(peer, params, range(STEPS), scale=0.1, **how)
    return peer, params


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def carried(source: str, make: Callable[..., Any], ours: Callable[..., Any], **how: Any) -> Job:
    peer, params = trained(make, **how)
    twins = [Parameter(param.detach().clone()) for param in params]
    optimizer = ours(twins)
    saved = through_a_file(peer.state_dict())
    before = copy.deepcopy(saved["param_groups"])
    optimizer.load_state_dict(a8multi.convert_state_dict(saved, source, optimizer=optimizer))
    assert saved["param_groups"] == before
    return Job(peer, params, optimizer, twins)


def update_error(job: Job) -> float:
    """Of the next update of all parameters, relative to the other's, which is in float32 from its state."""
    before = [param.detach().double().clone() for param in job.params]
    grads = gradients(job.params, STEPS, scale=0.1)
    apply(job.peer, job.params, [g.clone() for g in grads])
    apply(job.ours, job.twins, grads)
    theirs = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(job.params, before, strict=True)])
    ours = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(job.twins, before, strict=True)])
    assert theirs.norm() > 0
    return float((ours - theirs).norm() / theirs.norm())


def assert_moment(job: Job, number: int, name: str, theirs: Tensor, block_size: int = 128) -> None:
    """A moment of ours is theirs, to the nearest code; to the bit where it is kept in float32."""
    state = job.ours.state[job.twins[number]]
    theirs = theirs.detach().double().cpu()
    exact = f"{name}_block" not in state
    bound = 0.0 if exact else code_spacing(state, name, theirs, block_size) * (1 + 1e-5) + 1e-36
    assert_within(decoded(state, name, theirs.shape, block_size), theirs, bound, f"{name} of parameter {number}")

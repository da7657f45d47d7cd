"""Streams, several devices, many tensors and huge ones. Needs a GPU, or two where it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BackendCase
from optim.helpers import apply, differences, gradients, parameters, snapshot

import a8multi

pytestmark = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cupy")], indirect=True
)

SHAPES = ((65, 300), (4097,), (129,), (513, 1025))
MAKES: dict[str, Callable[..., Any]] = {
    "adamw": a8multi.AdamW8bit,
    "factored nf4": lambda params: a8multi.Adafactor8bit(params, beta1=0.9),
    "came": a8multi.CAME8bit,
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
# Longer than any kernel here, in cycles: some 50 ms.
A_WHILE = 100_000_000


def _on_the_cpu(make: Callable[..., Any], shapes: Any = SHAPES, steps: int = 3) -> list[dict[str, Any]]:
    with a8multi.use_backend("cpu"):
        params = parameters(shapes)
        optimizer = make(params)
        for step in range(steps):
            apply(optimizer, params, gradients(params, step))
        return snapshot(optimizer, params)


@makes
def test_gradients_of_a_side_stream(backend: BackendCase, make: Callable[..., Any]) -> None:
    """Handed over as torch has it: the stream of the step waits for the other one, and nobody for the device."""
    params = parameters(SHAPES, device=backend.device)
    optimizer, side = make(params), torch.cuda.Stream()
    for step in range(3):
        values = gradients(params, step)
        grads = [torch.full_like(value, float("nan")) for value in values]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(A_WHILE)
            for grad, value in zip(grads, values, strict=True):
                grad.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        apply(optimizer, params, grads)
    assert not differences(snapshot(optimizer, params), _on_the_cpu(make))


@makes
def test_a_step_runs_on_the_current_stream(backend: BackendCase, make: Callable[..., Any]) -> None:
    """Pitfall 22: work queued before it on that stream is seen, and the other stream's is not waited for."""
    params = parameters(SHAPES, device=backend.device)
    optimizer, side = make(params), torch.cuda.Stream()
    sets = [gradients(params, step) for step in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for values in sets:
            grads = [torch.full_like(value, float("nan")) for value in values]
            torch.cuda._sleep(A_WHILE)
            for grad, value in zip(grads, values, strict=True):
                grad.copy_(value)
            apply(optimizer, params, grads)
    side.synchronize()
    assert not differences(snapshot(optimizer, params), _on_the_cpu(make))


@makes
def test_devices_that_are_not_the_current_one(backend: BackendCase, make: Callable[..., Any]) -> None:
    """Pitfall 22: parameters on the second device, and on both in turn; the current device stays what it is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = _on_the_cpu(make)
    for devices in (("cuda:1",), ("cuda:0", "cuda:1")):
        params = [
            torch.nn.Parameter(param.detach().to(devices[i % len(devices)]))
            for i, param in enumerate(parameters(SHAPES))
        ]
        optimizer = make(params)
        for step in range(3):
            apply(optimizer, params, gradients(params, step))
            assert torch.cuda.current_device() == 0
        assert not differences(snapshot(optimizer, params), expected), devices


# Steps on the second device alone, and then captured, with the first one current: torch's CUDAGraph starts that one.
_ON_THE_SECOND = """
import torch, a8multi
param = torch.nn.Parameter(torch.randn(65, 300, device="cuda:1"))
param.grad = torch.randn_like(param)
for make in (a8multi.AdamW8bit, a8multi.LAMB8bit, lambda p, **o: a8multi.Adafactor8bit(p, beta1=0.9, **o)):
    optimizer = make([param], capturable=True)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize(1)
assert torch._C._cuda_hasPrimaryContext(1) and not torch._C._cuda_hasPrimaryContext(0)
graph = torch.cuda.CUDAGraph()
with torch.cuda.device(1):
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
torch.cuda.synchronize(1)
assert int(optimizer.state[param]["step"]) == 3
"""


def test_a_device_that_nobody_uses_is_not_started(backend: BackendCase) -> None:
    """It would take some hundred MB there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    environment = {**os.environ, "A8MULTI_BACKEND": backend.name}
    run = subprocess.run([sys.executable, "-c", _ON_THE_SECOND], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@makes
def test_steps_on_changing_streams(backend: BackendCase, make: Callable[..., Any]) -> None:
    """Tables that one stream still reads are not handed to the next allocation of the one that they were made on."""
    params = parameters(SHAPES, device=backend.device)
    optimizer = make(params)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for step in range(6):
        stream, before = streams[step % 2], streams[(step + 1) % 2]
        stream.wait_stream(torch.cuda.current_stream() if step == 0 else before)
        with torch.cuda.stream(stream):
            grads = gradients(params, step)
            torch.cuda._sleep(A_WHILE // 10)
            apply(optimizer, params, grads)
            if step % 3 == 2:
                optimizer._roster = None  # the plan is made anew, and the memory of the old one is free
        with torch.cuda.stream(before):
            scribbled = [torch.full((size,), 255, dtype=torch.uint8, device=backend.device) for size in (512, 4096) * 9]
            del scribbled
    torch.cuda.synchronize()
    assert not differences(snapshot(optimizer, params), _on_the_cpu(make, steps=6))


@makes
def test_many_small_tensors(backend: BackendCase, make: Callable[..., Any]) -> None:
    shapes = tuple((16, 40 + i % 7) if i % 2 else (40 + i % 7, 16) for i in range(448))
    params = parameters(shapes, device=backend.device)
    optimizer = make(params)
    for step in range(2):
        apply(optimizer, params, gradients(params, step))
    assert not differences(snapshot(optimizer, params), _on_the_cpu(make, shapes, steps=2))


def _room(gibibytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of free device memory")


def test_more_than_two_to_the_31_elements(backend: BackendCase) -> None:
    """Pitfall 11: the last elements get what a tensor of those alone gets. Nothing random: noise counts elements."""
    _room(24)
    tail, numel = 1024 + 40, 2**31 + 1024 + 40  # whole chunks and blocks before the tail
    stored = torch.bfloat16
    small = torch.randn(tail, device=backend.device).to(stored)
    grad = torch.randn(tail, device=backend.device).to(stored)
    found = []
    for size in (tail, numel):
        param, filled = (torch.zeros(size, dtype=stored, device=backend.device) for _ in range(2))
        param[-tail:], filled[-tail:] = small, grad
        weights = torch.nn.Parameter(param)
        weights.grad = filled
        optimizer = a8multi.AdamW8bit([weights], lr=1e-2, stochastic_rounding=False, min_quantized_numel=0)
        for _ in range(2):
            optimizer.step()
        state = optimizer.state[weights]
        assert not bool(weights[:-tail].any()), "elements without a gradient have moved"
        found.append([value[-tail:].cpu() for value in (weights.detach(), state["exp_avg"], state["exp_avg_sq"])])
        del optimizer, weights, state, param, filled
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_matrix_of_more_than_two_to_the_31_elements(backend: BackendCase) -> None:
    """Pitfall 11: the sums of the last rows and columns, and the update of the last element."""
    _room(16)
    rows, cols = 2**16 + 1, 2**15
    param = torch.nn.Parameter(torch.zeros(rows, cols, dtype=torch.bfloat16, device=backend.device))
    param.grad = torch.zeros_like(param)
    param.grad[-1, -8:] = 1.0
    optimizer = a8multi.Adafactor8bit([param], lr=1.0, scale_parameter=False, relative_step=False)
    optimizer.step()
    state = optimizer.state[param]
    assert torch.equal(state["row_var"].reshape(-1).nonzero().cpu(), torch.tensor([[rows - 1]]))
    assert torch.equal(state["col_var"].reshape(-1).nonzero().reshape(-1).cpu(), torch.arange(cols - 8, cols))
    moved = param.detach()[-1, -8:]
    assert bool((moved < 0).all())
    assert int(param.detach().count_nonzero()) == 8

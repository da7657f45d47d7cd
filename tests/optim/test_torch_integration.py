"""What the rest of torch and of Python expects of an optimizer: autograd, checkpoints, threads, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from optim.helpers import differences, parameters, run, snapshot

import a8multi

KINDS = [a8multi.AdamW8bit, a8multi.Adafactor8bit, a8multi.SGD8bit, a8multi.LAMB8bit]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autograd_notices_that_a_parameter_was_stepped(backend: Any, kind: Any, transposed: bool) -> None:
    """Pitfall 25: the kernels write through raw pointers; a graph that saved the old values must not be used."""
    values = torch.ones(64, 64, device=backend.device)
    param = torch.nn.Parameter(values.t() if transposed else values)
    optimizer = kind([param])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    version = param._version
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_without_gradient_keep_their_version() -> None:
    params = parameters([(64,), (64,)])
    optimizer = a8multi.AdamW8bit(params)
    params[1].grad = torch.ones(64)
    optimizer.step()
    assert params[0]._version == 0
    assert params[1]._version > 0


# --- torch.distributed.checkpoint. ---


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 8)).to(torch.bfloat16)


def _train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 64, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without distributed")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_functions(kind: Any) -> None:
    """Pitfall 19: their dummy step changes no parameter, and after a load training goes on from the saved step."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = _model()
    optimizer = kind(model.parameters(), weight_decay=0.1, stochastic_rounding_writeback=True)
    _train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer)
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    twin = _model()
    twin.load_state_dict(weights)
    resumed = kind(twin.parameters(), weight_decay=0.1, stochastic_rounding_writeback=True)
    before = snapshot(resumed, list(twin.parameters()))
    get_optimizer_state_dict(twin, resumed)
    assert [s["param"] for s in snapshot(resumed, list(twin.parameters()))] == [s["param"] for s in before]
    set_optimizer_state_dict(twin, resumed, saved)
    assert {state["step"] for state in resumed.state.values()} == {3}
    _train(model, optimizer, range(3, 5))
    _train(twin, resumed, range(3, 5))
    assert not differences(snapshot(resumed, list(twin.parameters())), snapshot(optimizer, list(model.parameters())))


# --- Threads and processes. ---


def test_optimizers_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 26: none disturbs another. On the CPU library, whose sums do not depend on the number of threads."""
    monkeypatch.setenv("A8MULTI_BACKEND", "cpu")

    def trained(seed: int) -> Any:
        params = parameters([(65, 300), (40000,), (129,)], seed=seed)
        optimizer = KINDS[seed](params, lr=1e-2, seed=seed)
        run(optimizer, params, range(20))
        return snapshot(optimizer, params)

    expected = [trained(seed) for seed in range(4)]
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        torch.set_num_threads(2)
        found[seed] = trained(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(found) == [0, 1, 2, 3], "a thread hangs or has failed"
    for seed in range(4):
        assert not differences(found[seed], expected[seed])


FORK = """
import os, sys, torch, a8multi
torch.set_num_threads(3)
params = [torch.nn.Parameter(torch.randn(200000)), torch.nn.Parameter(torch.randn(300, 700))]
optimizer = {kind}(params)
def step():
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
step()
torch.set_num_threads(3)
child = os.fork()
if child == 0:
    # torch's own threads do not survive a fork: no operation of torch on large tensors here, only the step.
    optimizer.step()
    optimizer.step()
    os._exit(0 if optimizer.state[params[0]]["step"] == 3 else 1)
_, status = os.waitpid(child, 0)
step()
assert optimizer.state[params[0]]["step"] == 2
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this operating system has no fork")
@pytest.mark.parametrize("kind", ["a8multi.AdamW8bit", "a8multi.Adafactor8bit"])
def test_a_process_forked_after_a_step(kind: str) -> None:
    """Pitfall 26: the child's first step does not wait for threads that it does not have; the parent goes on too."""
    # The torch backend has torch's own threads, which a child of a fork waits for in vain.
    environment = {**os.environ, "A8MULTI_BACKEND": "cpu"}
    command = [sys.executable, "-c", FORK.format(kind=kind)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr


# --- torch.compile. ---


@pytest.mark.parametrize("kind", [*KINDS, lambda params: a8multi.APOLLO8bit(params, rank=4)])
def test_a_compiled_function_may_step(backend: Any, kind: Any) -> None:
    """Also as the first step of all, when everything is made. What is compiled gives the bits of what is not."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(70, 80).to(backend.device)
        optimizer = kind(model.parameters())
        data = torch.randn(4, 70).to(backend.device)

        def train(model: Any = model, optimizer: Any = optimizer, data: Any = data) -> None:
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(train, backend="eager") if compiled else train
        for _ in range(3):
            step()
        found.append(snapshot(optimizer, list(model.parameters())))
    assert not differences(*found)
    torch.compile(optimizer.step, backend="eager")()

"""State whose elements were put elsewhere in the very same tensors: no step may write where they were."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.multiprocessing  # registers how ForkingPickler takes tensors: to shared memory
from optim.helpers import differences, parameters, run, snapshot
from torch import Tensor

import a8multi

SHAPES = ((64, 80), (4097,), (33,))
KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda params: a8multi.AdamW8bit(params, min_quantized_numel=0),
    "ademamix": lambda params: a8multi.AdEMAMix8bit(params, min_quantized_numel=0),
    "came": lambda params: a8multi.CAME8bit(params, enable_fira=True, min_quantized_numel=0),
    "apollo": lambda params: a8multi.APOLLO8bit(params, rank=8),
}


def _tensors(optimizer: Any) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _data(optimizer: Any) -> None:
    for value in _tensors(optimizer):
        value.data = value.data.clone()


def _share(optimizer: Any) -> None:
    for value in _tensors(optimizer):
        value.share_memory_()


def _pickle_state_dict(optimizer: Any) -> None:
    ForkingPickler.dumps(optimizer.state_dict())


def _pickle(optimizer: Any) -> None:
    ForkingPickler.dumps(optimizer)


ON_THE_CPU = [_share, _pickle_state_dict, _pickle]


@pytest.mark.parametrize("move", [_data, *ON_THE_CPU])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_steps_follow_state_that_was_moved(backend: Any, make: Any, move: Any) -> None:
    if backend.device != "cpu" and move in ON_THE_CPU:
        move = _data  # a GPU's memory is shared as it is
    expected = parameters(SHAPES, device=backend.device)
    untouched = make(expected)
    run(untouched, expected, range(6))
    params = parameters(SHAPES, device=backend.device)
    optimizer = make(params)
    old: list[Tensor] = []
    for step in range(6):
        run(optimizer, params, [step])
        if move is _data:
            old += [value.detach() for value in _tensors(optimizer)]
            before = copy.deepcopy(old)
        if step in (1, 2, 4):
            move(optimizer)
        elif move is _data and step == 3:  # what was moved at step 2 is not written any more
            kept = len(old) - 2 * len(_tensors(optimizer))
            assert all(torch.equal(a, b) for a, b in zip(old[:kept], before[:kept], strict=True))
    assert not differences(snapshot(optimizer, params), snapshot(untouched, expected))


def test_tensors_kept_from_an_earlier_look_may_be_moved_later(backend: Any) -> None:
    params, expected = (parameters(SHAPES, device=backend.device) for _ in range(2))
    optimizer, untouched = a8multi.AdamW8bit(params), a8multi.AdamW8bit(expected)
    run(optimizer, params, range(2))
    kept = _tensors(optimizer)
    run(optimizer, params, range(2, 4))
    for value in kept:
        value.data = value.data.clone()
    run(optimizer, params, range(4, 6))
    run(untouched, expected, range(6))
    assert not differences(snapshot(optimizer, params), snapshot(untouched, expected))


def test_nobody_has_the_state_of_a_new_optimizer() -> None:
    """Then a step does not look where it lies."""
    params = parameters(SHAPES)
    optimizer = a8multi.AdamW8bit(params)
    run(optimizer, params, range(3))
    optimizer.zero_grad()
    assert not optimizer._is_handed_out
    optimizer.state_dict()
    assert optimizer._is_handed_out


IN_ANOTHER_PROCESS = """
import torch, a8multi

def child(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()

if __name__ == "__main__":
    params = [torch.nn.Parameter(torch.zeros(300, 400))]
    optimizer = a8multi.AdamW8bit(params)
    params[0].grad = torch.ones(300, 400)
    optimizer.step()
    process = torch.multiprocessing.get_context("spawn").Process(target=child, args=(optimizer,))
    process.start()
    process.join()
    for _ in range(3):
        optimizer.step()
    print("exit", process.exitcode)
"""


def test_an_optimizer_may_be_given_to_another_process(tmp_path: Any) -> None:
    script = tmp_path / "share.py"
    script.write_text(IN_ANOTHER_PROCESS, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "exit 0", done.stderr

"""Host time of ``optimizer.step()``: everything but the kernels, for a model of many small tensors.

    python bench/host_time.py [--tensors 448] [--rounds 200] [--device cuda] [--parts]

The backend is replaced by one that builds the batch and launches nothing. Gradients are new tensors at every step, as
``zero_grad(set_to_none=True)`` and ``backward`` make them. Prints the least and the median of all steps but ten, and
with --parts the least time of what a step consists of.
"""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import a8multi
from a8multi.backend import marshal
from a8multi.optim.hypers import hypers_of
from a8multi.plan import StepPlan


class LaunchesNothing:
    """A backend for steps that are only prepared."""

    name = "nothing"

    def elementwise(self, plan: StepPlan, hypers: np.ndarray) -> None:
        marshal.batch_of(plan, hypers)

    adafactor = elementwise


CASES: dict[str, Callable[[Any], Any]] = {
    "AdamW8bit": lambda params: a8multi.AdamW8bit(params, min_quantized_numel=0),
    "Adafactor8bit": a8multi.Adafactor8bit,
    "Adafactor8bit + nf4": lambda params: a8multi.Adafactor8bit(params, beta1=0.9, min_8bit_size=0),
}


def milliseconds(optimizer: Any, params: list[torch.nn.Parameter], rounds: int) -> list[float]:
    """Of each step; the addresses of the gradients change every time."""
    sets = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    times = []
    for step in range(rounds + 10):
        for param, grad in zip(params, sets[step % 2], strict=True):
            param.grad = grad.detach()
        if params[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return times[10:]


def parts(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """What a step consists of, each by itself. To be called after a step; the optimizer is of no use afterwards."""
    roster = optimizer._roster
    (work,) = roster.works.values()
    hypers, _ = hypers_of(work, optimizer._hyper, optimizer._schedule, False)
    work.take_grads()
    work.plan.grads, work.plan.addresses = work.grads, work.addresses
    tables = marshal._DeviceTables()

    def upload() -> None:
        work.plan.edition += 1
        tables.batch(work.plan, hypers)

    found = {
        "options": lambda: roster._options_hold(optimizer._check_group),
        "states": roster._states_hold,
        "gradients and metadata": work.take_grads,
        "hyper-parameters": lambda: hypers_of(work, optimizer._hyper, optimizer._schedule, False),
        "addresses": work.plan.address,
        "versions": lambda: torch.autograd.graph.increment_version(params),
        "counting": roster.count_steps,
    }
    return {**found, "upload": upload} if params[0].is_cuda else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    params = [torch.nn.Parameter(torch.zeros(64, 64, device=arguments.device)) for _ in range(arguments.tensors)]
    for name, make in CASES.items():
        optimizer = make(params)
        optimizer._backend = lambda device: LaunchesNothing()
        times = milliseconds(optimizer, params, arguments.rounds)
        print(f"{name:20}  {arguments.tensors} tensors  {min(times):.3f} ms  median {statistics.median(times):.3f} ms")
        for part, run in parts(optimizer, params).items() if arguments.parts else ():
            print(f"    {part:24} {1e3 * min(timeit.repeat(run, number=10, repeat=arguments.rounds)) / 10:.4f} ms")


if __name__ == "__main__":
    main()

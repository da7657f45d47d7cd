"""What a step of every optimizer costs on a GPU: its kernels, its host time, its first step, its memory.

    python bench/gpu_steps.py [--only NAME ...] [--sets SET/DTYPE ...] [--json FILE] [--compiling FILE]

kernels: device time of a step whose launches were all queued while the device was kept waiting, so that no host time
is in it. host: until step() returns. alone: a step from an idle device to an idle device, as `a8multi bench` has it.
graph: the same of a step that was captured in a CUDA graph, of our optimizers. first: from the constructor to the end
of the first step; first_compiling: the same in an earlier process, which had to compile (--compiling). Medians,
milliseconds; memory in bytes. copy: bytes a second, read and written, of a plain copy, for the floors. backend: what
ran ours. commit: A8_COMMIT of the environment.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from a8multi import backend_for
from a8multi.cli.bench import make_parameters, time_step
from a8multi.cli.candidates import CANDIDATES, REFERENCE, Candidate
from a8multi.cli.parameter_sets import PARAMETER_SETS
from a8multi.cli.system import versions

SETS = ("tinyllama-1.1b/bf16", "tinyllama-1.1b/fp32", "lora-r16-7b/bf16", "vit-s/fp32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAIT_CYCLES = 100_000_000  # some 50 ms: longer than the host takes for QUEUED steps
QUEUED, REPEATS = 3, 9


def queued_ms(step: Callable[[], Any]) -> tuple[float, float]:
    """Device and host time of one step, of QUEUED that wait for the device together."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    began = time.perf_counter()
    for _ in range(QUEUED):
        step()
    host = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / QUEUED, 1e3 * host / QUEUED


def copy_bandwidth() -> float:
    """Bytes a second of a copy of 4 GiB."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [queued_ms(lambda: target.copy_(source))[0] for _ in range(REPEATS)]
    return 2e3 * source.numel() / statistics.median(times)


def captured(optimizer: Any) -> Any:
    """What steps as the optimizer does, by a replay."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    for _ in range(2):  # the first moves the counters to the device
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return SimpleNamespace(step=graph.replay)


def measure(candidate: Candidate, parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    device = parameters[0].device
    torch.cuda.synchronize()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    optimizer = candidate.build(parameters)
    optimizer.step()
    torch.cuda.synchronize()
    first = 1e3 * (time.perf_counter() - began)
    optimizer.step()  # the last of what is made once
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    temporary = torch.cuda.max_memory_allocated() - held
    queued = [queued_ms(optimizer.step) for _ in range(REPEATS)]
    alone = [time_step(optimizer, device)[0] for _ in range(REPEATS)]
    times = {
        "kernels_ms": statistics.median(kernels for kernels, _ in queued),
        "host_ms": statistics.median(host for _, host in queued),
        "alone_ms": statistics.median(alone),
    }
    if candidate.name.startswith("a8multi"):
        replay = captured(optimizer)
        times["graph_ms"] = statistics.median(time_step(replay, device)[0] for _ in range(REPEATS))
    return {
        **times,
        "first_ms": first,
        "held_bytes": held - before,
        "temporary_bytes": temporary,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["a8multi*", REFERENCE.name], help="names; * stands for anything")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compiling", type=Path, help="the --json of an earlier run that found nothing compiled")
    options = parser.parse_args()
    compiling = json.loads(options.compiling.read_text(encoding="utf-8"))["sets"] if options.compiling else {}
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": os.environ.get("A8_COMMIT") or None,
        "backend": ", ".join(sorted({backend_for(device, op).name for op in ("elementwise", "adafactor")})),
        "versions": versions(),
        "copy": copy_bandwidth(),
        "sets": {},
    }
    torch.cuda.empty_cache()
    print(f"{result['device']}, copy {result['copy'] / 1e12:.2f} TB/s, backend {result['backend']}")
    chosen = [c for c in (REFERENCE, *CANDIDATES) if any(fnmatchcase(c.name, name) for name in options.only)]
    for name in options.sets:
        shapes, dtype = PARAMETER_SETS[name.split("/")[0]](), DTYPES[name.split("/")[1]]
        parameters = make_parameters(shapes, device, dtype, seed=0)
        print(f"{name}: {len(shapes)} tensors, {sum(map(math.prod, shapes)) / 1e6:.1f} M parameters")
        rows = result["sets"][name] = {}
        for candidate in chosen:
            rows[candidate.name] = row = measure(candidate, parameters)
            gc.collect()  # of the optimizer just timed, before the next takes its memory
            if earlier := compiling.get(name, {}).get(candidate.name):
                row["first_compiling_ms"] = earlier["first_ms"]
            times = (f"{key[:-3]} {row[key]:8.3f}" for key in row if key.endswith("_ms"))
            print(f"  {candidate.name:38}", *times, flush=True)
        del parameters
        gc.collect()
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

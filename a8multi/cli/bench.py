"""`a8multi bench`: steps of the optimizers, timed beside torch's fused AdamW and the peers."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from a8multi.cli.console import (
    EXIT_FAILED,
    EXIT_OK,
    CommandError,
    device_argument,
    first_line,
    format_table,
    positive_int,
    require_writable,
    seed,
    synchronize,
    thread_count,
    within_memory,
    writing,
)
from a8multi.cli.parameter_sets import PARAMETER_SETS, Shape

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from a8multi.cli.candidates import Candidate

DESCRIPTION = """\
Time one optimizer step against torch's fused AdamW and the peers that are installed.

Each optimizer takes turns with torch.optim.AdamW(fused=True) on the same tensors, so that a machine that slows down or
speeds up does so for both: trust the ratios more than the milliseconds.
"""
DEFAULT_SET = "gpt2-52m"
TIMED_STEPS_CPU = 7
TIMED_STEPS_DEVICE = 15
WARMUP_STEPS = 2
PARAMETER_STD = 0.02
GRADIENT_STD = 1e-3


@dataclass
class Row:
    """What was measured for one optimizer.

    Attributes:
        ms, host_ms: median time of a step; host_ms is the time until the call returned, on a GPU only.
        ratio: median of the ratios to the reference's step of the same turn.
        ratio_of_medians: ms over the reference's median in the same turns.
        state_bytes_per_param: of all tensors in the optimizer's state.
        times_ms, reference_times_ms: every timed step, turn by turn.
        error: why there is no measurement; the numbers are None then.
    """

    name: str
    backend: str | None = None
    ms: float | None = None
    host_ms: float | None = None
    ratio: float | None = None
    ratio_of_medians: float | None = None
    state_bytes_per_param: float | None = None
    times_ms: list[float] = field(default_factory=list)
    reference_times_ms: list[float] = field(default_factory=list)
    error: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--set", choices=sorted(PARAMETER_SETS), default=DEFAULT_SET, help=f"parameter shapes; default {DEFAULT_SET}")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of parameters and gradients; default fp32")
    add("--device", help="default cuda if there is one, else cpu")
    add("--steps", type=positive_int, help=f"timed steps; default {TIMED_STEPS_CPU} on cpu, else {TIMED_STEPS_DEVICE}")
    add("--only", metavar="PATTERN", help="optimizers whose name holds this text or matches this pattern")
    add("--threads", type=thread_count, help="CPU threads; default torch's choice")
    add("--seed", type=seed, default=0, help="of parameters and gradients; default 0")
    add("--json", metavar="FILE", type=Path, help="also write every measurement to this file")


def run(args: argparse.Namespace) -> int:
    """Measures, writes, prints the table. Exit status 1 if one of a8multi's own optimizers could not run."""
    import torch

    from a8multi.cli.candidates import PEER_PACKAGES, REFERENCE, is_installed

    device = device_argument(args.device)
    chosen = _chosen(args.only)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.json:
        require_writable("--json", args.json)
    steps = args.steps or (TIMED_STEPS_CPU if device.type == "cpu" else TIMED_STEPS_DEVICE)
    shapes = PARAMETER_SETS[args.set]()
    count = sum(map(math.prod, shapes))
    print(
        f"{args.set}: {len(shapes)} tensors, {count / 1e6:.1f} M parameters, {args.dtype}, on {device}"
        f"{f' with {torch.get_num_threads()} threads' if device.type == 'cpu' else ''}; "
        f"{steps} timed steps after {WARMUP_STEPS}, in turns with {REFERENCE.name}",
        flush=True,
    )
    missing = [package for package in PEER_PACKAGES if not is_installed(package)]
    if missing:
        print(f"Not installed, so not timed: {', '.join(missing)}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with within_memory("choose a smaller --set"):
        parameters = make_parameters(shapes, device, dtype, args.seed)
    rows = []
    for candidate in (REFERENCE, *chosen):
        # Not among the results: `| head` must not end the measurement.
        print(f"  {candidate.name} ...", file=sys.stderr, flush=True)
        rows.append(measure(candidate, parameters, device, steps))
    try:
        if args.json:
            _write(args, rows, device, steps)
    finally:
        print(_table(rows, device))
    if args.json:
        print(f"Wrote {args.json}")
    ours_failed = any(row.error for row in rows if row.name.startswith("a8multi "))
    return EXIT_FAILED if ours_failed else EXIT_OK


def _write(args: argparse.Namespace, rows: list[Row], device: torch.device, steps: int) -> None:
    import torch

    from a8multi.cli.system import versions

    document = {
        "set": args.set,
        "dtype": args.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "parameter_count": sum(map(math.prod, PARAMETER_SETS[args.set]())),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    with writing("--json", args.json):
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _chosen(pattern: str | None) -> list[Candidate]:
    from a8multi.cli.candidates import CANDIDATES, is_installed

    if pattern is None:
        return [candidate for candidate in CANDIDATES if is_installed(candidate.package)]
    lowered = pattern.lower()
    named = [one for one in CANDIDATES if lowered in one.name.lower() or fnmatch.fnmatch(one.name.lower(), lowered)]
    if not named:
        raise CommandError(f"--only {pattern!r} matches none of: {', '.join(one.name for one in CANDIDATES)}")
    # Asked for by name, a missing package is a row with the reason, not silence.
    return named


def make_parameters(
    shapes: list[Shape], device: torch.device, dtype: torch.dtype, seed: int
) -> list[torch.nn.Parameter]:
    """Parameters N(0, 0.02) of these shapes with gradients N(0, 1e-3), seeded."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, std: float) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, std, generator=generator)

    parameters = [torch.nn.Parameter(normal(shape, PARAMETER_STD)) for shape in shapes]
    for parameter, shape in zip(parameters, shapes, strict=True):
        parameter.grad = normal(shape, GRADIENT_STD)
    return parameters


def measure(candidate: Candidate, parameters: list[torch.nn.Parameter], device: torch.device, steps: int) -> Row:
    """Times a candidate in turns with the reference.

    Each steps parameters of its own, as in training, where nobody else writes them between two steps; the gradients are
    shared. Any failure of the candidate becomes the row's error, so that one broken peer spoils no other row.
    """
    from a8multi.cli.candidates import REFERENCE

    row = Row(candidate.name)
    try:
        optimizer = candidate.build(parameters)
        # The reference takes turns with itself: its ratio, which should be 1, shows how much the machine wavers.
        reference = optimizer if candidate is REFERENCE else REFERENCE.build(_copies(parameters))
        for _ in range(WARMUP_STEPS):
            time_step(reference, device)
            time_step(optimizer, device)
        host = []
        for _ in range(steps):
            row.reference_times_ms.append(time_step(reference, device)[0])
            elapsed_ms, host_ms = time_step(optimizer, device)
            row.times_ms.append(elapsed_ms)
            host.append(host_ms)
        _fill(row, optimizer, parameters, device, host)
    except Exception as error:
        row = Row(candidate.name, error=f"{type(error).__name__}: {first_line(error)}")
    finally:
        # The next candidate needs the memory of this one's state.
        optimizer = reference = None  # type: ignore[assignment]
        gc.collect()
    return row


def _copies(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    import torch

    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy, parameter in zip(copies, parameters, strict=True):
        copy.grad = parameter.grad
    return copies


def time_step(optimizer: Optimizer, device: torch.device) -> tuple[float, float]:
    """One step. Returns its milliseconds on the device, and until the call returned; on the CPU they are equal."""
    import torch

    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            began = time.perf_counter()
            start.record()
            optimizer.step()
            end.record()
            host_ms = 1e3 * (time.perf_counter() - began)
            torch.cuda.synchronize()
            return start.elapsed_time(end), host_ms
    synchronize(device)
    began = time.perf_counter()
    optimizer.step()
    host_ms = 1e3 * (time.perf_counter() - began)
    synchronize(device)
    return 1e3 * (time.perf_counter() - began), host_ms


def _fill(
    row: Row, optimizer: Optimizer, parameters: list[torch.nn.Parameter], device: torch.device, host_ms: list[float]
) -> None:
    from a8multi.cli.optimizers import state_bytes

    ratios = [own / other for own, other in zip(row.times_ms, row.reference_times_ms, strict=True)]
    row.ms = statistics.median(row.times_ms)
    row.ratio = statistics.median(ratios)
    row.ratio_of_medians = row.ms / statistics.median(row.reference_times_ms)
    row.host_ms = statistics.median(host_ms) if device.type == "cuda" else None
    row.state_bytes_per_param = state_bytes(optimizer) / sum(parameter.numel() for parameter in parameters)
    if row.name.startswith("a8multi "):
        import a8multi

        # The class knows: CAME and APOLLO are of the Adafactor family too.
        row.backend = str(a8multi.backend_for(device, op=optimizer._op).name)  # type: ignore[attr-defined]


def _table(rows: list[Row], device: torch.device) -> str:
    on_cuda = device.type == "cuda"
    headers = ["optimizer", "ms", *(["host ms"] if on_cuda else []), "ratio", "of medians", "state B/param", "backend"]

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    cells = [
        [
            row.name,
            number(row.ms, 2),
            *([number(row.host_ms, 2)] if on_cuda else []),
            number(row.ratio, 2),
            number(row.ratio_of_medians, 2),
            number(row.state_bytes_per_param, 3),
            row.backend or "-",
        ]
        for row in rows
    ]
    notes = [f"{row.name}: {row.error}" for row in rows if row.error]
    legend = "ratio: to torch AdamW fused, median over the turns; of medians: the ratio of the two median times."
    return "\n".join([format_table(headers, cells), legend, *notes])

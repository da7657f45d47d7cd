"""Closed-loop update error: how far the update of a quantised optimizer is from that of its fp32 rule.

One fp32 `torch.optim.AdamW` trains a byte-level transformer and so makes the gradients. At every step each candidate
gets the parameters and the gradient of that run, and steps with its own quantised state: the change is its update. The
error is the norm of (update - reference's update) over the norm of the reference's update, of all tensors of 4096
elements or more together. If it grows with the steps, the state loses its moving average. The reference is the fp32
run itself (--family adamw) or the candidate's own class with fp32 state, stepped likewise (the other families).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fidelity_experiment import Experiment
from fidelity_families import FAMILIES, OPERATIONS, REPORT_AT

import a8multi
from a8multi.cli import console
from a8multi.cli.candidates import PEER_PACKAGES
from a8multi.cli.console import CommandError, positive_int
from a8multi.cli.data import load_text
from a8multi.cli.optimizers import state_bytes
from a8multi.cli.system import versions
from a8multi.cli.train import StopOnInterrupt


def document(experiment: Experiment, report_at: Sequence[int], command: str) -> dict[str, Any]:
    """The result as JSON. Curves hold every step up to 20, then every tenth; `worst` is over all steps."""
    rows = []
    for row in experiment.rows:
        errors = {step: float(f"{error:.4g}") for step, error in enumerate(row.errors, 1)}
        worst = max(errors, key=errors.__getitem__) if errors else None
        follower = experiment.followers.get(row.name)
        bytes_per_param = state_bytes(follower.optimizer) / experiment.parameter_count if follower else None
        measured = {
            "errors": {str(at): errors[at] for at in report_at if at in errors},
            "worst": worst and {"step": worst, "error": errors[worst]},
            "curve": {str(at): error for at, error in errors.items() if at <= 20 or at % 10 == 0},
            "state_bytes_per_param": bytes_per_param,
        }
        rows.append(asdict(row) | measured)
    components = ("python", "cpu", "torch", "numpy", "a8multi", *PEER_PACKAGES)
    operation = OPERATIONS[experiment.config["family"]]
    return {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version for name, version in versions().items() if name in components},
        "backend": a8multi.backend_for("cpu", operation).name,
        "threads": torch.get_num_threads(),
        "config": experiment.config,
        "text_digest": experiment.text.digest,
        "steps": experiment.step_count,
        "parameter_count": experiment.parameter_count,
        "counted_parameter_count": experiment.counted_count,
        "final_loss": experiment.loss,
        "rows": rows,
    }


def table(result: dict[str, Any], report_at: Sequence[int]) -> str:
    cells = []
    for row in result["rows"]:
        numbers = [f"{row['errors'][str(at)]:.3g}" if str(at) in row["errors"] else "-" for at in report_at]
        worst = f"{row['worst']['error']:.3g} ({row['worst']['step']})" if row["worst"] else "-"
        size = row["state_bytes_per_param"]
        cells.append([row["name"], *numbers, worst, f"{size:.3f}" if size else "-"])
    headers = ["candidate", *(f"step {at}" for at in report_at), "worst (step)", "state B/param"]
    notes = [f"{row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
    return "\n".join([console.format_table(headers, cells), *notes])


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = FigureCanvasAgg(Figure(figsize=(10, 5.5), layout="constrained")).figure
    # Light and dark by turns: a peer's row, which follows ours, has the same hue.
    axes, colors = figure.subplots(), colormaps["tab20"]
    for index, row in enumerate(result["rows"]):
        # Equal rules have an error of 0, which a logarithmic axis cannot show.
        points = [(int(at), error) for at, error in row["curve"].items() if error > 0]
        if points:
            style = "-" if row["name"].startswith("a8multi") else "--"
            axes.plot(*zip(*points, strict=True), style, color=colors(index % 20), linewidth=1.2, label=row["name"])
    # From 1e-3: what is below is the rounding of fp32 arithmetic.
    axes.set(yscale="log", ylim=(1e-3, None), xlabel="step", ylabel="update error, relative to fp32")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    made = console.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--family", choices=list(FAMILIES), default="adamw", help="default adamw")
    add("--steps", type=positive_int, help="default: the last step of --report-at")
    add("--report-at", type=positive_int, nargs="+", metavar="STEP", help="columns of the table")
    add("--only", metavar="NAME", nargs="+", help="candidates of these names; * stands for anything")
    add("--json", type=Path, metavar="FILE", help="also write every measurement")
    add("--png", type=Path, metavar="FILE", help="also plot the error by step")
    add("--resume", type=Path, metavar="FILE", help="keep a checkpoint there, and go on from it if it exists")
    add("--checkpoint-every", type=positive_int, default=100, metavar="N", help="steps; default 100")
    add("--data", metavar="PATH", help="text file or directory; default this Python's standard library")
    add("--threads", type=positive_int, help="CPU threads; default torch's choice")
    for name, default in (("width", 128), ("layers", 4), ("heads", 4), ("context", 64), ("batch-size", 8)):
        add(f"--{name}", type=positive_int, default=default, help=f"default {default}")
    add("--seed", type=console.non_negative_int, default=0, help="of weights and batches; default 0")
    return made


def run(args: argparse.Namespace, command: str) -> int:
    (tqdm,) = console.require_train_extra("tqdm", *(["matplotlib"] if args.png else []))[:1]
    for path in filter(None, (args.json, args.png, args.resume)):
        path.parent.mkdir(parents=True, exist_ok=True)
    report_at = args.report_at or [at for at in REPORT_AT[args.family] if at <= (args.steps or at)] or [args.steps]
    steps = args.steps or max(report_at)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = ("family", "only", "seed", "threads", "width", "layers", "heads", "context", "batch_size")
    experiment = Experiment({name: getattr(args, name) for name in names}, load_text(args.data, args.context))
    if args.resume and args.resume.exists():
        experiment.load(args.resume)
    with StopOnInterrupt() as stop, tqdm.tqdm(total=steps, initial=experiment.step_count, unit="step") as bar:
        while experiment.step_count < steps and not stop.requested:
            experiment.step()
            bar.set_postfix(loss=f"{experiment.loss:.3f}", refresh=False)
            bar.update()
            if args.resume and experiment.step_count % args.checkpoint_every == 0:
                experiment.save(args.resume)
    if args.resume:
        experiment.save(args.resume)
    result = document(experiment, report_at, command)
    print(f"{experiment.step_count} of {steps} steps", table(result, report_at), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.png:
        plot(result, args.png)
    if stop.requested:
        return console.EXIT_INTERRUPTED
    ours_failed = any(row.note for row in experiment.rows if row.name.startswith("a8multi "))
    return console.EXIT_FAILED if ours_failed else console.EXIT_OK


def main(arguments: Sequence[str]) -> int:
    """Measures. Exit status 0 done, 1 one of a8multi's own optimizers failed, 2 asked for wrongly, 130 Ctrl-C."""
    try:
        return run(parser().parse_args(arguments), shlex.join(["python", "bench/fidelity.py", *arguments]))
    except CommandError as error:
        print(f"fidelity: error: {error}", file=sys.stderr)
        return console.EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

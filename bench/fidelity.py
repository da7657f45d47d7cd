"""Closed-loop update error: how far the update of a quantised optimizer is from that of its fp32 rule.

One fp32 `torch.optim.AdamW` trains a byte-level transformer and so makes the gradients. At every step each candidate
gets the parameters and the gradient of that run, and steps with its own quantised state: the change is its update. The
error is the norm of (update - reference's update) over the norm of the reference's update, of all tensors of 4096
elements or more together. If it grows with the steps, the state loses its moving average. The reference is the fp32
run itself (--family adamw) or the candidate's own class with fp32 state, stepped likewise (the other families).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import script
from fidelity_experiment import Experiment
from fidelity_families import REPORT_AT

from a8multi.cli import console
from a8multi.cli.console import positive_int
from a8multi.cli.data import load_text
from a8multi.cli.optimizers import state_bytes
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
    return script.head(experiment.config, experiment.text, command) | {
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
    return script.table(headers, cells, result["rows"])


def plot(result: dict[str, Any], path: Path) -> None:
    def draw(axes: Any, color: Any) -> None:
        for index, row in enumerate(result["rows"]):
            # Equal rules have an error of 0, which a logarithmic axis cannot show.
            points = [(int(at), error) for at, error in row["curve"].items() if error > 0]
            if points:
                style = "-" if row["name"].startswith("a8multi") else "--"
                axes.plot(*zip(*points, strict=True), style, color=color(index), linewidth=1.2, label=row["name"])
        # From 1e-3: what is below is the rounding of fp32 arithmetic.
        axes.set(yscale="log", ylim=(1e-3, None), ylabel="update error, relative to fp32")

    script.save_figure(path, 5.5, 1, draw)


def parser() -> argparse.ArgumentParser:
    made = script.parser(__doc__, script.MODEL_SIZES)
    add = made.add_argument
    add("--steps", type=positive_int, help="default: the last step of --report-at")
    add("--report-at", type=positive_int, nargs="+", metavar="STEP", help="columns of the table")
    add("--seed", type=console.non_negative_int, default=0, help="of weights and batches; default 0")
    add("--resume", type=Path, metavar="FILE", help="keep a checkpoint there, and go on from it if it exists")
    add("--checkpoint-every", type=positive_int, default=100, metavar="N", help="steps; default 100")
    return made


def run(args: argparse.Namespace, command: str) -> int:
    tqdm = script.prepare(args)
    report_at = args.report_at or [at for at in REPORT_AT[args.family] if at <= (args.steps or at)] or [args.steps]
    steps = args.steps or max(report_at)
    config = script.settle(args, ("family", "only", "seed", *script.MODEL_SIZES))
    experiment = Experiment(config, load_text(args.data, args.context))
    if args.resume:
        args.resume.parent.mkdir(parents=True, exist_ok=True)
        if args.resume.exists():
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
        script.write_json(result, args.json)
    if args.png:
        plot(result, args.png)
    return script.exit_status(result, stop.requested)


def main(arguments: Sequence[str]) -> int:
    """As script.main."""
    return script.main("fidelity", parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

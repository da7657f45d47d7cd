"""Loss against steps on real text: 8-bit state beside fp32 beside the peers, over several seeds.

Every candidate trains the model of `a8multi train` on its text, as it does: weights, batches and rounding noise follow
from the seed, so that the rows of a seed differ in the optimizer alone. Each row is compared with the same rule with
fp32 state (--family adamw: torch.optim.AdamW). The question is whether the mean over the seeds is within one standard
error of that of fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fidelity_families import FAMILIES, OPERATIONS, Candidate, chosen, reference_of
from torch.optim import Optimizer

import a8multi
from a8multi.cli import console
from a8multi.cli.candidates import PEER_PACKAGES, is_installed
from a8multi.cli.console import CommandError, positive_int
from a8multi.cli.data import Text, batch_of_step, load_text, validation_batches
from a8multi.cli.optimizers import Choice, Parameters
from a8multi.cli.system import versions
from a8multi.cli.train import StopOnInterrupt
from a8multi.cli.trainer import VALIDATION_SEQUENCES, Run, TrainConfig

FORMAT = "a8multi-losses-1"
CPU = torch.device("cpu")
# A point of a curve is the mean of so many steps: single batches say little.
CURVE_STEPS = 10
# Of TrainConfig, what can be asked for here.
SIZES = ("steps", "batch_size", "context", "warmup", "width", "layers", "heads")


@dataclass
class Row:
    """One candidate; runs has one entry a seed that is done; note says why there are no more."""

    name: str
    reference: str | None
    runs: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None

    def losses(self, kind: str = "validation_loss") -> list[float]:
        return [run[kind] for run in self.runs]


class Measurement:
    """Rows and seeds, done one after the other.

    config holds what the numbers depend on: family, only, seeds, seed, threads, and the SIZES. Must not print.
    """

    def __init__(self, config: dict[str, Any], text: Text) -> None:
        self.config, self.text = config, text
        self.sizes = TrainConfig(threads=config["threads"], **{name: config[name] for name in SIZES})
        self.candidates: dict[str, Candidate] = {}
        self.rows: list[Row] = []
        for candidate in chosen(config["family"], config["only"]):
            if not is_installed(candidate.package):
                self.rows.append(Row(candidate.name, None, note="not installed"))
                continue
            reference = reference_of(config["family"], candidate)
            for one, of in ((reference, None), (candidate, reference.name)):
                if one.name not in self.candidates:
                    self.candidates[one.name] = one
                    self.rows.append(Row(one.name, of))

    def todo(self) -> list[tuple[Row, int]]:
        """Rows and seeds that are not done, all rows of a seed before the next one."""
        seeds = range(self.config["seed"], self.config["seed"] + self.config["seeds"])
        return [
            (row, seed)
            for seed in seeds
            for row in self.rows
            if not row.note and seed not in [run["seed"] for run in row.runs]
        ]

    def train(self, row: Row, seed: int, after_step: Callable[[float], bool]) -> None:
        """Trains one row with one seed. after_step gets every loss; False from it stops, and nothing is kept."""
        sizes = replace(self.sizes, seed=seed)
        batches = validation_batches(self.text, sizes.batch_size, sizes.context, VALIDATION_SEQUENCES)
        try:
            run = Run(row.name, _choice(self.candidates[row.name]), sizes, CPU, torch.float32)
            for step in range(sizes.steps):
                batch = batch_of_step(self.text, sizes.batch_size, sizes.context, seed, step)
                if not after_step(run.train_step(batch, min(1.0, (step + 1) / (sizes.warmup + 1)))):
                    return
            summary = run.summary(batches)
        except Exception as error:  # a peer may raise anything, and any may diverge: that must not spoil the other rows
            row.note = f"seed {seed}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return
        points = [run.losses[at : at + CURVE_STEPS] for at in range(0, len(run.losses), CURVE_STEPS)]
        row.runs.append(
            {
                "seed": seed,
                "validation_loss": summary.validation_loss,
                "train_loss": summary.train_loss,
                "state_bytes_per_param": summary.state_bytes / summary.parameter_count,
                "curve": [float(f"{statistics.fmean(point):.5g}") for point in points],
            }
        )

    def compare(self, row: Row) -> dict[str, Any]:
        """Mean and standard error of a row's validation losses, and of its differences to its reference by seed."""
        own = row.losses()
        result = {"mean": statistics.fmean(own) if own else None, "standard_error": standard_error(own)}
        reference = next((one for one in self.rows if one.name == row.reference), None)
        other = reference.losses() if reference else []
        if not own or len(own) != len(other):
            return result
        differences = [a - b for a, b in zip(own, other, strict=True)]
        allowed, difference = standard_error(other), statistics.fmean(differences)
        return result | {
            "difference": difference,
            "difference_standard_error": standard_error(differences),
            "within_one_standard_error": None if allowed is None else abs(difference) <= allowed,
        }

    def document(self, command: str) -> dict[str, Any]:
        components = ("python", "cpu", "torch", "numpy", "a8multi", *PEER_PACKAGES)
        return {
            "format": FORMAT,
            "command": command,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "versions": {name: version for name, version in versions().items() if name in components},
            "backend": a8multi.backend_for("cpu", OPERATIONS[self.config["family"]]).name,
            "config": self.config,
            "text_digest": self.text.digest,
            "rows": [asdict(row) | self.compare(row) for row in self.rows],
        }

    def load(self, path: Path) -> None:
        """Takes over the runs of a document; CommandError if it was made with other options or another text."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made_with = found["format"], found["config"], found["text_digest"]
            rows = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in found["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--resume: {path} is no result of this script ({type(error).__name__})") from error
        if made_with != (FORMAT, self.config, self.text.digest):
            raise CommandError(f"--resume: {path} was made with other options ({made_with[1]}) or another text")
        if [row.name for row in rows] != [row.name for row in self.rows]:
            raise CommandError(f"--resume: {path} was made with other packages installed")
        self.rows = rows


def _choice(candidate: Candidate) -> Choice:
    """As the trainer takes it. The seed goes to optimizers of ours only: no other rounds stochastically."""

    def build(parameters: Parameters, lr: float, seed: int, _dtype: torch.dtype) -> Optimizer:
        seeded = {"seed": seed} if candidate.package == "a8multi" else {}
        return replace(candidate, options={**candidate.options, **seeded, "lr": lr}).build(list(parameters))

    return Choice(twin="", lr=candidate.options["lr"], op=None, build=build)


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean, from their own spread; None: fewer than two say nothing of it."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(result: dict[str, Any]) -> str:
    def number(row: dict[str, Any], name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    cells = []
    for row in result["rows"]:
        within = {None: "-", True: "yes", False: "no"}[row.get("within_one_standard_error")]
        formats = {"mean": ".4f", "standard_error": ".4f", "difference": "+.4f", "difference_standard_error": ".4f"}
        size = f"{row['runs'][0]['state_bytes_per_param']:.3f}" if row["runs"] else "-"
        cells.append([row["name"], *(number(row, name, form) for name, form in formats.items()), within, size])
    headers = ["candidate", "val loss", "s.e.", "to fp32", "s.e.", "within s.e. of fp32", "state B/param"]
    notes = [f"{row['name']}: {row['note']}" for row in result["rows"] if row["note"]]
    legend = "Losses in nats a byte. s.e.: standard error of the mean over the seeds; to fp32: paired by seed."
    return "\n".join([console.format_table(headers, cells), legend, *notes])


def plot(result: dict[str, Any], path: Path) -> None:
    """Training loss, mean over the seeds with their spread (one standard deviation); below, the difference to fp32."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = FigureCanvasAgg(Figure(figsize=(10, 7.5), layout="constrained")).figure
    (losses, differences), colors = figure.subplots(2, 1, sharex=True), colormaps["tab20"]
    curves = {row["name"]: np.array([run["curve"] for run in row["runs"]]) for row in result["rows"]}

    def draw(axes: Any, values: Any, index: int, style: str, label: str | None) -> None:
        mean, spread = values.mean(0), values.std(0)
        steps = CURVE_STEPS * (np.arange(len(mean)) + 0.5)
        axes.plot(steps, mean, style, color=colors(index % 20), linewidth=1.2, label=label)
        axes.fill_between(steps, mean - spread, mean + spread, color=colors(index % 20), alpha=0.15, linewidth=0)

    for index, row in enumerate(result["rows"]):
        own, other = curves[row["name"]], curves.get(row["reference"] or "")
        style = ":" if row["reference"] is None else "-" if row["name"].startswith("a8multi") else "--"
        if len(own):
            draw(losses, own, index, style, row["name"])
        if other is not None and len(own) and len(own) == len(other):
            draw(differences, own - other, index, style, None)
    losses.set(ylabel="training loss, nats a byte")
    differences.set(xlabel="step", ylabel="difference to the same rule in fp32")
    differences.axhline(0, color="gray", linewidth=0.7)
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    made = console.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--family", choices=list(FAMILIES), default="adamw", help="default adamw")
    add("--only", metavar="NAME", nargs="+", help="candidates of these names; * stands for anything")
    add("--seeds", type=positive_int, default=3, help="how many; default 3")
    add("--seed", type=console.non_negative_int, default=0, help="the first of them; default 0")
    add("--json", type=Path, metavar="FILE", help="also write every measurement, after each run")
    add("--png", type=Path, metavar="FILE", help="also plot the losses by step")
    add(
        "--resume", action="store_true", help="go on from the --json file if it exists; a run that was cut is made anew"
    )
    add("--data", metavar="PATH", help="text file or directory; default this Python's standard library")
    add("--threads", type=positive_int, help="CPU threads; default torch's choice")
    for name in SIZES:
        default = TrainConfig.__dataclass_fields__[name].default
        add(f"--{name.replace('_', '-')}", type=positive_int, default=default, help=f"default {default}")
    return made


def _write(result: dict[str, Any], path: Path) -> None:
    """An old file stays until the new one is whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run(args: argparse.Namespace, command: str) -> int:
    (tqdm,) = console.require_train_extra("tqdm", *(["matplotlib"] if args.png else []))[:1]
    if args.resume and not args.json:
        raise CommandError("--resume needs --json FILE, to go on from")
    for path in filter(None, (args.json, args.png)):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    names = ("family", "only", "seeds", "seed", "threads", *SIZES)
    config = {name: getattr(args, name) for name in names} | {"threads": torch.get_num_threads()}
    measurement = Measurement(config, load_text(args.data, args.context))
    if args.resume and args.json.exists():
        measurement.load(args.json)
    todo = measurement.todo()
    with StopOnInterrupt() as stop, tqdm.tqdm(total=len(todo) * args.steps, unit="step") as bar:

        def after_step(loss: float) -> bool:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            return not stop.requested

        for row, seed in todo:
            if stop.requested or row.note:
                continue
            bar.set_description(f"{row.name}, seed {seed}")
            measurement.train(row, seed, after_step)
            if args.json:
                _write(measurement.document(command), args.json)
    result = measurement.document(command)
    print(table(result))
    if args.png:
        plot(result, args.png)
    if stop.requested:
        return console.EXIT_INTERRUPTED
    ours_failed = any(row.note for row in measurement.rows if row.name.startswith("a8multi "))
    return console.EXIT_FAILED if ours_failed else console.EXIT_OK


def main(arguments: Sequence[str]) -> int:
    """Measures. Exit status 0 done, 1 one of a8multi's own optimizers failed, 2 asked for wrongly, 130 Ctrl-C."""
    try:
        return run(parser().parse_args(arguments), shlex.join(["python", "bench/losses.py", *arguments]))
    except CommandError as error:
        print(f"losses: error: {error}", file=sys.stderr)
        return console.EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

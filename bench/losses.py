"""Loss against steps on real text: 8-bit state beside fp32 beside the peers, over several seeds.

Every candidate trains the model of `a8multi train` on its text, as it does: weights, batches and rounding noise follow
from the seed, so that the rows of a seed differ in the optimizer alone. Each row is compared with the same rule with
fp32 state (--family adamw: torch.optim.AdamW). The question is whether the mean over the seeds is within one standard
error of that of fp32. Several processes can share the work, each with seeds or rows of its own: --merge joins theirs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import script
import torch
from fidelity_families import FAMILIES, Candidate, chosen, reference_of
from torch.optim import Optimizer

from a8multi.cli import console
from a8multi.cli.candidates import is_installed
from a8multi.cli.console import CommandError, positive_int
from a8multi.cli.data import Text, batch_of_step, load_text, validation_batches
from a8multi.cli.optimizers import Choice, Parameters
from a8multi.cli.train import StopOnInterrupt
from a8multi.cli.trainer import VALIDATION_SEQUENCES, Run, TrainConfig

FORMAT = "a8multi-losses-1"
# A point of a curve is the mean of so many steps: single batches say little.
CURVE_STEPS = 10
# Of TrainConfig, what can be asked for here. With the trainer's 20 steps of warm-up seeds part ways at step 40 to 60,
# with fp32 state too, and their spread is three times as wide.
SIZES = {"steps": 600, "warmup": 100, **script.MODEL_SIZES}
# What a result must have been made with to go on from it. Of `seeds` it may have fewer, or more.
FIXED = ("family", "only", "seed", *SIZES)
# Likewise if there is something left to do; their defaults are the machine's.
OF_THE_MACHINE = ("device", "threads")
# What the parts of a merged result may differ in.
OF_A_PART = ("only", "seed")


@dataclass
class Row:
    """One candidate; runs has one entry a seed that is done; note says why there are no more."""

    name: str
    reference: str | None
    runs: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None

    def by_seed(self, kind: str = "validation_loss") -> dict[int, Any]:
        return {run["seed"]: run[kind] for run in self.runs}


class Measurement:
    """Rows and seeds, done one after the other.

    config holds what the numbers depend on: FIXED, OF_THE_MACHINE and seeds. Must not print.
    """

    def __init__(self, config: dict[str, Any], text: Text, command: str) -> None:
        self.config, self.text, self.command = config, text, command
        self.sizes = TrainConfig(**{name: config[name] for name in (*SIZES, *OF_THE_MACHINE)})
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
        sizes, device = replace(self.sizes, seed=seed), torch.device(self.config["device"])
        batches = validation_batches(self.text, sizes.batch_size, sizes.context, VALIDATION_SEQUENCES)
        try:
            run = Run(row.name, _choice(self.candidates[row.name]), sizes, device, torch.float32)
            if device.type == "cuda":
                # Launched one by one, the kernels of so small a model take several times as long to start as to run.
                example = torch.zeros(sizes.batch_size, sizes.context, dtype=torch.int64, device=device)
                run.model = torch.cuda.make_graphed_callables(run.model, (example,))
            for step in range(sizes.steps):
                batch = batch_of_step(self.text, sizes.batch_size, sizes.context, seed, step)
                if not after_step(run.train_step(batch, min(1.0, (step + 1) / (sizes.warmup + 1)))):
                    return
            run.model.eval()  # changes nothing in this model, but a CUDA graph is for one size of batch only
            summary = run.summary(batches)
        except Exception as error:  # a peer may raise anything, and any may diverge: that must not spoil the other rows
            row.note = f"seed {seed}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return
        points = [run.losses[at : at + CURVE_STEPS] for at in range(0, len(run.losses), CURVE_STEPS)]
        row.runs.append(
            {
                "seed": seed,
                "lr": run.base_lr,
                "validation_loss": summary.validation_loss,
                "train_loss": summary.train_loss,
                "state_bytes_per_param": summary.state_bytes / summary.parameter_count,
                "curve": [float(f"{statistics.fmean(point):.5g}") for point in points],
            }
        )

    @cached_property
    def _head(self) -> dict[str, Any]:
        """Once: to ask for the versions of packages takes longer than many steps."""
        return {"format": FORMAT} | script.head(self.config, self.text, self.command)

    def document(self) -> dict[str, Any]:
        return self._head | compared(self.rows)

    def take_over(self, found: dict[str, Any], path: Path) -> None:
        """The runs of a document; CommandError if it was made with other options, another text or other packages."""
        must_be_alike(found, path, self.config, self.text.digest, (*FIXED, *OF_THE_MACHINE))
        rows = rows_of(found)
        if [row.name for row in rows] != [row.name for row in self.rows]:
            raise CommandError(f"{path} was made with other packages installed")
        self.config["seeds"] = max(self.config["seeds"], found["config"]["seeds"])
        self.rows = rows


def compared(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as a document has them: with means, standard errors, and differences to the reference by seed."""
    named = {row.name: row for row in rows}
    return {"rows": [asdict(row) | _comparison(row, named.get(row.reference or "")) for row in rows]}


def _comparison(row: Row, reference: Row | None) -> dict[str, Any]:
    own, other = row.by_seed(), reference.by_seed() if reference else {}
    losses = list(own.values())
    result = {"mean": statistics.fmean(losses) if losses else None, "standard_error": standard_error(losses)}
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if not differences:
        return result
    allowed, difference = standard_error(list(other.values())), statistics.fmean(differences)
    return result | {
        "difference": difference,
        "difference_standard_error": standard_error(differences),
        "within_one_standard_error": None if allowed is None else abs(difference) <= allowed,
    }


def merge(parts: Mapping[Path, dict[str, Any]], command: str) -> dict[str, Any]:
    """One document of several with other rows or other seeds; of a run or a note that two have, the first counts.

    Raises:
        CommandError: they were made with different options, texts or versions of packages, or have unknown rows.
    """
    first = next(iter(parts.values()))
    merged: dict[str, Row] = {}
    for path, part in parts.items():
        alike = [name for name in (*FIXED, *OF_THE_MACHINE) if name not in OF_A_PART]
        must_be_alike(part, path, first["config"], first["text_digest"], alike)
        if script.packages(part) != script.packages(first):
            raise CommandError(f"{path} was made with other versions of packages than the first part")
        for row in rows_of(part):
            into = merged.setdefault(row.name, Row(row.name, row.reference))
            into.runs += [run for run in row.runs if run["seed"] not in into.by_seed()]
            into.note = into.note or row.note
    for row in merged.values():
        row.runs.sort(key=lambda run: run["seed"])
    configs = [part["config"] for part in parts.values()]
    begin, end = min(one["seed"] for one in configs), max(one["seed"] + one["seeds"] for one in configs)
    only = sorted({name for one in configs for name in one["only"] or ["*"]})
    own = {
        "command": command,
        "parts": [part["command"] for part in parts.values()],
        "config": first["config"] | {"only": only, "seed": begin, "seeds": end - begin},
    }
    return first | own | compared(_in_order(merged, first["config"]["family"]))


def _in_order(rows: Mapping[str, Row], family: str) -> list[Row]:
    """As the family has them, each reference before the first row that is compared with it."""
    names = [one.name for one in FAMILIES[family]]

    def place(row: Row) -> tuple[int, bool]:
        users = {row.name, *(one.name for one in rows.values() if one.reference == row.name)}
        return min(names.index(name) for name in users if name in names), row.reference is not None

    try:
        return sorted(rows.values(), key=place)
    except ValueError as error:
        raise CommandError(f"there are rows that the family {family} does not have (any more)") from error


def rows_of(document: dict[str, Any]) -> list[Row]:
    return [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in document["rows"]]


def must_be_alike(
    found: dict[str, Any], path: Path, config: Mapping[str, Any], text_digest: str, names: Sequence[str]
) -> None:
    """CommandError if a document was made with another text, or with other options of these names."""
    for name in names:
        if found["config"].get(name) != config[name]:
            made_with = f"{name} {found['config'].get(name)!r} instead of {config[name]!r}"
            raise CommandError(f"{path} was made with other options ({made_with})")
    if found["text_digest"] != text_digest:
        raise CommandError(f"{path} was made with another text")


def read(path: Path) -> dict[str, Any]:
    """A document; CommandError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(found["format"])
        rows_of(found)
        return {**found, "config": dict(found["config"]), "text_digest": str(found["text_digest"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is no result of this script ({type(error).__name__})") from error


def is_finished(found: dict[str, Any], args: argparse.Namespace, digest: str) -> bool:
    """Whether a document has all that is asked for: then it need not have been made on this machine."""
    config = found["config"]
    as_asked = all(config.get(name) == getattr(args, name) for name in FIXED)
    # The text that is not asked for is that of the Python of the other machine.
    same_text = args.data is None or digest == found["text_digest"]
    done = all(row["note"] or len(row["runs"]) >= args.seeds for row in found["rows"])
    whole = {one.name for one in chosen(args.family, args.only)} <= {row["name"] for row in found["rows"]}
    return as_asked and same_text and done and whole


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
        numbers = [number(row, name, form) for name, form in formats.items()]
        cells.append([row["name"], str(len(row["runs"])), *numbers, within, size])
    headers = ["candidate", "seeds", "val loss", "s.e.", "to fp32", "s.e.", "within s.e. of fp32", "state B/param"]
    legend = "Losses in nats a byte. s.e.: standard error of the mean over the seeds; to fp32: paired by seed."
    return script.table(headers, cells, result["rows"], legend)


def plot(result: dict[str, Any], path: Path) -> None:
    """Training loss, mean over the seeds with their spread (one standard deviation); below, the difference to fp32."""
    import numpy as np

    curves = {row.name: row.by_seed("curve") for row in rows_of(result)}

    def line(axes: Any, of_seeds: Sequence[Any], color: Any, style: str, label: str | None) -> None:
        values = np.array(of_seeds)
        mean, spread = values.mean(0), values.std(0)
        steps = CURVE_STEPS * (np.arange(len(mean)) + 0.5)
        axes.plot(steps, mean, style, color=color, linewidth=1.2, label=label)
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)

    def draw(panels: Any, color: Any) -> None:
        losses, differences = panels
        for index, row in enumerate(result["rows"]):
            own, other = curves[row["name"]], curves.get(row["reference"] or "", {})
            style = ":" if row["reference"] is None else "-" if row["name"].startswith("a8multi") else "--"
            if own:
                line(losses, list(own.values()), color(index), style, row["name"])
            if shared := own.keys() & other.keys():
                pairs = [np.subtract(own[seed], other[seed]) for seed in shared]
                line(differences, pairs, color(index), style, None)
        losses.set(ylabel="training loss, nats a byte")
        differences.set(ylabel="difference to the same rule in fp32")
        differences.axhline(0, color="gray", linewidth=0.7)

    script.save_figure(path, 7.5, 2, draw)


def parser() -> argparse.ArgumentParser:
    made = script.parser(__doc__, SIZES)
    add = made.add_argument
    add("--seeds", type=positive_int, default=3, help="how many; default 3")
    add("--seed", type=console.non_negative_int, default=0, help="the first of them; default 0")
    add(
        "--resume",
        action="store_true",
        help="go on from the --json file if it exists, written after each run; with more --seeds too",
    )
    add("--merge", type=Path, nargs="+", metavar="FILE", help="train nothing: join these --json files, of one family")
    return made


def run(args: argparse.Namespace, command: str) -> int:
    tqdm = script.prepare(args)
    if args.merge:
        result = merge({path: read(path) for path in args.merge}, command)
        if args.json:
            script.write_json(result, args.json)
        return report(result, args.png, interrupted=False)
    if args.resume and not args.json:
        raise CommandError("--resume needs --json FILE, to go on from")
    text = load_text(args.data, args.context)
    found = read(args.json) if args.resume and args.json.exists() else None
    if found and is_finished(found, args, text.digest):
        result, interrupted = found, False
    else:
        measurement = Measurement(script.settle(args, (*FIXED, "seeds")), text, command)
        if found:
            measurement.take_over(found, args.json)
        interrupted = train_all(measurement, args.json, tqdm)
        result = measurement.document()
    return report(result, args.png, interrupted)


def report(result: dict[str, Any], png: Path | None, interrupted: bool) -> int:
    """Prints and plots it. Returns the exit status."""
    print(table(result))
    if png:
        plot(result, png)
    return script.exit_status(result, interrupted)


def train_all(measurement: Measurement, path: Path | None, tqdm: Any) -> bool:
    """Trains what is not done, and writes the document after each run. Returns whether Ctrl-C stopped it."""
    todo = measurement.todo()
    with StopOnInterrupt() as stop, tqdm.tqdm(total=len(todo) * measurement.sizes.steps, unit="step") as bar:

        def after_step(loss: float) -> bool:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            return not stop.requested

        for row, seed in todo:
            if stop.requested or row.note:
                continue
            bar.set_description(f"{row.name}, seed {seed}")
            measurement.train(row, seed, after_step)
            if path:
                script.write_json(measurement.document(), path)
    return stop.requested


def main(arguments: Sequence[str]) -> int:
    """As script.main."""
    return script.main("losses", parser(), run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

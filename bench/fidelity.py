"""Closed-loop update error: how far the update of a quantised optimizer is from that of its fp32 rule.

One fp32 `torch.optim.AdamW` trains a byte-level transformer and so makes the gradients. At every step each candidate
gets the parameters and the gradient of that run, and steps with its own quantised state: the change is its update. The
error is the norm of (update - reference's update) over the norm of the reference's update, of all tensors of 4096
elements or more together. If it grows with the steps, the state loses its moving average. The reference is the fp32
run itself (--family adamw) or the candidate's own rule with fp32 state, stepped likewise (--family adafactor).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import a8multi
from a8multi.cli import console
from a8multi.cli.candidates import PEER_PACKAGES, is_installed
from a8multi.cli.console import CommandError, positive_int
from a8multi.cli.data import Text, batch_of_step, load_text
from a8multi.cli.model import ByteTransformer, next_byte_loss
from a8multi.cli.optimizers import state_bytes
from a8multi.cli.system import versions
from a8multi.cli.train import StopOnInterrupt

CHECKPOINT_FORMAT = "a8multi-fidelity-1"
COUNTED_NUMEL = 4096  # Smaller tensors keep fp32 state everywhere: they would only dilute the error.
DRIVER = "torch AdamW fp32"

Options = Mapping[str, Any]

ADAMW: Options = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1}
ADAFACTOR: Options = {"lr": 1e-2, "beta2": 0.999, "relative_step": False}
# adafactor8bit has one class: with these options its rule is AdamW's (eps as a lower bound instead of a summand).
_OFF = dict.fromkeys(("d", "factored", "relative_step", "scale_parameter", "scale_weight_decay"), 0)
AS_ADAMW: Options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": (1e-8, 1e-3), **_OFF}


@dataclass(frozen=True)
class Candidate:
    """One row: its name says package, optimizer and what differs from the defaults; target is "module:class"."""

    name: str
    target: str
    options: Options

    @property
    def package(self) -> str:
        return self.target.partition(":")[0].partition(".")[0]

    def build(self, parameters: list[Parameter]) -> Optimizer:
        module, _, kind = self.target.partition(":")
        return getattr(importlib.import_module(module), kind)(parameters, **self.options)

    def with_fp32_state(self) -> Candidate:
        """The same rule without quantisation; several candidates share one, whatever their formats."""
        rule = {name: value for name, value in self.options.items() if name not in ("first_moment", "block_size")}
        name = ("factored" if rule.get("factored", True) else "full") + (" + beta1" if "beta1" in rule else "")
        return Candidate(f"{self.package} {name} fp32", self.target, {**rule, "quantize": False})


def _ours(name: str, base: Options = ADAFACTOR, **options: Any) -> Candidate:
    return Candidate(f"a8multi {name}", f"a8multi:{name.split()[0].strip(',')}", {**base, **options})


def _adafactor8bit(name: str, base: Options = ADAFACTOR, **options: Any) -> Candidate:
    return Candidate(f"adafactor8bit {name}", "adafactor8bit:Adafactor8Bit", {**base, **options})


FAMILIES = {
    "adamw": (
        _ours("AdamW8bit", ADAMW),
        _ours("AdamW8bit, block size 256", ADAMW, block_size=256),
        _ours("AdamW8bit, m nf4", ADAMW, first_moment="nf4"),
        _ours("AdamW8bit, m fp32", ADAMW, first_moment="fp32"),
        _ours("AdamW8bit, v fp32", ADAMW, second_moment="fp32"),
        _ours("AdamW8bit, v to nearest", ADAMW, stochastic_rounding=False),
        # What the measure itself cannot resolve: another order of the same fp32 operations.
        _ours("AdamW8bit, m and v fp32", ADAMW, first_moment="fp32", second_moment="fp32"),
        Candidate("bitsandbytes AdamW8bit", "bitsandbytes.optim:AdamW8bit", ADAMW),
        Candidate("torchao AdamW8bit", "torchao.optim:AdamW8bit", ADAMW),
        _adafactor8bit("AdamW preset", AS_ADAMW),
    ),
    "adafactor": (
        _ours("Adafactor8bit factored"),
        _ours("Adafactor8bit factored + nf4", beta1=0.9),
        _ours("Adafactor8bit factored + int8", beta1=0.9, first_moment="int8"),
        _ours("Adafactor8bit full", factored=False),
        _ours("Adafactor8bit full, block size 128", factored=False, block_size=128),
        _ours("Adafactor8bit full + nf4", factored=False, beta1=0.9),
        _ours("Adafactor8bit full + int8", factored=False, beta1=0.9, first_moment="int8"),
        _ours(
            "Adafactor8bit full + int8, block size 128", factored=False, beta1=0.9, first_moment="int8", block_size=128
        ),
        _adafactor8bit("factored"),
        _adafactor8bit("factored + beta1", beta1=0.9),
        _adafactor8bit("full", factored=False),
        _adafactor8bit("full + beta1", factored=False, beta1=0.9),
    ),
}
REPORT_AT = {"adamw": (10, 200, 300, 1000, 2000), "adafactor": (10, 100, 300, 600)}


@dataclass
class Row:
    """What was measured for one candidate: errors[k] at step k + 1; note says why there are none, or no more."""

    name: str
    reference: str
    errors: list[float] = field(default_factory=list)
    note: str | None = None


class Follower:
    """An optimizer with state of its own that is led along the parameters and gradients of another run."""

    def __init__(self, candidate: Candidate, like: Sequence[Tensor]) -> None:
        self.parameters = [Parameter(one.detach().clone()) for one in like]
        self.optimizer = candidate.build(self.parameters)

    def update(self, before: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """One step from `before`. Returns its update as `counted_difference` does."""
        for parameter, value, gradient in zip(self.parameters, before, gradients, strict=True):
            parameter.data.copy_(value)
            # A copy: an optimizer may use the gradient as scratch space, which the next one must not see.
            parameter.grad = gradient.clone()
        self.optimizer.step()
        return counted_difference(self.parameters, before)


def counted_difference(after: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """after - before of the tensors that count, float32 [elements of all of them]."""
    counted = (pair for pair in zip(after, before, strict=True) if pair[0].numel() >= COUNTED_NUMEL)
    return torch.cat([(a.detach() - b).flatten() for a, b in counted])


def relative_error(update: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference, both float32 [n]; ValueError if that is not finite."""
    norm = torch.linalg.vector_norm
    error = (norm(update - reference, dtype=torch.float64) / norm(reference, dtype=torch.float64)).item()
    if not math.isfinite(error):
        raise ValueError("the update is not finite, or the reference's is zero")
    return float(error)


class Experiment:
    """The fp32 run that makes the gradients, and everything that follows it.

    config holds what the numbers depend on: family, only, seed, threads and the sizes of model and batch.
    Raises CommandError if `only` names no candidate or no tensor of the model counts. Must not print.
    """

    def __init__(self, config: dict[str, Any], text: Text) -> None:
        self.config, self.text, self.loss, self.step_count = config, text, math.nan, 0
        try:
            self.model = ByteTransformer(*(config[name] for name in ("width", "layers", "heads", "context", "seed")))
        except ValueError as error:
            raise CommandError(str(error)) from error
        self.parameters = list(self.model.parameters())
        self.driver = torch.optim.AdamW(self.parameters, **ADAMW)
        sizes = [one.numel() for one in self.parameters]
        self.parameter_count, self.counted_count = sum(sizes), sum(size for size in sizes if size >= COUNTED_NUMEL)
        if not self.counted_count:
            raise CommandError(f"no tensor of the model has {COUNTED_NUMEL} elements; give a larger --width")
        self.rows: list[Row] = []
        self.followers: dict[str, Follower] = {}
        self.references: dict[str, Follower] = {}
        candidates, only = FAMILIES[config["family"]], config["only"] or ["*"]
        chosen = [one for one in candidates if any(fnmatchcase(one.name.lower(), name.lower()) for name in only)]
        if not chosen:
            raise CommandError(f"--only {only!r} matches none of: {'; '.join(one.name for one in candidates)}")
        for candidate in chosen:
            self._add(candidate, own_rule=config["family"] == "adafactor")

    def _add(self, candidate: Candidate, *, own_rule: bool) -> None:
        reference = candidate.with_fp32_state() if own_rule else None
        row = Row(candidate.name, reference.name if reference else DRIVER)
        self.rows.append(row)
        if not is_installed(candidate.package):
            row.note = "not installed"
            return
        try:
            self.followers[row.name] = Follower(candidate, self.parameters)
            if reference and reference.name not in self.references:
                self.references[reference.name] = Follower(reference, self.parameters)
        except Exception as error:  # a peer may raise anything; it must not spoil the other rows
            self._drop(row, error)

    def _drop(self, row: Row, error: Exception) -> None:
        row.note = f"step {self.step_count + 1}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.followers.pop(row.name, None)

    def step(self) -> None:
        """One step of the fp32 run, and of everything that follows it."""
        config = self.config
        self.driver.zero_grad(set_to_none=True)
        batch = batch_of_step(self.text, config["batch_size"], config["context"], config["seed"], self.step_count)
        loss = next_byte_loss(self.model, batch)
        loss.backward()
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise CommandError(f"the loss of the fp32 run is {self.loss} at step {self.step_count + 1}; it diverged")
        before = [one.detach().clone() for one in self.parameters]
        gradients = [one.grad for one in self.parameters if one.grad is not None]
        self.driver.step()
        updates = {DRIVER: counted_difference(self.parameters, before)}
        for row in [one for one in self.rows if one.name in self.followers]:
            try:
                if row.reference not in updates:
                    updates[row.reference] = self.references[row.reference].update(before, gradients)
                update = self.followers[row.name].update(before, gradients)
                row.errors.append(relative_error(update, updates[row.reference]))
            except Exception as error:
                self._drop(row, error)
        self.step_count += 1

    def save(self, path: Path) -> None:
        """Writes everything a resumed run needs; an old file stays until the new one is whole."""
        everything = self.followers | self.references
        content = {
            "format": CHECKPOINT_FORMAT,
            "config": self.config,
            "text_digest": self.text.digest,
            "step_count": self.step_count,
            "loss": self.loss,
            "model": self.model.state_dict(),
            "driver": self.driver.state_dict(),
            "optimizers": {name: one.optimizer.state_dict() for name, one in everything.items()},
            "rows": [asdict(row) for row in self.rows],
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; CommandError if that was made with other options, text or packages."""
        try:
            checkpoint = torch.load(path, weights_only=True)
            made_with = checkpoint["format"], checkpoint["config"], checkpoint["text_digest"]
        except Exception as error:  # torch.load raises whatever the bytes of a wrong file lead it to
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise CommandError(f"--resume {path}: not a checkpoint of this script ({reason})") from error
        if made_with != (CHECKPOINT_FORMAT, self.config, self.text.digest):
            raise CommandError(f"--resume {path}: made with other options ({made_with[1]}) or another text; remove it")
        rows, optimizers = [Row(**row) for row in checkpoint["rows"]], checkpoint["optimizers"]
        everything = self.followers | self.references
        # A row that failed in the earlier run has a note and no optimizer: it stays out.
        differing = {row.name for row in rows if not row.note} ^ set(optimizers) - set(self.references)
        differing |= set(optimizers) - set(everything)
        if differing:
            raise CommandError(f"--resume {path}: these were or are not installed: {', '.join(differing)}; remove it")
        self.model.load_state_dict(checkpoint["model"])
        self.driver.load_state_dict(checkpoint["driver"])
        for name, state in optimizers.items():
            everything[name].optimizer.load_state_dict(state)
        self.followers = {name: one for name, one in self.followers.items() if name in optimizers}
        self.rows, self.step_count, self.loss = rows, checkpoint["step_count"], checkpoint["loss"]


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
    operation = {"adamw": "elementwise", "adafactor": "adafactor"}[experiment.config["family"]]
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = FigureCanvasAgg(Figure(figsize=(10, 5.5), layout="constrained")).figure
    axes = figure.subplots()
    for index, row in enumerate(result["rows"]):
        # Equal rules have an error of 0, which a logarithmic axis cannot show.
        points = [(int(at), error) for at, error in row["curve"].items() if error > 0]
        if points:
            style = "-" if row["name"].startswith("a8multi") else "--"
            axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", linewidth=1.2, label=row["name"])
    # From 1e-3: what is below is the rounding of fp32 arithmetic.
    axes.set(yscale="log", ylim=(1e-3, None), xlabel="step", ylabel="update error, relative to fp32")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    made = console.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--family", choices=sorted(FAMILIES), default="adamw", help="default adamw")
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

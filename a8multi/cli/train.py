"""`a8multi train`: a small transformer, trained on real text."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from a8multi.cli.console import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    CommandError,
    device_argument,
    format_bytes,
    format_table,
    non_negative_int,
    positive_float,
    positive_int,
    require_train_extra,
    require_writable,
    seed,
    size,
    thread_count,
    within_memory,
    writing,
)

if TYPE_CHECKING:
    from a8multi.cli.trainer import Summary, TrainConfig, Trainer

DESCRIPTION = """\
Train a small byte-level transformer on real text, with 8-bit or fp32 optimizer state.

Ctrl-C saves a checkpoint; --resume goes on from it bit for bit (same text, device, thread count and torch).
Writes loss.png, result.json and checkpoint.pt to the output directory.
"""
DEFAULT_OUTPUT = "a8multi-train"
PLOT_NAME = "loss.png"
RESULT_NAME = "result.json"
# May differ from the checkpoint's on --resume: they say where to stop, not what the steps compute.
CHANGEABLE_ON_RESUME = {"steps"}
SMOOTHING_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Defaults live in TrainConfig; None means "not given", which --resume needs to know."""
    choices = ("adamw8bit", "adafactor8bit", "adamw", "adafactor")
    add = parser.add_argument
    add("--optimizer", choices=choices, help="default adamw8bit; the last two are torch's, with fp32 state")
    add("--compare", action="store_const", const=True, help="also train the fp32 twin (or the 8-bit one), same batches")
    add("--steps", type=positive_int, help="default 300; with --resume, where to stop")
    add("--device", help="cpu, cuda, cuda:1, mps, ...; default cuda if there is one, else cpu")
    add("--dtype", choices=("fp32", "bf16"), help="of the parameters; default fp32")
    add("--data", metavar="PATH", help="text file or directory; default this Python's standard library")
    add("--batch-size", type=size, help="sequences a step; default 16")
    add("--context", type=size, help="bytes a sequence; default 128")
    add("--lr", type=positive_float, help="learning rate; default 1e-3 (adamw), 3e-2 (adafactor)")
    add("--warmup", type=non_negative_int, help="steps of linear warm-up; default 20")
    add("--seed", type=seed, help="of weights, batches and rounding noise; default 0")
    add("--width", type=size, help="of the model; default 160")
    add("--layers", type=size, help="of the model; default 4")
    add("--heads", type=size, help="of the model; default 4")
    add("--threads", type=thread_count, help="CPU threads; default torch's choice")
    add("--output", metavar="DIR", type=Path, help=f"default ./{DEFAULT_OUTPUT}, or where the checkpoint is")
    add("--checkpoint-every", type=positive_int, default=100, metavar="N", help="in steps; default 100")
    add("--resume", metavar="PATH", type=Path, help="checkpoint.pt or its directory; other options come from it")


class StopOnInterrupt:
    """Turns the first Ctrl-C into a flag, so that a step is never cut in half; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        # Python delivers signals to the main thread only and refuses handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on training, and reports. Returns the exit status."""
    # Asked for before any work: a missing plot library must not show after the last step.
    require_train_extra("tqdm", "matplotlib")
    from a8multi.cli.trainer import read_checkpoint

    checkpoint = None
    if args.resume:
        checkpoint, saved = read_checkpoint(args.resume)
        config = _resumed_config(args, saved, checkpoint["step"])
    else:
        config = _config(args)
    output: Path = args.output or _default_output(args.resume)
    make_reproducible(config)
    with within_memory("make --width, --layers, --context or --batch-size smaller"):
        return _run(args, config, checkpoint, output)


def _run(args: argparse.Namespace, config: TrainConfig, checkpoint: dict[str, Any] | None, output: Path) -> int:
    from a8multi.cli.data import load_text
    from a8multi.cli.trainer import CHECKPOINT_NAME, Trainer

    text = load_text(config.data, config.context)
    try:
        trainer = Trainer(config, text)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if checkpoint:
        trainer.load(checkpoint, args.resume)
    path = output / CHECKPOINT_NAME
    _require_output(output, path)
    if not checkpoint and path.exists():
        older = path.with_name("checkpoint.previous.pt")
        with writing("--output", older):
            os.replace(path, older)
        print(f"Kept the checkpoint of an earlier run as {older}")
    _print_start(trainer)
    if not _train(trainer, path, args.checkpoint_every):
        print(
            f"Stopped after step {trainer.step} of {config.steps}; saved {path}\n"
            f"Go on with: a8multi train --resume {shlex.quote(str(path))}"
        )
        return EXIT_INTERRUPTED
    _report(trainer, output)
    return EXIT_OK


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of TrainConfig that the user wrote."""
    from a8multi.cli.trainer import TrainConfig

    names = TrainConfig.__dataclass_fields__
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _config(args: argparse.Namespace) -> TrainConfig:
    import torch

    from a8multi.cli.trainer import TrainConfig

    given = _given(args)
    given["device"] = str(device_argument(args.device))
    given["threads"] = args.threads or torch.get_num_threads()
    if args.data:
        given["data"] = os.path.abspath(args.data)
    return TrainConfig(**given)


def _resumed_config(args: argparse.Namespace, saved: TrainConfig, step: int) -> TrainConfig:
    """The checkpoint's options, with --steps as given.

    Raises:
        CommandError: an option that would change what the steps compute, or no step left to do.
    """
    given = _given(args)
    if "data" in given:
        given["data"] = os.path.abspath(given["data"])
    for name, value in given.items():
        kept = getattr(saved, name)
        if name not in CHANGEABLE_ON_RESUME and value != kept:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"{option} {value} differs from the checkpoint's {kept}; leave it out to resume")
    config = replace(saved, steps=given.get("steps", saved.steps))
    if config.steps <= step:
        raise CommandError(f"the checkpoint has done {step} steps already; say how far to go with --steps N")
    device_argument(config.device)
    return config


def _default_output(resume: Path | None) -> Path:
    if resume is None:
        return Path(DEFAULT_OUTPUT)
    return resume if resume.is_dir() else resume.parent


def _require_output(output: Path, checkpoint: Path) -> None:
    """Makes the directory. CommandError if one of the files could not be written there."""
    from a8multi.cli.trainer import partial_path

    with writing("--output", output):
        output.mkdir(parents=True, exist_ok=True)
    for path in (partial_path(checkpoint), output / PLOT_NAME, output / RESULT_NAME):
        require_writable("--output", path)


def make_reproducible(config: TrainConfig) -> None:
    """Sets what the bits of a step depend on besides the config: the thread count and, on a GPU, the algorithms."""
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device and config.device.startswith("cuda"):
        # cuBLAS reads this when its first handle is made; without it two runs may differ (torch's notes on randomness).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # The memory-efficient attention has no deterministic backward.
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def _print_start(trainer: Trainer) -> None:
    config, text = trainer.config, trainer.text
    count = sum(parameter.numel() for parameter in trainer.runs[0].model.parameters())
    print(
        f"Model: {count / 1e6:.2f} M parameters ({config.layers} layers of width {config.width}), {config.dtype}, "
        f"on {config.device}\n"
        f"Text: {text.source}: {len(text.train) / 1e6:.1f} MB to train on, "
        f"{len(text.validation) / 1e6:.1f} MB to validate with\n"
        "Optimizers: " + ", ".join(f"{run.name} (backend {run.backend})" for run in trainer.runs),
        flush=True,
    )


def _train(trainer: Trainer, path: Path, checkpoint_every: int) -> bool:
    """Runs to config.steps, saving now and then and at the end. Returns False if Ctrl-C stopped it before."""
    from tqdm import tqdm

    steps = trainer.config.steps
    with (
        StopOnInterrupt() as stop,
        tqdm(total=steps, initial=trainer.step, unit="step", desc="training", mininterval=0.5, file=sys.stderr) as bar,
    ):
        while trainer.step < steps and not stop.requested:
            losses = trainer.train_step()
            shown = {run.name: f"{loss:.3f}" for run, loss in zip(trainer.runs, losses, strict=True)}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if trainer.step % checkpoint_every == 0 and trainer.step < steps:
                trainer.save(path)
        trainer.save(path)
    return trainer.step >= steps


def _report(trainer: Trainer, output: Path) -> None:
    summaries = trainer.summaries()
    headers = ("optimizer", "train loss", "val loss", "state", "bytes/param", "optimizer s", "ms/step", "backend")
    rows = [
        (
            one.optimizer,
            f"{one.train_loss:.4f}",
            f"{one.validation_loss:.4f}",
            format_bytes(one.state_bytes),
            f"{one.state_bytes / one.parameter_count:.3f}",
            f"{one.optimizer_seconds:.2f}",
            f"{one.optimizer_ms_per_step:.2f}",
            one.backend,
        )
        for one in summaries
    ]
    lines = [format_table(headers, rows)]
    if len(summaries) == 2:
        first, twin = summaries
        train_difference = first.train_loss - twin.train_loss
        validation_difference = first.validation_loss - twin.validation_loss
        lines.append(
            f"Loss difference at step {trainer.step}, {first.optimizer} - {twin.optimizer}: "
            f"{train_difference:+.4f} train, {validation_difference:+.4f} validation"
        )
    lines.append(_footnote(trainer, summaries))
    plot, result = output / PLOT_NAME, output / RESULT_NAME
    # Files first: nobody may be reading what is printed. But a disk that is full takes nothing from those who do.
    try:
        _write(trainer, summaries, plot, result)
    finally:
        print("\n".join(lines))
    print(f"Wrote {plot}, {result} and the checkpoint beside them")


def _write(trainer: Trainer, summaries: list[Summary], plot: Path, result: Path) -> None:
    document = {
        "config": asdict(trainer.config),
        "steps_done": trainer.step,
        "text": trainer.text.source,
        "runs": [asdict(one) | {"losses": run.losses} for one, run in zip(summaries, trainer.runs, strict=True)],
    }
    with writing("--output", result):
        result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with writing("--output", plot):
        _plot(trainer, plot)


def _footnote(trainer: Trainer, summaries: list[Summary]) -> str:
    from a8multi.cli.trainer import FINAL_STEPS

    shares = ", ".join(f"{one.optimizer} {one.optimizer_ms_per_step / one.step_ms:.0%}" for one in summaries)
    return (
        f"Losses in nats a byte; train loss is the mean of the last {min(FINAL_STEPS, trainer.step)} steps. "
        f"ms/step: median of optimizer.step() alone ({shares} of a whole step)."
    )


def _plot(trainer: Trainer, path: Path) -> None:
    """The loss of every run by step: each batch faint, the running mean on top; with a twin, their difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = trainer.runs
    figure = Figure(figsize=(8, 7 if len(runs) == 2 else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for index, run in enumerate(runs):
        steps, style = range(1, len(run.losses) + 1), "-" if index == 0 else "--"
        panels[0].plot(steps, run.losses, color=f"C{index}", alpha=0.25, linewidth=0.7)
        panels[0].plot(steps, _running_mean(run.losses), style, color=f"C{index}", label=run.name)
    panels[0].set_ylabel("training loss (nats a byte)")
    panels[0].legend()
    if len(runs) == 2:
        differences = [a - b for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
        panels[1].axhline(0, color="gray", linewidth=0.7)
        panels[1].plot(range(1, len(differences) + 1), differences, color="C2", linewidth=0.7)
        panels[1].set_ylabel(f"{runs[0].name} - {runs[1].name}")
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)


def _running_mean(losses: list[float]) -> list[float]:
    """The mean of the last few values up to each; of fewer in a short run, where a long window would only lag."""
    length = max(1, min(SMOOTHING_STEPS, len(losses) // 10))
    means = []
    for end in range(1, len(losses) + 1):
        window = losses[max(0, end - length) : end]
        means.append(sum(window) / len(window))
    return means

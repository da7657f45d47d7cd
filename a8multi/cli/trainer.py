"""The training loop of `a8multi train`: one or two models on the same batches, saved and resumed bit for bit.

Nothing here draws from a global generator: weights come from the seed, the batch of step k from (seed, k), and the
rounding noise of the 8-bit state from (seed, parameter, step, element). So a checkpoint needs no generator state.
Must not print, plot or parse arguments.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from a8multi.cli import data
from a8multi.cli.console import CommandError, first_line, synchronize
from a8multi.cli.model import ByteTransformer, next_byte_loss
from a8multi.cli.optimizers import OPTIMIZERS, Choice, backend_name, state_bytes
from a8multi.errors import A8MultiError

CHECKPOINT_FORMAT = "a8multi-train-1"
CHECKPOINT_NAME = "checkpoint.pt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The reported training loss is a mean over this many steps: one batch says little.
FINAL_STEPS = 20
VALIDATION_SEQUENCES = 128


class DivergenceError(A8MultiError):
    """The loss is not finite. Raised by Trainer.train_step before the weights of that step are written."""


@dataclass(frozen=True)
class TrainConfig:
    """What defines a run. Two runs with equal fields (and text, device and thread count) have equal bits."""

    optimizer: str = "adamw8bit"
    compare: bool = False
    steps: int = 300
    batch_size: int = 16
    context: int = 128
    lr: float | None = None
    warmup: int = 20
    seed: int = 0
    dtype: str = "fp32"
    width: int = 160
    layers: int = 4
    heads: int = 4
    data: str | None = None
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Summary:
    """The end of one run, as the table and result.json show it. Losses in nats a byte."""

    optimizer: str
    backend: str
    train_loss: float
    validation_loss: float
    parameter_count: int
    state_bytes: int
    optimizer_seconds: float
    optimizer_ms_per_step: float
    step_ms: float


class Run:
    """One model, its optimizer, and what they did so far."""

    def __init__(
        self, name: str, choice: Choice, config: TrainConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name = name
        self.device = device
        self.base_lr = choice.lr if config.lr is None else config.lr
        self.model: nn.Module = ByteTransformer(config.width, config.layers, config.heads, config.context, config.seed)
        # Through the dtype asked for, so that the fp32 twin of a bf16 run starts from the same values.
        self.model.to(DTYPES[config.dtype]).to(device=device, dtype=dtype)
        self.optimizer = choice.build(self.model.parameters(), self.base_lr, config.seed, dtype)
        self.backend = backend_name(choice, device)
        self.losses: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.step_seconds: list[float] = []

    def train_step(self, sequences: torch.Tensor, lr_factor: float) -> float:
        """Forward, backward and update on int64 [batch, context + 1]. Returns the loss before the update."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.base_lr * lr_factor)  # torchao refuses another object in its place
            else:
                group["lr"] = self.base_lr * lr_factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = next_byte_loss(self.model, sequences.to(self.device))
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise DivergenceError(
                f"{self.name}: the loss is {value} at step {len(self.losses) + 1}; the run diverged. "
                f"Try a smaller --lr than {self.base_lr:g}"
            )
        synchronize(self.device)
        update_began = time.perf_counter()
        self.optimizer.step()
        synchronize(self.device)
        ended = time.perf_counter()
        self.losses.append(value)
        self.optimizer_seconds.append(ended - update_began)
        self.step_seconds.append(ended - began)
        return value

    @torch.no_grad()
    def validation_loss(self, batches: list[torch.Tensor]) -> float:
        total = sum(next_byte_loss(self.model, batch.to(self.device)).item() * len(batch) for batch in batches)
        return total / sum(map(len, batches))

    def summary(self, batches: list[torch.Tensor]) -> Summary:
        return Summary(
            optimizer=self.name,
            backend=self.backend,
            train_loss=statistics.fmean(self.losses[-FINAL_STEPS:]),
            validation_loss=self.validation_loss(batches),
            parameter_count=sum(parameter.numel() for parameter in self.model.parameters()),
            state_bytes=state_bytes(self.optimizer),
            optimizer_seconds=sum(self.optimizer_seconds),
            optimizer_ms_per_step=1e3 * statistics.median(self.optimizer_seconds),
            step_ms=1e3 * statistics.median(self.step_seconds),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": list(self.losses),
            "optimizer_seconds": list(self.optimizer_seconds),
            "step_seconds": list(self.step_seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.optimizer_seconds = list(state["optimizer_seconds"])
        self.step_seconds = list(state["step_seconds"])


class Trainer:
    """The runs of one `a8multi train`, in step with each other.

    Args:
        config: with device and threads filled in.
        text: what to train on.
    Attributes:
        step: steps done.
        runs: the optimizer asked for, then its twin under `compare`.
    """

    def __init__(self, config: TrainConfig, text: data.Text) -> None:
        self.config = config
        self.text = text
        self.step = 0
        device = torch.device(config.device or "cpu")
        choice = OPTIMIZERS[config.optimizer]
        self.runs = [Run(config.optimizer, choice, config, device, DTYPES[config.dtype])]
        if config.compare:
            twin = OPTIMIZERS[choice.twin]
            # "fp32 twin": torch keeps state in the parameters' dtype, so its parameters are fp32 too.
            twin_dtype = DTYPES[config.dtype] if twin.op else torch.float32
            self.runs.append(Run(choice.twin, twin, config, device, twin_dtype))

    def train_step(self) -> list[float]:
        """One step of every run. Returns their losses."""
        config = self.config
        sequences = data.batch_of_step(self.text, config.batch_size, config.context, config.seed, self.step)
        lr_factor = min(1.0, (self.step + 1) / (config.warmup + 1))
        losses = [run.train_step(sequences, lr_factor) for run in self.runs]
        self.step += 1
        return losses

    def summaries(self) -> list[Summary]:
        batches = data.validation_batches(self.text, self.config.batch_size, self.config.context, VALIDATION_SEQUENCES)
        return [run.summary(batches) for run in self.runs]

    def save(self, path: Path) -> None:
        """Writes a checkpoint that torch.load(weights_only=True) reads; an old one stays until the new one is whole.

        Raises:
            CommandError: it cannot be written there.
        """
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "step": self.step,
            "text_digest": self.text.digest,
            "runs": [run.state_dict() for run in self.runs],
        }
        partial = partial_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            raise CommandError(f"cannot write the checkpoint {path}: {error}") from error

    def load(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Goes on from a checkpoint of read_checkpoint(path), made with this trainer's config.

        Raises:
            CommandError: the text is not the one of the checkpoint, or what it holds does not fit its own config.
        """
        if checkpoint["text_digest"] != self.text.digest:
            raise CommandError(
                f"the text ({self.text.source}) is not the one this checkpoint was trained on, so the run cannot go on "
                "bit-exactly; give the same text, or start again without --resume"
            )
        try:
            for run, state in zip(self.runs, checkpoint["runs"], strict=True):
                run.load_state_dict(state)
        except Exception as error:  # whatever a file that was edited leads to
            # The first line of torch's error is a title.
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise CommandError(
                f"--resume: {checkpoint_path(path)} does not fit its own options ({type(error).__name__}: {reason})"
            ) from error
        self.step = checkpoint["step"]


def checkpoint_path(path: Path) -> Path:
    """The file that --resume names: itself, or in its directory."""
    return path / CHECKPOINT_NAME if path.is_dir() else path


def partial_path(checkpoint: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return checkpoint.with_name(checkpoint.name + ".partial")


def read_checkpoint(path: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Reads what Trainer.save wrote.

    Args:
        path: the file, or the directory that holds `checkpoint.pt`.
    Returns:
        The checkpoint, tensors on the CPU, and its config.
    Raises:
        CommandError: no such file, or not a checkpoint of this command.
    """
    path = checkpoint_path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"--resume: no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises whatever the bytes of a wrong file lead it to
        raise CommandError(f"--resume: {path} is not a readable checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CommandError(f"--resume: {path} is no checkpoint of `a8multi train` ({CHECKPOINT_FORMAT}; found {found})")
    for name, kind in (("config", dict), ("step", int), ("text_digest", str), ("runs", list)):
        if not isinstance(checkpoint.get(name), kind):
            raise CommandError(f"--resume: {path} is damaged: its {name} is missing or no {kind.__name__}")
    kinds = get_type_hints(TrainConfig)
    options = {name: value for name, value in checkpoint["config"].items() if name in kinds}
    known: dict[str, Container[str]] = {"optimizer": OPTIMIZERS, "dtype": DTYPES}
    for name, value in options.items():
        if not isinstance(value, kinds[name]) or (name in known and value not in known[name]):
            raise CommandError(f"--resume: {path} has an option that this version does not know: {name} {value!r}")
    return checkpoint, TrainConfig(**options)

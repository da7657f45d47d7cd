"""The measurement of bench/fidelity.py: one fp32 run, and optimizers that are led along its parameters and gradients.

Receives what the numbers depend on and a text; holds the rows that are measured. Must not print or plot.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from fidelity_families import DRIVER, Candidate, chosen, reference_of
from torch import Tensor
from torch.nn import Parameter

from a8multi.cli.candidates import is_installed
from a8multi.cli.console import CommandError
from a8multi.cli.data import Text, batch_of_step
from a8multi.cli.model import ByteTransformer, next_byte_loss

CHECKPOINT_FORMAT = "a8multi-fidelity-2"
COUNTED_NUMEL = 4096  # Smaller tensors keep fp32 state everywhere: they would only dilute the error.


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
        self.gradients = [torch.empty_like(one) for one in like]
        self.optimizer = candidate.build(self.parameters)

    def update(self, before: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """One step from `before`. Returns its update as `counted_difference` does."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(before))
            # A copy: an optimizer may use the gradient as scratch space, which the next one must not see.
            torch._foreach_copy_(self.gradients, list(gradients))
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        return counted_difference(self.parameters, before)


def counted_difference(after: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """after - before of the tensors that count, float32 [elements of all of them]."""
    counted = [index for index, one in enumerate(after) if one.numel() >= COUNTED_NUMEL]
    differences = torch._foreach_sub([after[index].detach() for index in counted], [before[index] for index in counted])
    return torch.cat([one.flatten() for one in differences])


def relative_error(update: Tensor, reference: Tensor) -> Tensor:
    """Norm of the difference over the norm of the reference, both float32 [n]. Returns float64 []."""
    norm = torch.linalg.vector_norm
    return norm(update - reference, dtype=torch.float64) / norm(reference, dtype=torch.float64)


class Experiment:
    """The fp32 run that makes the gradients, and everything that follows it.

    config holds what the numbers depend on: family, only, seed, device, threads and the sizes of model and batch.
    Raises CommandError if `only` names no candidate or no tensor of the model counts. Must not print.
    """

    def __init__(self, config: dict[str, Any], text: Text) -> None:
        self.config, self.text, self.loss, self.step_count = config, text, math.nan, 0
        try:
            self.model = ByteTransformer(*(config[name] for name in ("width", "layers", "heads", "context", "seed")))
        except ValueError as error:
            raise CommandError(str(error)) from error
        self.model.to(config["device"])
        self.parameters = list(self.model.parameters())
        self.driver = DRIVER.build(self.parameters)
        sizes = [one.numel() for one in self.parameters]
        self.parameter_count, self.counted_count = sum(sizes), sum(size for size in sizes if size >= COUNTED_NUMEL)
        if not self.counted_count:
            raise CommandError(f"no tensor of the model has {COUNTED_NUMEL} elements; give a larger --width")
        self.rows: list[Row] = []
        self.followers: dict[str, Follower] = {}
        self.references: dict[str, Follower] = {}
        for candidate in chosen(config["family"], config["only"]):
            self._add(candidate)

    def _add(self, candidate: Candidate) -> None:
        row = Row(candidate.name, DRIVER.name)
        self.rows.append(row)
        if not is_installed(candidate.package):
            row.note = "not installed"
            return
        try:
            reference = reference_of(self.config["family"], candidate)
            row.reference = reference.name
            if reference is not DRIVER and reference.name not in self.references:
                self.references[reference.name] = Follower(reference, self.parameters)
            self.followers[row.name] = Follower(candidate, self.parameters)
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
        loss = next_byte_loss(self.model, batch.to(config["device"]))
        loss.backward()
        before = [one.detach().clone() for one in self.parameters]
        gradients = [one.grad for one in self.parameters if one.grad is not None]
        self.driver.step()
        updates = {DRIVER.name: counted_difference(self.parameters, before)}
        measured: list[tuple[Row, Tensor]] = []
        for row in [one for one in self.rows if one.name in self.followers]:
            try:
                if row.reference not in updates:
                    updates[row.reference] = self.references[row.reference].update(before, gradients)
                update = self.followers[row.name].update(before, gradients)
                measured.append((row, relative_error(update, updates[row.reference])))
            except Exception as error:
                self._drop(row, error)
        # Read together: a GPU waits for the CPU once a step, not once a row.
        self.loss, *errors = torch.stack([loss.detach().double(), *(error for _, error in measured)]).tolist()
        if not math.isfinite(self.loss):
            raise CommandError(f"the loss of the fp32 run is {self.loss} at step {self.step_count + 1}; it diverged")
        for (row, _), error in zip(measured, errors, strict=True):
            if math.isfinite(error):
                row.errors.append(error)
            else:
                self._drop(row, ValueError("the update is not finite, or the reference's is zero"))
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

"""What the commands share: their error, their exit statuses, plain-text tables, the check for optional packages.

Imports the standard library and a8multi.errors only, so that `--help` and a usage error cost no import of torch.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from a8multi.errors import A8MultiError

if TYPE_CHECKING:
    import torch

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
# What a shell reports for a command that SIGINT ended (128 + 2).
EXIT_INTERRUPTED = 130


class CommandError(A8MultiError):
    """The command cannot do what was asked: printed as one line, exit status 2. The text says what to change."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage text would push the reason off a small screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def positive_int(text: str) -> int:
    value = _whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def non_negative_int(text: str) -> int:
    value = _whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def require_train_extra(*modules: str) -> list[ModuleType]:
    """Imports the packages of the `train` extra.

    Raises:
        CommandError: naming the missing package and the command that installs it.
    """
    found = []
    for module in modules:
        try:
            found.append(importlib.import_module(module))
        except ImportError as error:
            raise CommandError(
                f"this command needs {module.split('.')[0]}, which could not be imported ({error}); "
                'install it with: pip install "a8multi[train]"'
            ) from error
    return found


def device_argument(text: str | None) -> torch.device:
    """The torch.device of `--device`; None picks CUDA when torch sees a GPU, else the CPU.

    Raises:
        CommandError: an unknown device, or one that torch cannot use on this machine.
    """
    import torch

    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(f"torch {torch.__version__} cannot use --device {text}: {reason}") from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits for everything queued on the device; nothing to do on the CPU."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to the widest cell, the first left-aligned, the others right-aligned."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]

    def text(line: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * width for width in widths), *map(text, lines[1:])])


def format_bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.2f} MiB"

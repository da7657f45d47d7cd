"""What the commands share: their error, their exit statuses, plain-text tables; checks before any work is done.

Imports the standard library and a8multi.errors only, so that `--help` and a usage error cost no import of torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
# More is a slip of the hand, and would fail in the middle of the work in words that name no option.
MOST_SIZE = 2**20
MOST_THREADS = 4096
# What torch's generators take.
MOST_SEED = 2**64 - 1
# Of the messages of torch's devices; the CPU's error has no class of its own.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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


def size(text: str) -> int:
    """A dimension of the model or of its batches."""
    return _at_most(MOST_SIZE, positive_int(text))


def thread_count(text: str) -> int:
    return _at_most(MOST_THREADS, positive_int(text))


def seed(text: str) -> int:
    return _at_most(MOST_SEED, non_negative_int(text))


def _at_most(most: int, value: int) -> int:
    if value > most:
        raise argparse.ArgumentTypeError(f"{value} is more than {most}")
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


def first_line(error: BaseException) -> str:
    """Of what the error says; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def require_torch() -> None:
    """Imports what every command needs.

    Raises:
        CommandError: naming what is missing or broken, and the command that works without it.
    """
    for module in ("numpy", "torch"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation raises whatever it meets first
            raise CommandError(
                f"this command needs {module}, which could not be imported ({first_line(error)}); "
                "`python -m a8multi.loader` works without it and shows what this machine has"
            ) from error


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
        # Read back: "meta" makes tensors too, but they hold nothing.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f"torch {torch.__version__} cannot use --device {text}: {first_line(error)}") from error
    return device


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns the OSError of a write in the block into a CommandError that names the option and the path."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{option} {path}: cannot be written ({error.strerror or error})") from error


def require_writable(option: str, path: Path) -> None:
    """Opens a file that results are to go to, and leaves everything as it was.

    Raises:
        CommandError: it cannot be written. Better now than after the work.
    """
    existed = os.path.lexists(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        return  # a pipe would take this for the end of what it gets
    with writing(option, path), path.open("ab"):
        pass
    if not existed:
        path.unlink()


@contextmanager
def within_memory(advice: str) -> Iterator[None]:
    """Turns the error of an allocation in the block into a CommandError, which ends with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise CommandError(f"there is not enough memory ({first_line(error)}); {advice}") from error


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

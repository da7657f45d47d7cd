"""How every command of the package prints, whatever standard output is. Without torch, for the loader's own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

EXIT_FAILED = 1
# What a shell reports for a command that SIGPIPE ended (128 + 13).
EXIT_BROKEN_PIPE = 141


def printing(name: str, command: Callable[[], int]) -> int:
    """Runs a command; what it cannot print or write ends it without a traceback.

    Args:
        name: of the program, for the line that says why.
        command: returns its exit status, or raises SystemExit.
    Returns:
        That status. ``EXIT_BROKEN_PIPE``, and nothing is said, when the reader has seen enough, as ``| head`` has.
        ``EXIT_FAILED`` for any other OSError.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A path may have letters that the encoding lacks: the report is worth more than they are.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return command()
        finally:
            # While it can be caught: the interpreter's own flush at its end would print a traceback.
            _flush()
    except OSError as error:
        _give_up_output()
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _flush() -> None:
    if sys.stdout is not None:  # closed when the program started
        sys.stdout.flush()


def _give_up_output() -> None:
    """Keeps the interpreter from writing, at its end, what could not be written."""
    try:
        _flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

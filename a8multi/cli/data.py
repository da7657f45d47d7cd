"""The text of `a8multi train`: which bytes, how they are split, and which of them make the batch of a step.

The batch of step k depends on (text, seed, k) only: a resumed run needs no generator state to go on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from a8multi.cli.console import CommandError

# Every 20th file is for validation; of fewer files than that, the last 20th of the text.
VALIDATION_SHARE = 20
# A directory given by mistake (a home, a data set) must not fill the memory.
MAX_TEXT_BYTES = 256 * 1024**2
# Installed packages differ between machines; the library's own tests hold deliberately odd bytes.
STANDARD_LIBRARY_LEAVES_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training and validation bytes.

    Attributes:
        train, validation: uint8 [n].
        digest: SHA-256 of both, to refuse resuming on another text.
        source: where it came from, for the user.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str
    source: str


def load_text(path: str | None, context: int) -> Text:
    """Reads the text to train on.

    Args:
        path: a file, or a directory read recursively in sorted order; None for this Python's standard library.
        context: sequence length; either part of the split must hold one sequence and its target.
    Raises:
        CommandError: nothing there, unreadable, or too short.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = _files_below(root, ".py", STANDARD_LIBRARY_LEAVES_OUT)
        source = f"Python standard library, {root}"
        if not files:
            raise CommandError(f"no .py files of the standard library in {root}; give a text with --data PATH")
    else:
        root = Path(path)
        if not root.exists():
            raise CommandError(f"--data {path}: no such file or directory")
        if not (root.is_file() or root.is_dir()):
            raise CommandError(f"--data {path}: neither a file nor a directory")
        files = [root] if root.is_file() else _files_below(root, "", set())
        source = str(root)
        if not files:
            raise CommandError(f"--data {path}: no files in this directory")
    contents = _read(files)
    if len(contents) >= VALIDATION_SHARE:
        train = b"".join(text for index, text in enumerate(contents) if index % VALIDATION_SHARE)
        validation = b"".join(contents[::VALIDATION_SHARE])
    else:
        everything = b"".join(contents)
        cut = len(everything) - len(everything) // VALIDATION_SHARE
        train, validation = everything[:cut], everything[cut:]
    if min(len(train), len(validation)) < context + 1:
        raise CommandError(
            f"{source}: {len(train)} bytes to train on and {len(validation)} to validate with, but a sequence takes "
            f"{context + 1}; give more text with --data or a shorter --context"
        )
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + validation).hexdigest()
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest, source)


def _files_below(root: Path, suffix: str, leave_out: set[str]) -> list[Path]:
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in leave_out and not name.startswith(".")]
        found += [Path(directory, name) for name in files if name.endswith(suffix) and not name.startswith(".")]
    # By parts, so that the order does not depend on the path separator.
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _read(files: Sequence[Path]) -> list[bytes]:
    """The contents of the files; those with a zero byte are no text and are left out, unless there is only one file."""
    contents: list[bytes] = []
    total_bytes = 0
    for path in files:
        try:
            size_bytes = path.stat().st_size
            if total_bytes + size_bytes > MAX_TEXT_BYTES:
                raise CommandError(
                    f"more than {MAX_TEXT_BYTES // 1024**2} MiB of text up to {path}; give a smaller --data PATH"
                )
            content = path.read_bytes()
        except OSError as error:
            raise CommandError(f"cannot read {path}: {error.strerror or error}") from error
        if len(files) == 1 or b"\0" not in content:
            contents.append(content)
            total_bytes += len(content)
    return contents


def batch_of_step(text: Text, batch_size: int, context: int, seed: int, step: int) -> Tensor:
    """The sequences of one step, at uniform positions of the training text.

    Returns:
        int64 [batch_size, context + 1], on the CPU.
    """
    starts = np.random.default_rng([seed, step]).integers(0, len(text.train) - context, size=batch_size)
    return _sequences(text.train, starts, context)


def validation_batches(text: Text, batch_size: int, context: int, sequence_count: int) -> list[Tensor]:
    """Sequences at even distances over the validation text, the same for every run on this text.

    Returns:
        int64 [up to batch_size, context + 1] tensors, `sequence_count` rows in all (fewer if the text is short).
    """
    last_start = len(text.validation) - context - 1
    starts = np.unique(np.linspace(0, last_start, sequence_count).astype(np.int64))
    return [
        _sequences(text.validation, starts[at : at + batch_size], context) for at in range(0, len(starts), batch_size)
    ]


def _sequences(source: np.ndarray, starts: np.ndarray, context: int) -> Tensor:
    return torch.from_numpy(source[starts[:, None] + np.arange(context + 1)].astype(np.int64))

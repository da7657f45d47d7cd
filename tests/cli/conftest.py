"""Fixtures of the command-line tests: a text, a small model, a captured main()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from a8multi.cli import main

# Width 64: the embedding and the MLP have more than min_quantized_numel elements, so their state is 8-bit.
# One thread: on a busy machine two that wait for each other take ten times as long.
TINY_MODEL = "--device cpu --threads 1 --width 64 --layers 1 --heads 2 --context 16 --batch-size 4"


class Result(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """`--threads` sets torch's thread count for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `a8multi ARGUMENTS...` in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse
            status = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """20 kB that a small model can learn a little of."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"line %d: the quick brown fox jumps over it\n" % number for number in range(500)))
    return path


@pytest.fixture
def tiny_arguments(text_file: Path) -> list[str]:
    """`train` with the tiny model on the text file."""
    return ["train", "--data", str(text_file), *TINY_MODEL.split()]


@pytest.fixture
def train(command: Command, tiny_arguments: list[str]) -> Command:
    """Runs `a8multi train` on the tiny model and the text file."""

    def run(*arguments: object) -> Result:
        return command(*tiny_arguments, *arguments)

    return run

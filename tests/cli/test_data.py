"""The text of `a8multi train`: which bytes, which split, which batch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from a8multi.cli.console import CommandError
from a8multi.cli.data import Text, batch_of_step, load_text, validation_batches


def _text(size: int) -> Text:
    # The value of a byte is its position, modulo 251: any wrong offset shows.
    values = (np.arange(size) % 251).astype(np.uint8)
    return Text(values, values, "", "test")


def test_default_text_is_the_standard_library() -> None:
    text = load_text(None, 128)
    assert len(text.train) > 5_000_000
    assert 0.01 < len(text.validation) / len(text.train) < 0.2
    assert b"site-packages/" not in text.source.encode()
    both = text.train.tobytes() + text.validation.tobytes()
    assert both.count(Path(np.__file__).read_bytes()) == 0
    # argparse, say, is in exactly one of the two parts.
    import argparse

    source = Path(argparse.__file__).read_bytes()
    assert (source in text.train.tobytes()) != (source in text.validation.tobytes())


def test_many_files_are_split_by_file_in_sorted_order(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([65 + number]) * 50)
    (tmp_path / "binary").write_bytes(b"\0" * 50)
    (tmp_path / ".hidden").write_bytes(b"!" * 50)
    text = load_text(str(tmp_path), 16)
    assert sorted(set(text.validation.tolist())) == [65, 85]
    assert text.train.tolist() == [65 + number for number in range(40) if number % 20 for _ in range(50)]
    assert load_text(str(tmp_path), 16).digest == text.digest
    (tmp_path / "00.txt").write_bytes(b"B" * 50)
    assert load_text(str(tmp_path), 16).digest != text.digest


def test_one_file_is_cut_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)) * 5)
    text = load_text(str(path), 16)
    assert (len(text.train), len(text.validation)) == (950, 50)
    assert text.train.tobytes() + text.validation.tobytes() == path.read_bytes()


@pytest.mark.parametrize(("size", "context", "fits"), [(340, 16, True), (339, 16, False), (0, 16, False)])
def test_text_must_hold_a_sequence(tmp_path: Path, size: int, context: int, fits: bool) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * size)
    if fits:
        assert len(load_text(str(path), context).validation) == context + 1
    else:
        with pytest.raises(CommandError, match="a sequence takes 17"):
            load_text(str(path), context)


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no files"):
        load_text(str(tmp_path), 16)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which Windows lacks")
def test_pipe_is_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CommandError, match="pipe: neither a file nor a directory"):
        load_text(str(tmp_path / "pipe"), 16)


def test_batch_depends_on_seed_and_step_only() -> None:
    text = _text(10_000)
    first = batch_of_step(text, 8, 16, seed=3, step=7)
    torch.manual_seed(1)
    np.random.default_rng(5).random()
    assert torch.equal(batch_of_step(text, 8, 16, seed=3, step=7), first)
    assert not torch.equal(batch_of_step(text, 8, 16, seed=3, step=8), first)
    assert not torch.equal(batch_of_step(text, 8, 16, seed=4, step=7), first)
    assert first.dtype == torch.int64
    assert first.shape == (8, 17)
    # Consecutive bytes of the text.
    assert torch.equal((first[:, 1:] - first[:, :-1]) % 251, torch.ones(8, 16, dtype=torch.int64))


def test_batches_reach_both_ends_of_the_text() -> None:
    text = _text(20)
    starts = {int(row[0]) for step in range(50) for row in batch_of_step(text, 8, 16, 0, step)}
    assert starts == {0, 1, 2, 3}


def test_validation_covers_the_text_evenly() -> None:
    batches = validation_batches(_text(201), 4, 50, 7)
    assert [len(batch) for batch in batches] == [4, 3]
    assert torch.cat(batches)[:, 0].tolist() == [0, 25, 50, 75, 100, 125, 150]
    # A text shorter than that many sequences gives each start once.
    assert sum(map(len, validation_batches(_text(19), 4, 16, 7))) == 3

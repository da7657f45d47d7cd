"""The checks that come before any work: of a file that results go to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from a8multi.cli.console import CommandError, require_writable, within_memory


def test_trying_a_file_leaves_everything_as_it_was(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    os.utime(old, (1, 1))
    for path in (old, new):
        require_writable("--json", path)
    assert (old.read_text(), old.stat().st_mtime) == ("kept", 1)
    assert not new.exists()


@pytest.mark.parametrize("name", [".", "nowhere/new", "old/new"])
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(CommandError, match=r"--json .*: cannot be written \(.*\)"):
        require_writable("--json", tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which Windows lacks")
def test_pipe_is_not_opened(tmp_path: Path) -> None:
    """It would block, and then end for its reader."""
    os.mkfifo(tmp_path / "pipe")
    require_writable("--json", tmp_path / "pipe")


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="another"), within_memory("advice"):
        raise RuntimeError("another")

"""bench/script.py: the results of both scripts can be written, or nothing begins."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from a8multi.cli.console import CommandError

Script = Callable[[str], ModuleType]


def test_folders_are_made_and_files_are_not(script: Script, tmp_path: Path) -> None:
    script("script").prepare(Namespace(json=tmp_path / "a" / "x.json", png=tmp_path / "b" / "x.png"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]


@pytest.mark.parametrize("option", ["json", "png"])
@pytest.mark.parametrize("name", [".", "file/below"])
def test_results_that_cannot_be_written(script: Script, tmp_path: Path, option: str, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=f"--{option} .*: cannot be written"):
        script("script").prepare(Namespace(**({"json": None, "png": None} | {option: tmp_path / name})))

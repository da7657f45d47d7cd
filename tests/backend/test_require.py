"""A8MULTI_REQUIRE_BACKEND: tests that need a GPU are skipped with the reason where there is none, or fail if asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from a8multi import settings

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("required", "failing"), [("", 0), ("cuda", 1), ("cupy,cuda", 2)])
def test_skips_become_failures(required: str, failing: int, tmp_path: Path) -> None:
    """In a child, which sees no GPU: one test on the two backends that need one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("A8MULTI_")}
    environment |= {settings.REQUIRE_BACKEND.name: required, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-c", TESTS.parent / "pyproject.toml", "-p", "no:cacheprovider", "-q"]
    command += ["-m", "gpu", "-k", "test_log8_values", TESTS / "quant" / "test_snapshots.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == bool(failing), done.stdout + done.stderr
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (skipped|error|passed)", done.stdout)}
    assert counts.get("error", 0) == failing, done.stdout
    assert counts.get("skipped", 0) == 2 - failing, done.stdout
    assert "passed" not in counts
    assert done.stdout.count("torch sees no CUDA device") >= 2
    for name in filter(None, required.split(",")):
        assert f"A8MULTI_REQUIRE_BACKEND names {name}, which cannot run" in done.stdout

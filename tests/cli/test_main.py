"""The `a8multi` command as a whole: `python -m a8multi`, exit statuses, what it imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import a8multi
from a8multi.errors import BackendUnavailable


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_python_m_version() -> None:
    result = _run("-m", "a8multi", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"a8multi {a8multi.__version__}\n", "")


@pytest.mark.parametrize("arguments", ["", "no-such-command", "info --no-such-option", "bench --set none"])
def test_python_m_wrong_usage_is_one_line(arguments: str) -> None:
    result = _run("-m", "a8multi", *arguments.split())
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("a8multi")
    assert "--help" in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import a8multi.cli; a8multi.cli.main([{!r}, '--help'])"
    for command in ("info", "train", "bench"):
        result = _run("-c", code.format(command))
        assert (result.returncode, result.stderr) == (0, ""), command
        assert f"usage: a8multi {command}" in result.stdout


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(BackendUnavailable("no cuda here"), 1, "no cuda here"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_errors_become_an_exit_status(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("a8multi.cli.info.collect", fail)
    result = command("info")
    assert result.status == status
    assert result.err.startswith("a8multi info: ")
    assert words in result.err


def test_a_bug_keeps_its_traceback(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a8multi.cli.info.collect", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        command("info")

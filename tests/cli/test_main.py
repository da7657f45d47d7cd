"""The `a8multi` command as a whole: `python -m a8multi`, exit statuses, what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import a8multi
from a8multi.cli import COMMANDS
from a8multi.errors import BackendUnavailable


def _run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=environment)


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


def test_help_needs_no_docstrings() -> None:
    result = _run("-OO", "-m", "a8multi", "--help")
    assert result.returncode == 0
    for name, module in COMMANDS.items():
        first_words = " ".join(module.DESCRIPTION.split()[:4])
        assert re.search(rf"{name} +{re.escape(first_words)}", result.stdout), result.stdout


@pytest.mark.parametrize("module", ["numpy", "torch"])
@pytest.mark.parametrize("arguments", ["info", "info --model-size 7e9", "train", "bench"])
def test_without_torch_the_loaders_command_is_named(tmp_path: Path, module: str, arguments: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise OSError('libtorch.so: not found\\nanywhere')")
    result = _run("-m", "a8multi", *arguments.split(), PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"a8multi {arguments.split()[0]}: error: ")
    assert result.stderr.count("\n") == 1
    for words in (f"needs {module}", "libtorch.so: not found", "python -m a8multi.loader"):
        assert words in result.stderr


# What prints and needs no torch, which takes its time; PYTHONUNBUFFERED decides where a write fails.
PRINTING = ("a8multi --help", "a8multi.loader", "a8multi.loader --json")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [*PRINTING, "a8multi info --model-size 1e7"])
def test_reader_that_has_gone_gets_no_traceback(arguments: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    os.close(writer)
    # argparse itself overlooks a write that fails at once.
    assert done.returncode in ((0, 141) if "--help" in arguments else (141,))
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full, which Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", PRINTING)
def test_full_disk_is_one_line(arguments: str, unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", *arguments.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    if unbuffered and "--help" in arguments:
        return  # argparse itself overlooks it
    assert done.returncode == 1
    assert re.fullmatch(r"(a8multi|python -m a8multi\.loader): error: .*No space left.*\n", done.stderr)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (BackendUnavailable("no cuda here"), 1, "no cuda here"),
        (OSError(28, "no space", "a-file"), 1, "no space: 'a-file'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_an_exit_status(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("a8multi.cli.info.collect", fail)
    result = command("info")
    assert result.status == status
    assert result.err.startswith(("a8multi info: ", "a8multi: "))
    assert result.err.count("\n") == 1
    assert words in result.err


def test_a_bug_keeps_its_traceback(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a8multi.cli.info.collect", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        command("info")

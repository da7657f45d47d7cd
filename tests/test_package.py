"""Importing the package: lazy, silent and quick."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import a8multi


def _run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_import_does_nothing() -> None:
    """No torch, no library, no output, no thread; ctypes is how libraries would be loaded."""
    code = """
import sys, threading
before = set(sys.modules)
import a8multi
loaded = set(sys.modules) - before
assert not {name for name in loaded if name.split(".")[0] in ("torch", "numpy", "ctypes", "cupy")}, loaded
assert {name for name in loaded if name.startswith("a8multi")} == {"a8multi"}, loaded
assert threading.active_count() == 1
"""
    done = _run(code)
    assert done.stdout == done.stderr == ""


def test_an_optimizer_alone_loads_no_library() -> None:
    """Construction probes nothing: the first step does."""
    code = """
import sys, torch, a8multi
a8multi.AdamW8bit([torch.nn.Parameter(torch.zeros(4))])
if sys.platform == "linux":
    with open("/proc/self/maps") as maps:
        assert "liba8multi" not in maps.read()
assert not torch.cuda.is_initialized()
"""
    done = _run(code)
    assert done.stdout == done.stderr == ""


def test_every_name_resolves() -> None:
    assert len(set(a8multi.__all__)) == len(a8multi.__all__)
    for name in a8multi.__all__:
        assert getattr(a8multi, name) is not None, name
    assert a8multi.Adafactor8Bit is a8multi.Adafactor8bit
    assert a8multi.functional.__name__ == "a8multi.functional"
    assert issubclass(a8multi.StateFormatError, ValueError)
    assert issubclass(a8multi.BackendUnavailable, a8multi.A8MultiError)
    assert set(a8multi.__all__) <= set(dir(a8multi))
    assert a8multi.__version__.count(".") == 2


def test_star_import() -> None:
    _run("from a8multi import *\nassert AdamW8bit and Adafactor8bit and use_backend")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AdamW4bit'"):
        _ = a8multi.AdamW4bit


@pytest.mark.parametrize("arguments", [["-m", "a8multi.loader"], ["-c", "import a8multi; print(a8multi.AdamW8bit)"]])
def test_started_in_a_checkout(arguments: list[str]) -> None:
    """Its a8multi/ hides the installed package, and loader/ lies beside it. -S: no hook of an editable install."""
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "a8multi" in done.stdout, done.stderr


def test_import_time() -> None:
    """`import a8multi` adds at most 30 ms to `import torch`: 5, and the optimizers that it then resolves some 30 more.

    Medians of several processes, in processor time, so that a busy machine does not decide.
    """
    code = """
import json, time
import torch, torch.optim
start = time.process_time()
import a8multi
bare = time.process_time() - start
a8multi.AdamW8bit
print(json.dumps([bare, time.process_time() - start]))
"""
    times = [json.loads(_run(code).stdout) for _ in range(3)]
    bare, whole = (statistics.median(column) for column in zip(*times, strict=True))
    assert bare <= 0.005
    assert whole <= 0.080

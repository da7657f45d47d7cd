"""The CPU library's threads: whose they are, and that looking for them waits for no other thread and no parent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Build = Callable[..., Path]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU OpenMP is looked for on Linux only")

# Opens the stubs named in the arguments and has quantise() ready, a call that is worth two threads.
PRELUDE = """
import ctypes, os, sys
from a8multi.loader import geometry, library, structs
opened = [ctypes.CDLL(path) for path in sys.argv[1:]]
calls = [ctypes.c_int.in_dll(stub, "stub_calls") for stub in opened if hasattr(stub, "stub_calls")]
native = library.load("cpu")
numel = 4 * geometry()["A8_CHUNK"]
values, codes, blocks = (ctypes.c_float * numel)(), (ctypes.c_uint8 * numel)(), (ctypes.c_float * (numel // 128))()
codec = structs.Codec(
    values=ctypes.addressof(values), codes=ctypes.addressof(codes), blocks=ctypes.addressof(blocks), numel=numel,
    block_size=128, dtype=structs.Dtype.F32, format=structs.Format.INT8,
)
def quantise():
    native.call("a8_quantize", structs.Exec(threads=2), codec)
"""


def run(code: str, *arguments: Path, **environment: str) -> str:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openmp_that_is_loaded_runs_the_work(build: Build) -> None:
    other = build("openmp", "STUB_NO_PARALLEL", name="libgomp-other.so")
    openmp = build("openmp", name="libgomp.so.1")
    code = "quantise()\nquantise()\nprint([count.value for count in calls])"
    assert run(code, other, openmp).strip() == "[0, 2]"


def test_a_library_that_another_thread_opens_does_not_block_the_first_call(build: Build) -> None:
    """The other thread holds the linker's lock and will want that of its list of libraries."""
    outer = build("opener", "STUB_OUTER", name="outer.so")
    inner = build("opener", "STUB_INNER", name="inner.so")
    code = """
reader, writer = os.pipe()
os.environ["STUB_PIPE"] = str(writer)
assert opened[0].start() == 0
os.read(reader, 1)
quantise()
assert opened[0].join()
print([count.value for count in calls])
"""
    stubs = build("opener", name="opener.so"), build("openmp", name="libgomp.so.1")
    assert run(code, *stubs, STUB_OUTER=str(outer), STUB_INNER=str(inner)).strip() == "[1]"


def test_a_child_does_not_use_the_parents_openmp(build: Build) -> None:
    """GNU OpenMP hangs in the child of a process that used it, be it torch alone that did."""
    code = """
child = os.fork()
if child == 0:
    quantise()
    os._exit(calls[0].value)
_, status = os.waitpid(child, 0)
quantise()
print(os.waitstatus_to_exitcode(status), calls[0].value)
"""
    assert run(code, build("openmp", name="libgomp.so.1")).strip() == "0 1"

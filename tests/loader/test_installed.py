"""The libraries that were really built: they load, tell the truth about themselves, and export a8_* only."""

import re
import shutil
import subprocess
import sys

import pytest

from a8multi import settings
from a8multi.errors import LibraryNotFound
from a8multi.loader import library, probe, search, structs
from a8multi.loader.signatures import SIGNATURES

# The levels x86-64-v3 and v4 of the psABI, above v2, in the kernel's words ("abm" is LZCNT).
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def load(backend: str) -> library.Library:
    try:
        return library.load(backend)
    except LibraryNotFound:
        if backend == "cpu" or backend in settings.require_backend():
            raise
        pytest.skip("the CUDA library is not installed: the package was built without nvcc")


@pytest.fixture(params=search.LIBRARIES)
def built(request: pytest.FixtureRequest) -> library.Library:
    return load(request.param)


def test_every_op_that_is_promised_can_be_called(built: library.Library) -> None:
    for entry in SIGNATURES:
        assert hasattr(built, entry.name) == (entry.op is None or bool(entry.op & built.info.ops)), entry.name
    assert structs.Op.CODEC | structs.Op.ELEMENTWISE in built.info.ops


def test_only_the_interface_is_exported(built: library.Library) -> None:
    nm = shutil.which("nm")
    if nm is None or not sys.platform.startswith("linux"):
        pytest.skip("nm for ELF files not found on this machine")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", built.path], check=True, capture_output=True, text=True
    ).stdout
    exported = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    promised = {entry.name for entry in SIGNATURES if entry.op is None or entry.op & built.info.ops}
    assert promised <= exported <= {entry.name for entry in SIGNATURES}


def test_cpu_library_says_what_it_is() -> None:
    info = library.load("cpu").info
    assert info.ops == structs.Op.CODEC | structs.Op.ELEMENTWISE | structs.Op.ADAFACTOR | structs.Op.READER
    assert set(info.isa_usable) <= set(info.isa_built)
    assert info.isa_best in info.isa_usable
    assert info.toolkit == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info.version)


def test_null_arguments_are_refused_with_words() -> None:
    found = library.load("cpu")
    for entry in SIGNATURES:
        if entry.op is not None and entry.op in found.info.ops:
            with pytest.raises(library.NativeError) as caught:
                found.call(entry.name, *(None if hasattr(kind, "contents") else 0 for kind in entry.argtypes))
            assert caught.value.status == structs.Status.ERROR_ARGUMENT
            assert "no message" not in caught.value.message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists the processor's features in a file")
def test_the_compiled_probe_agrees_with_the_kernel() -> None:
    report = probe.cpu()
    if report.architecture != "x86_64":
        pytest.skip("the kernel lists x86 features on x86-64 processors only")
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        flags = set(next(line for line in file if line.startswith("flags")).split())
    assert ("avx2" in report.isa_usable) == (flags >= V3)
    assert ("avx512" in report.isa_usable) == (flags >= V3 | V4)


def test_cuda_library_says_what_it_is() -> None:
    info = load("cuda").info
    assert info.isa_built == ()
    assert info.isa_best is None
    assert info.toolkit >= 12000
    assert re.search(r"\d\d", info.architectures)

"""The CUDA library that nvcc built: what is in the file is what it says, for every architecture.

Its exports are compared with the signatures in tests/loader/test_installed.py. Spills in it fail the build itself when
A8_FORBID_SPILLS is on, as in tox.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from cuda_build.conftest import STRICT
from kernel_sources import entry_files, kernels_of

from a8multi.loader import flatten
from a8multi.loader.library import Library


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def test_the_file_holds_the_architectures_that_it_names(cuda_library: Library, cuobjdump: str) -> None:
    listed = run(cuobjdump, "--list-elf", cuda_library.path), run(cuobjdump, "--list-ptx", cuda_library.path)
    elf = re.findall(r"\.(sm_\d+[af]?)\.cubin", listed[0])
    ptx = [name.replace("sm_", "compute_") for name in re.findall(r"\.(sm_\d+[af]?)\.ptx", listed[1])]
    assert sorted({*elf, *ptx}) == sorted(cuda_library.info.architectures.split())


def test_every_kernel_is_there_for_every_architecture(cuda_library: Library, cuobjdump: str) -> None:
    kernels = set().union(*(kernels_of(flatten(entry)) for entry in entry_files()))
    parts = run(cuobjdump, "-res-usage", cuda_library.path).split("Fatbin elf code:")[1:]
    seen = set()
    for part in parts:
        architecture = re.search(r"^arch = (\w+)$", part, re.MULTILINE)
        assert architecture
        seen.add(architecture[1])
        usage = dict(re.findall(r"^ *Function (\w+):\n +(.*)$", part, re.MULTILINE))
        assert set(usage) == kernels, architecture[1]
        for name, line in usage.items():
            assert "LOCAL:0 " in line, f"{name} for {architecture[1]}: {line}"
    assert seen == {name for name in cuda_library.info.architectures.split() if name.startswith("sm_")}


@pytest.mark.skipif(not STRICT, reason="outside the tox environment cuda-build the library may be built for a choice")
def test_every_architecture_that_nvcc_knows_is_built(cuda_library: Library, nvcc: str) -> None:
    if os.environ.get("SKBUILD_CMAKE_DEFINE"):
        pytest.skip(f"built for a choice: SKBUILD_CMAKE_DEFINE={os.environ['SKBUILD_CMAKE_DEFINE']}")
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", run(nvcc, "--list-gpu-arch")))
    expected = {f"sm_{number}" for number in known if number >= 75} | {f"compute_{known[-1]}"}
    assert set(cuda_library.info.architectures.split()) == expected

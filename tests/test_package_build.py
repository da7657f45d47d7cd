"""The build: whatever a user's flags, paths and switches are, the libraries are the same ones.

CMake configures, compiles and links as it would, but in place of every source a launcher compiles an empty one, which
takes a second; what the compiler was told about the machine and the arithmetic is in the macros that it defines.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHER = """
import pathlib, subprocess, sys
here = pathlib.Path(sys.argv[0]).parent
*command, source = sys.argv[1:]
empty, output = str(here / "empty.cpp"), command.index("-o")
with open(here / (pathlib.Path(source).stem + ".macros"), "w") as macros:
    subprocess.run([*command[:output], *command[output + 2 :], "-E", "-dM", empty], stdout=macros, check=True)
subprocess.run([*command, empty], check=True)
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake not found on PATH"),
    pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of GCC and Clang on Linux"),
]


def cmake(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, cwd=ROOT
    )


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return cmake("-S", ROOT, "-B", build, *options, **environment)


def build_of_empty_sources(folder: Path, *options: str, **environment: str) -> tuple[Path, str]:
    """The library, and what CMake said; <source>.macros in ``folder`` are the compiler's macros for each source."""
    (folder / "empty.cpp").touch()
    (folder / "launcher.py").write_text(LAUNCHER, encoding="utf-8")
    build = folder / "build, with a comma"
    launcher = f"-DCMAKE_CXX_COMPILER_LAUNCHER={sys.executable};{folder / 'launcher.py'}"
    said = configure(build, "-DA8_CUDA=OFF", launcher, *options, **environment)
    assert said.returncode == 0, said.stderr
    built = cmake("--build", build)
    assert built.returncode == 0, built.stdout + built.stderr
    return build / "liba8multi_cpu.so", said.stdout + said.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder for what only configures."""
    return tmp_path_factory.mktemp("build")


@pytest.mark.parametrize("fast", ["-Ofast", "-ffast-math", "-funsafe-math-optimizations -ffinite-math-only"])
def test_flags_that_would_change_the_bits_or_the_machine_are_undone(fast: str, tmp_path: Path) -> None:
    library, _ = build_of_empty_sources(tmp_path, "-DCMAKE_BUILD_TYPE=None", CXXFLAGS=f"-march=native {fast}")
    found = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.macros")}
    assert {"abi", "dispatch", "parallel", "probe", "reader"} < set(found)
    for source, macros in found.items():
        assert "#define __FINITE_MATH_ONLY__ 0" in macros, source
        for name in ("FAST_MATH", "ASSOCIATIVE_MATH", "RECIPROCAL_MATH", "NO_SIGNED_ZEROS"):
            assert f"__{name}__" not in macros, source
        if platform.machine() == "x86_64":
            assert ("__AVX__" in macros) == (source in {"kernels_avx2", "kernels_avx512"}), source
            assert ("__AVX512F__" in macros) == (source == "kernels_avx512"), source
    # What GCC links for -ffast-math: it flushes subnormals in the whole process.
    assert b"set_fast_math" not in library.read_bytes()


def test_without_a_static_cxx_runtime(tmp_path: Path) -> None:
    """As on Fedora without libstdc++-static."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-static-libstdc++*) echo "cannot find -lstdc++" >&2; exit 1;; esac\n'
        f'exec {os.environ.get("CXX", "c++")} "$@"\n',
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    _, said = build_of_empty_sources(tmp_path, CXX=str(compiler))
    assert "no static C++ runtime" in said


@pytest.mark.parametrize("value", ["off", "0", "no", "False"])
def test_the_cuda_library_is_left_out(value: str, build: Path) -> None:
    said = configure(build, f"-DA8_CUDA={value}")
    assert said.returncode == 0, said.stderr
    assert "CUDA library NOT built (A8_CUDA=OFF)" in said.stderr


@pytest.mark.parametrize("value", ["on", "1", "Yes", "TRUE"])
def test_the_cuda_library_is_insisted_on(value: str, build: Path) -> None:
    said = configure(build, f"-DA8_CUDA={value}", CUDACXX=str(build / "no-nvcc"))
    assert said.returncode != 0
    assert "A8_CUDA=ON, but the CUDA library cannot be built" in said.stderr


@pytest.mark.parametrize("value", ["atuo", "", "12.8"])
def test_another_value_is_refused(value: str, build: Path) -> None:
    said = configure(build, f"-DA8_CUDA={value}")
    assert said.returncode != 0
    assert "expected AUTO, ON or OFF" in " ".join(said.stderr.split())

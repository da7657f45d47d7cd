"""The CUDA side compiled without a GPU: by NVRTC as CuPy compiles it, and by nvcc in the installed library.

What is not on this machine is skipped by name. The tox environment made for these tests, cuda-build, installs NVRTC and
cuobjdump: there they must not be missing, and neither must the CUDA library where nvcc is. Works without torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from cuda_build.nvrtc import Nvrtc

from a8multi.errors import LibraryNotFound
from a8multi.loader import library

STRICT = os.environ.get("TOX_ENV_NAME") == "cuda-build" and sys.platform == "linux"


def lacking(what: str) -> NoReturn:
    (pytest.fail if STRICT else pytest.skip)(what)
    raise AssertionError("unreachable")


def _files(*distributions: str) -> Iterator[Path]:
    """The files of whichever of these packages are installed."""
    for name in distributions:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield from (Path(str(found.locate_file(file))) for file in found.files or ())


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    for path in _files("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        if path.name.startswith("libnvrtc.so."):
            return Nvrtc(path)
    lacking("NVRTC not found: pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump") or next(
        (str(path) for path in _files("nvidia-cuda-cuobjdump") if path.name == "cuobjdump"), None
    )
    return found or lacking("cuobjdump not found: pip install nvidia-cuda-cuobjdump")


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return found or pytest.skip("nvcc not found on PATH nor in CUDACXX")


@pytest.fixture(scope="session")
def cuda_library() -> library.Library:
    try:
        return library.load("cuda")
    except LibraryNotFound as error:
        if shutil.which("nvcc") is None:
            pytest.skip(f"the CUDA library is not installed, and nvcc is not on PATH to build it: {error}")
        lacking(f"nvcc is on PATH, but the installed package has no CUDA library: {error}")

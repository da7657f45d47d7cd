"""The emulated CUDA library, built once a session for each kind of device, loaded as the real one is."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from emulation.build import NATIVE, build
from stub_libraries import compiler

from a8multi import settings
from a8multi.loader import Library, library

__all__ = ["compiler"]


@pytest.fixture(scope="session")
def emulated(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Library]:
    """emulated(architecture) is native/cuda for a device of that kind: 750 or 900."""
    if sys.platform != "linux":
        pytest.skip("the emulator needs ELF sections and ucontext: Linux")
    built: dict[int, Library] = {}

    def load(architecture: int) -> Library:
        if architecture not in built:
            folder = tmp_path_factory.mktemp(f"emulated_{architecture}")
            path = build(
                compiler, NATIVE / "cuda" / "abi.cu", folder / library.search.library_name("cuda"), architecture
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(settings.LIBRARY_PATH.name, str(path))
                built[architecture] = library.load("cuda")
        return built[architecture]

    return load

"""Fixtures of the loading tests: stub libraries that they compile, and an environment without A8MULTI_* variables.

A conftest.py imports the fixtures that its tests use. Works without torch.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from a8multi import settings
from a8multi.loader import search

SOURCES = Path(__file__).parent / "loader" / "stubs"
INCLUDE = Path(__file__).parents[1] / "native" / "include"


@pytest.fixture
def clean_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in settings.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)


@pytest.fixture(scope="session")
def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    pytest.skip("no C++ compiler (CXX, c++, g++, clang++) to build the stub libraries with")


@pytest.fixture(scope="session")
def build(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(stub, *defines, name=...) compiles loader/stubs/<stub>.cpp, once for each set of defines."""
    base = tmp_path_factory.mktemp("stubs")

    def compile_stub(stub: str, *defines: str, name: str | None = None) -> Path:
        key = hashlib.sha256(repr((stub, defines, name)).encode()).hexdigest()[:12]
        output = base / key / (name or search.library_name("cpu"))
        if not output.exists():
            output.parent.mkdir()
            command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++17", f"-I{INCLUDE}", "-o", str(output)]
            command += [f"-D{define}" for define in defines] + [str(SOURCES / f"{stub}.cpp")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return output

    return compile_stub


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, clean_settings: None) -> Callable[..., None]:
    """use(*entries) sets A8MULTI_LIBRARY_PATH to them."""

    def set_path(*entries: object) -> None:
        monkeypatch.setenv(settings.LIBRARY_PATH.name, os.pathsep.join(map(str, entries)))

    return set_path


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, clean_settings: None) -> Callable[..., None]:
    """package(*directories) makes them the directories of the installed package."""

    def set_directories(*directories: Path) -> None:
        monkeypatch.setattr(search, "package_directories", lambda: directories)

    return set_directories

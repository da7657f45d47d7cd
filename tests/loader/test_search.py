"""Where libraries are looked for, and in which order."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from a8multi.errors import LibraryError, LibraryNotFound, SettingError
from a8multi.loader import search

Use = Callable[..., None]
CPU = search.library_name("cpu")
CUDA = search.library_name("cuda")


@pytest.mark.parametrize(("platform", "suffix"), [("linux", ".so"), ("darwin", ".dylib"), ("win32", ".dll")])
@pytest.mark.parametrize("backend", search.LIBRARIES)
def test_library_name(platform: str, suffix: str, backend: str) -> None:
    name = search.library_name(backend, platform)
    assert name == f"liba8multi_{backend}{suffix}"
    assert search.backend_of(name) == backend


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("liba8multi_cpu-asan.so", "cpu"),
        ("liba8multi_cuda.so.1", "cuda"),
        ("liba8multi_cpux.so", None),
        ("libother.so", None),
        ("a8multi_cpu.txt", None),
    ],
)
def test_backend_of(name: str, backend: str | None) -> None:
    assert search.backend_of(name) == backend


def test_only_the_package_is_searched_by_default(package: Use, tmp_path: Path) -> None:
    package(tmp_path / "a", tmp_path / "b")
    expected = [search.Candidate(tmp_path / place / "lib" / CUDA, False) for place in "ab"]
    assert list(search.candidates("cuda")) == expected


def test_entries_come_first_and_in_order(use: Use, package: Use, tmp_path: Path) -> None:
    package(tmp_path / "package")
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / CPU).touch()
    file = tmp_path / "liba8multi_cpu-asan.so"
    file.touch()
    use(file, directory)
    assert list(search.candidates("cpu")) == [
        (file, True),
        (directory / CPU, True),
        (tmp_path / "package" / "lib" / CPU, False),
    ]
    # The directory holds no CUDA library, and the file is not one: both are passed over.
    assert list(search.candidates("cuda")) == [(tmp_path / "package" / "lib" / CUDA, False)]


def test_relative_entries_become_absolute(
    use: Use, package: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package()
    (tmp_path / CPU).touch()
    monkeypatch.chdir(tmp_path)
    use(".")
    assert list(search.candidates("cpu")) == [(tmp_path / CPU, True)]


def test_entry_that_does_not_exist(use: Use, tmp_path: Path) -> None:
    use(tmp_path / "nowhere")
    with pytest.raises(LibraryNotFound, match="does not exist, but A8MULTI_LIBRARY_PATH names it") as caught:
        search.candidates("cpu")
    assert caught.value.path == str(tmp_path / "nowhere")


def test_directory_without_a_library(use: Use, tmp_path: Path) -> None:
    use(tmp_path)
    with pytest.raises(LibraryNotFound, match=f"holds neither {CPU} nor {CUDA}"):
        search.candidates("cpu")


def test_path_through_a_file_cannot_be_read(use: Use, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    use(tmp_path / "file" / CPU)
    with pytest.raises(LibraryError, match="cannot be read") as caught:
        search.candidates("cpu")
    assert not isinstance(caught.value, LibraryNotFound)


def test_file_that_is_not_named_as_a_library(use: Use, tmp_path: Path) -> None:
    (tmp_path / "other.so").touch()
    use(tmp_path / "other.so")
    with pytest.raises(SettingError, match=f"{CPU} or {CUDA}"):
        search.candidates("cuda")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        search.candidates("torch")


def test_the_metadata_lead_to_the_libraries_of_an_editable_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "a8multi-99.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: a8multi\nVersion: 99\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = search.package_directories.__wrapped__()
    assert found[-1] == tmp_path / "a8multi"
    assert [str(path) for path in found[:-1]] == [str(Path(p).absolute()) for p in sys.modules["a8multi"].__path__]

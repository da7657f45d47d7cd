"""Loading: what is refused, with which words, and how a library that is accepted is called."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from a8multi import settings
from a8multi.errors import (
    A8MultiError,
    BackendUnavailable,
    LibraryError,
    LibraryIncompatible,
    LibraryNotFound,
    NativeError,
)
from a8multi.loader import library, search, sources, structs

Build = Callable[..., Path]
Use = Callable[..., None]
CPU = search.library_name("cpu")


def refused(path: Path, use: Use, kind: type[LibraryError], backend: str = "cpu") -> LibraryError:
    """The error that loading ``path``, named by A8MULTI_LIBRARY_PATH, gives; exactly of type ``kind``."""
    use(path)
    with pytest.raises(kind) as caught:
        library.load(backend)
    error = caught.value
    assert type(error) is kind
    assert error.path == str(path)
    assert str(path) in str(error)
    assert [attempt.path for attempt in error.attempts] == [str(path)]
    return error


# --- A library as it should be ---


def test_load(build: Build, use: Use) -> None:
    path = build("native")
    use(path)
    found = library.load("cpu")
    assert found.path == path
    assert found.attempts == ((str(path), "loaded"),)
    assert found.info == library.LibraryInfo(
        backend="cpu",
        version="9.8.7",
        abi_version=structs.ABI_VERSION,
        ops=structs.Op.CODEC | structs.Op.ELEMENTWISE | structs.Op.ADAFACTOR,
        isa_built=("baseline", "avx2", "avx512"),
        isa_usable=("baseline", "avx2"),
        isa_best="avx2",
        architectures="sm_75 sm_90",
        toolkit=12080,
        chunk=16384,
        tile_rows=512,
        tile_cols=1024,
    )


def test_directory_entry_names_the_file_in_it(build: Build, use: Use) -> None:
    path = build("native")
    use(path.parent)
    assert library.load("cpu").path == path


def test_one_library_per_file(build: Build, use: Use) -> None:
    first, second = build("native"), build("native", "STUB_OPS=A8_OP_CODEC")
    use(first)
    loaded = library.load("cpu")
    assert library.load("cpu") is loaded
    use(second)
    assert library.load("cpu").path == second
    use(first)
    assert library.load("cpu") is loaded


def test_threads_get_the_same_library(build: Build, use: Use) -> None:
    use(build("native", "STUB_FOR_THREADS"))
    barrier = threading.Barrier(8)
    found = []

    def work() -> None:
        barrier.wait()
        found.append(library.load("cpu"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_calls_pass_their_arguments(build: Build, use: Use) -> None:
    use(build("native"))
    found = library.load("cpu")
    where = structs.Exec()
    found.call("a8_adafactor", ctypes.byref(where), None, structs.Phase.NORM)
    assert where.isa_ran == structs.Phase.NORM
    found.call("a8_dequantize", where, structs.Codec(block_size=64))
    assert where.isa_ran == 64
    with pytest.raises(ctypes.ArgumentError):
        found.call("a8_dequantize", structs.Codec(), where)


def test_failing_entry_raises_with_the_librarys_words(build: Build, use: Use) -> None:
    use(build("native"))
    found = library.load("cpu")
    with pytest.raises(NativeError, match="tensor 3: codes is null") as caught:
        found.call("a8_quantize", None, None)
    assert caught.value.status is structs.Status.ERROR_ARGUMENT
    assert caught.value.entry == "a8_quantize"
    with pytest.raises(NativeError, match="tensor 3: codes is null"):
        found.check(found.a8_quantize(None, None))
    found.check(structs.Status.OK)


def test_unknown_status_without_message(build: Build, use: Use) -> None:
    use(build("native"))
    with pytest.raises(NativeError, match="a8_elementwise failed with status 77: the library gave no message"):
        library.load("cpu").call("a8_elementwise", None, None, 0)


def test_an_entry_need_not_exist_when_its_op_is_not_promised(build: Build, use: Use) -> None:
    path = build("native", "STUB_NO_ADAFACTOR", "STUB_OPS=(A8_OP_CODEC|A8_OP_ELEMENTWISE)")
    use(path)
    found = library.load("cpu")
    assert callable(found.a8_elementwise)
    assert not hasattr(found, "a8_adafactor")
    with pytest.raises(BackendUnavailable, match=r"does not provide a8_adafactor.*A8MULTI_BACKEND") as caught:
        found.call("a8_adafactor", None, None, 0)
    assert str(path) in str(caught.value)


def test_an_entry_whose_op_is_not_promised_is_not_bound(build: Build, use: Use) -> None:
    use(build("native", "STUB_OPS=A8_OP_CODEC"))
    assert not hasattr(library.load("cpu"), "a8_elementwise")


# --- Where it is looked for ---


def test_no_file_anywhere_lists_every_place(package: Use, tmp_path: Path) -> None:
    package(tmp_path / "a", tmp_path / "b")
    with pytest.raises(LibraryNotFound) as caught:
        library.load("cpu")
    places = [str(tmp_path / place / "lib" / CPU) for place in "ab"]
    assert caught.value.attempts == tuple((place, "no such file") for place in places)
    assert all(place in str(caught.value) for place in places)
    assert "A8MULTI_LIBRARY_PATH" in str(caught.value)
    # The package is on no index.
    assert "pip install --force-reinstall ." in caught.value.hint


def test_a_package_inside_an_archive_has_no_library(package: Use, tmp_path: Path) -> None:
    (tmp_path / "a8multi.zip").touch()
    package(tmp_path / "a8multi.zip" / "a8multi")
    with pytest.raises(LibraryNotFound) as caught:
        library.load("cpu")
    assert [attempt.outcome for attempt in caught.value.attempts] == ["no such file"]


def test_missing_cuda_library_says_how_to_build_it(package: Use, tmp_path: Path) -> None:
    package(tmp_path)
    with pytest.raises(LibraryNotFound, match="A8_CUDA=ON"):
        library.load("cuda")


def test_package_directories_are_tried_in_turn(build: Build, package: Use, tmp_path: Path) -> None:
    broken, good = tmp_path / "broken" / "lib", tmp_path / "good" / "lib"
    for directory in (broken, good):
        directory.mkdir(parents=True)
    (broken / CPU).write_text("text", encoding="utf-8")
    (good / CPU).write_bytes(build("native").read_bytes())
    # A package that holds libraries holds the sources they are checked against.
    shutil.copytree(Path(__file__).parents[2] / "native" / "include", good / "src" / "include")
    package(tmp_path / "absent", broken.parent, good.parent)
    found = library.load("cpu")
    assert found.path == good / CPU
    assert [path for path, _ in found.attempts] == [
        str(tmp_path / "absent" / "lib" / CPU),
        str(broken / CPU),
        str(good / CPU),
    ]
    assert found.attempts[0].outcome == "no such file"
    assert "cannot be opened" in found.attempts[1].outcome


def test_a_broken_file_says_more_than_an_absent_one(package: Use, tmp_path: Path) -> None:
    (tmp_path / "broken" / "lib").mkdir(parents=True)
    (tmp_path / "broken" / "lib" / CPU).write_text("text", encoding="utf-8")
    package(tmp_path / "absent", tmp_path / "broken", tmp_path / "absent too")
    with pytest.raises(LibraryError, match="cannot be opened") as caught:
        library.load("cpu")
    assert not isinstance(caught.value, LibraryNotFound)
    assert len(caught.value.attempts) == 3


def test_second_entry_is_used_when_the_first_holds_the_other_library(build: Build, use: Use) -> None:
    cuda = build("native", 'STUB_BACKEND="cuda"', name=search.library_name("cuda"))
    cpu = build("native")
    use(cuda.parent, cpu.parent)
    assert library.load("cpu").path == cpu
    assert library.load("cuda").path == cuda


def test_broken_entry_raises_though_the_next_one_and_the_package_would_do(
    build: Build, use: Use, package: Use, tmp_path: Path
) -> None:
    good = build("native")
    broken = tmp_path / CPU
    broken.write_text("text", encoding="utf-8")
    (tmp_path / "package" / "lib").mkdir(parents=True)
    (tmp_path / "package" / "lib" / CPU).write_bytes(good.read_bytes())
    package(tmp_path / "package")
    use(broken, good)
    with pytest.raises(LibraryError) as caught:
        library.load("cpu")
    assert caught.value.attempts == ((str(broken), caught.value.reason),)


# --- Files that cannot be opened ---


def test_not_a_library(use: Use, tmp_path: Path) -> None:
    path = tmp_path / CPU
    path.write_text("this is text\n" * 100, encoding="utf-8")
    error = refused(path, use, LibraryError)
    assert error.reason.startswith("cannot be opened as a library: ")
    with pytest.raises(OSError) as said:  # noqa: PT011  (the text is what is compared)
        ctypes.CDLL(str(path))
    assert str(said.value) in error.reason


def test_empty_file(use: Use, tmp_path: Path) -> None:
    path = tmp_path / CPU
    path.touch()
    assert "cannot be opened" in refused(path, use, LibraryError).reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are ELF files on Linux")
@pytest.mark.parametrize("part", [0.3, 0.5, 0.75, 0.999])
def test_truncated_library(part: float, build: Build, use: Use, tmp_path: Path) -> None:
    """The dynamic linker would map it and die of SIGBUS."""
    whole = build("native").read_bytes()
    path = tmp_path / CPU
    path.write_bytes(whole[: int(len(whole) * part)])
    error = refused(path, use, LibraryError)
    assert error.reason == f"is truncated: {path.stat().st_size} of {len(whole)} bytes"
    assert "copy it again" in error.hint


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are ELF files on Linux")
@pytest.mark.parametrize("at", [32, 40, 54, 56, 58, 60])  # of what the header says about the two tables
def test_damaged_header(at: int, build: Build, use: Use, tmp_path: Path) -> None:
    content = bytearray(build("native").read_bytes())
    width = 8 if at < 54 else 2
    content[at : at + width] = b"\xff" * width
    path = tmp_path / CPU
    path.write_bytes(content)
    reason = refused(path, use, LibraryError).reason
    assert "is truncated" in reason or "cannot be opened" in reason


def test_a_device_in_place_of_the_file(use: Use, tmp_path: Path) -> None:
    (tmp_path / CPU).symlink_to(os.devnull)
    assert "is not a regular file" in refused(tmp_path / CPU, use, LibraryError).reason


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this operating system has no named pipes in folders")
def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / CPU)
    command = [sys.executable, "-m", "a8multi.loader"]
    environment = {**os.environ, settings.LIBRARY_PATH.name: str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is not a regular file" in done.stdout


def test_a_file_system_without_execution_is_named(build: Build, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: failed to map segment from shared object")  # glibc's words

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    error = refused(build("native", "STUB_NEVER_OPENED"), use, LibraryError)
    assert "failed to map segment" in error.reason
    assert "noexec" in error.hint


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other linkers refuse undefined symbols when linking")
def test_undefined_symbol_is_named(compiler: str, use: Use, tmp_path: Path) -> None:
    source = tmp_path / "undefined.cpp"
    source.write_text('extern "C" void nowhere_defined(); extern "C" void f() { nowhere_defined(); }', encoding="utf-8")
    path = tmp_path / CPU
    assert os.spawnlp(os.P_WAIT, compiler, compiler, "-shared", "-fPIC", "-o", str(path), str(source)) == 0
    assert "nowhere_defined" in refused(path, use, LibraryError).reason


def test_directory_in_place_of_the_file(use: Use, tmp_path: Path) -> None:
    (tmp_path / CPU).mkdir()
    use(tmp_path)
    with pytest.raises(LibraryError, match="cannot be read") as caught:
        library.load("cpu")
    assert type(caught.value) is LibraryError
    assert caught.value.path == str(tmp_path / CPU)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permission bits do not bind root")
def test_file_without_permission(build: Build, use: Use, tmp_path: Path) -> None:
    path = tmp_path / CPU
    path.write_bytes(build("native").read_bytes())
    path.chmod(0)
    assert "cannot be read" in refused(path, use, LibraryError).reason


# --- Libraries that were built for something else ---


def test_wrong_abi_version(build: Build, use: Use) -> None:
    error = refused(build("native", "STUB_ABI_VERSION=7"), use, LibraryIncompatible)
    assert error.reason == f"the ABI version is 7 in this library, but {structs.ABI_VERSION} in this package"


def test_a_longer_info_of_another_version_does_no_harm(build: Build, use: Use) -> None:
    path = build("native", "STUB_ABI_VERSION=7", "STUB_INFO_BYTES=2048", "STUB_NO_ELEMENTWISE")
    assert "the ABI version is 7" in refused(path, use, LibraryIncompatible).reason


def test_wrong_struct_size(build: Build, use: Use) -> None:
    error = refused(build("native", "STUB_EXTRA_TENSOR_BYTES=8"), use, LibraryIncompatible)
    ours = ctypes.sizeof(structs.Tensor)
    assert error.reason == f"the size of struct a8_tensor is {ours + 8} in this library, but {ours} in this package"


def test_wrong_geometry(build: Build, use: Use) -> None:
    error = refused(build("native", "STUB_CHUNK=4096"), use, LibraryIncompatible)
    assert error.reason == "A8_CHUNK is 4096 in this library, but 16384 in this package"


def test_library_of_another_backend(build: Build, use: Use) -> None:
    path = build("native", name=search.library_name("cuda"))
    error = refused(path, use, LibraryIncompatible, "cuda")
    assert error.reason == "the backend is cpu in this library, but cuda in this package"


@pytest.mark.parametrize(
    ("define", "symbol"), [("STUB_NO_GET_INFO", "a8_get_info"), ("STUB_NO_ELEMENTWISE", "a8_elementwise")]
)
def test_missing_symbol(define: str, symbol: str, build: Build, use: Use) -> None:
    error = refused(build("native", define), use, LibraryIncompatible)
    assert f"symbol {symbol} is missing" in error.reason


def test_info_that_fails(build: Build, use: Use) -> None:
    error = refused(build("native", "STUB_INFO_STATUS=A8_ERROR_DEVICE"), use, LibraryIncompatible)
    assert error.reason == "a8_get_info failed with status 4 (ERROR_DEVICE): the stub was told to fail"
    assert isinstance(error.__cause__, NativeError)


def test_every_failure_says_what_to_do(build: Build, use: Use, package: Use, tmp_path: Path) -> None:
    text, directory = tmp_path / "text" / CPU, tmp_path / "directory" / CPU
    text.parent.mkdir()
    text.write_text("text", encoding="utf-8")
    directory.mkdir(parents=True)
    broken = [build("native", define) for define in ("STUB_ABI_VERSION=7", "STUB_NO_ELEMENTWISE", "STUB_INFO_STATUS=1")]
    for entry in (text, directory.parent, *broken, tmp_path / "nowhere"):
        use(entry)
        with pytest.raises(A8MultiError) as caught:
            library.load("cpu")
        assert "What to do: " in str(caught.value)


def test_damaged_sources_are_not_taken_for_a_damaged_library(
    build: Build, use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(search, "source_directories", lambda: (tmp_path,))
    path = build("native", "STUB_WITH_DAMAGED_SOURCES")
    (tmp_path / sources.GEOMETRY).parent.mkdir(parents=True)
    (tmp_path / sources.GEOMETRY).touch()
    assert "cannot be checked against the device sources" in refused(path, use, LibraryError).reason


def test_missing_sources_are_no_obstacle(
    build: Build, use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(search, "source_directories", lambda: (tmp_path,))
    use(build("native", "STUB_WITHOUT_SOURCES"))
    assert library.load("cpu").info.chunk == 16384
    error = refused(build("native", "STUB_WITHOUT_SOURCES", "STUB_CHUNK=4096"), use, LibraryIncompatible)
    assert error.reason == "A8_CHUNK is 4096 in this library, but 16384 in this package"

"""Open a native library, make sure that it is the one this package was written for, and call it.

A straight line: candidate paths -> open -> handshake (ABI version, sizes, geometry) -> bind every entry. Each step has
its own words when it fails. A path from ``A8MULTI_LIBRARY_PATH`` must work; paths of the package are tried in turn.
"""

from __future__ import annotations

import ctypes
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from a8multi import settings
from a8multi.errors import Attempt, BackendUnavailable, LibraryError, LibraryIncompatible, LibraryNotFound, NativeError

from . import search, sources
from .signatures import GET_INFO, LAST_ERROR, SIGNATURES, Signature
from .structs import ABI_VERSION, STRUCTS, Info, Op, Status, isa_names

# Room for the a8_info of any other ABI version: a library writes its own struct before we can know its size.
_INFO_ROOM_BYTES = 4096

# Of ELF64 in this machine's byte order: the first bytes, where the two tables of its header are, and where the bytes of
# a program header are.
_ELF_IDENT = b"\x7fELF\x02" + (b"\x01" if sys.byteorder == "little" else b"\x02")
_ELF_HEADER = Struct("=32xQQ6xHHHH2x")
_ELF_PROGRAM = Struct("=8xQ16xQ16x")


@dataclass(frozen=True)
class LibraryInfo:
    """What a library says about itself: ``a8_info``, decoded.

    ``isa_best`` is None and the ``isa_*`` sets are empty for a GPU library, whose ``architectures`` and ``toolkit``
    (CUDART_VERSION, such as 12080) are set instead.
    """

    backend: str
    version: str
    abi_version: int
    ops: Op
    isa_built: tuple[str, ...]
    isa_usable: tuple[str, ...]
    isa_best: str | None
    architectures: str
    toolkit: int
    chunk: int
    tile_rows: int
    tile_cols: int


class Library:
    """A loaded native library. Made by ``load``; safe to use from several threads.

    The entries are attributes (``library.a8_elementwise``) with argument and result types set; those that belong to an
    op which ``info.ops`` lacks are not bound. ``call`` checks the status too.

    Attributes:
        path: the file.
        info: what it says about itself.
        attempts: every place that was tried, this file last.
    """

    def __init__(self, path: Path, info: LibraryInfo, functions: dict[str, Callable[..., Any]]) -> None:
        self.path = path
        self.info = info
        self.attempts: tuple[Attempt, ...] = ()
        self._functions = functions

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # "_functions" itself is absent while copy or pickle rebuild an instance.
        functions: dict[str, Callable[..., Any]] = self.__dict__.get("_functions", {})
        if name not in functions:
            raise AttributeError(f"{type(self).__name__} has no attribute or entry {name!r}")
        return functions[name]

    def __repr__(self) -> str:
        return f"<Library {self.info.backend} {self.info.version} at {self.path}>"

    def check(self, status: int, entry: str = "") -> None:
        """Turn a status that an entry returned on this thread into an exception.

        Args:
            status: what the entry returned.
            entry: its name, for the message.
        Raises:
            NativeError: when it is not ``Status.OK``, with the text of ``a8_last_error``.
        """
        if status != Status.OK:
            raise NativeError(*_failure(status, self._functions[LAST_ERROR.name]), entry)

    def call(self, name: str, *args: Any) -> None:
        """Call an entry that returns a status, and check it.

        Raises:
            BackendUnavailable: this library was built without that entry.
            NativeError: the entry failed.
        """
        function = self._functions.get(name)
        if function is None:
            raise BackendUnavailable(
                f"{self.path}: the {self.info.backend} library {self.info.version} does not provide {name}, only "
                f"{', '.join(sorted(self._functions))}. Use another backend, for example {settings.BACKEND.name}=torch."
            )
        status = function(*args)
        if status != Status.OK:
            self.check(status, name)


_loaded: dict[tuple[str, Path], Library] = {}
_lock = threading.Lock()


def load(backend: str) -> Library:
    """The native library of ``backend``, opened once per file and process.

    Args:
        backend: "cpu" or "cuda".
    Raises:
        ValueError: for any other backend.
        LibraryNotFound: no candidate exists; lists them all.
        LibraryIncompatible: a file is there, but it is not a library that this version can drive.
        LibraryError: a file is there, but it cannot be read or opened.
        SettingError: an entry of ``A8MULTI_LIBRARY_PATH`` is not valid.
    """
    attempts: list[Attempt] = []
    failure: LibraryError | None = None
    with _lock:
        for path, forced in search.candidates(backend):
            try:
                library = _loaded.get((backend, path)) or _open(backend, path)
            except LibraryError as error:
                attempts.append(Attempt(error.path, error.reason))
                # A file that is there and broken says more than the absence of another one.
                if failure is None or isinstance(failure, LibraryNotFound):
                    failure = error
                if forced:
                    break
                continue
            if (backend, path) not in _loaded:
                library.attempts = (*attempts, Attempt(str(path), "loaded"))
                _loaded[backend, path] = library
            return library
    if failure is None or isinstance(failure, LibraryNotFound):
        name = search.library_name(backend)
        where = failure.path if failure is not None else name
        raise LibraryNotFound(where, f"no file {name} at any place that is searched", _not_found(backend), attempts)
    failure.attempts = tuple(attempts)
    raise failure


def _not_found(backend: str) -> str:
    rebuild = search.REINSTALL
    if backend == "cuda":
        rebuild = (
            "the CUDA library is built only where nvcc is found: "
            "pip install . --config-settings=cmake.define.A8_CUDA=ON in a checkout, or use another backend"
        )
    return f"{rebuild}, or set {settings.LIBRARY_PATH.name} to the directory that holds {search.library_name(backend)}"


def _failure(status: int, last_error: Callable[..., Any]) -> tuple[int, str]:
    """The status as a ``Status`` where it is a known one, and the library's message for it."""
    text = (last_error() or b"").decode("utf-8", "replace")
    known = status in Status._value2member_map_
    return (Status(status) if known else status), text or "the library gave no message"


def _open(backend: str, path: Path) -> Library:
    """Open ``path`` and bind its entries, or raise the error that says which step failed."""
    _require_readable(path)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        hint = "install a build for this platform"
        if "failed to map segment" in str(error):
            hint = "the likely reason is that its file system is mounted noexec: put it on another one"
        raise LibraryError(str(path), f"cannot be opened as a library: {error}", hint) from error
    last_error = _bind(handle, path, LAST_ERROR)
    info = _handshake(backend, path, _bind(handle, path, GET_INFO), last_error)
    functions = {
        entry.name: _bind(handle, path, entry) for entry in SIGNATURES if entry.op is None or entry.op & info.ops
    }
    return Library(path, info, functions)


def _require_readable(path: Path) -> None:
    """Refuse what dlopen reports in ways that differ between platforms, waits for, or does not survive."""
    hint = "make it a readable file, or choose another one"
    try:
        found = path.stat()
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(found.st_mode):
            raise LibraryError(str(path), "cannot be read: it is not a regular file", hint)
        with path.open("rb") as file:
            needed = _elf_bytes(file, found.st_size)
    # The latter for a package inside an archive.
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LibraryNotFound(str(path), "no such file") from error
    except OSError as error:
        raise LibraryError(str(path), f"cannot be read: {error.strerror or error}", hint) from error
    if found.st_size < needed:
        reason = f"is truncated: {found.st_size} of {needed} bytes"
        raise LibraryError(str(path), reason, f"copy it again (was the disk full?), or {search.REINSTALL}")


def _elf_bytes(file: BinaryIO, size: int) -> int:
    """How long an ELF file of ``size`` bytes must be by its headers; 0 for what dlopen refuses by its first bytes.

    The dynamic linker maps what the headers promise and touches it: a file that ends before kills the process.
    """
    header = file.read(_ELF_HEADER.size)
    if len(header) < _ELF_HEADER.size or not header.startswith(_ELF_IDENT):
        return 0
    program_at, section_at, program_size, programs, section_size, sections = _ELF_HEADER.unpack(header)
    needed = max(program_at + program_size * programs, section_at + section_size * sections)
    if needed <= size and program_size == _ELF_PROGRAM.size:
        file.seek(program_at)
        segments = _ELF_PROGRAM.iter_unpack(file.read(program_size * programs))
        needed = max([needed, *(offset + length for offset, length in segments if length)])
    return int(needed)


def _bind(handle: ctypes.CDLL, path: Path, entry: Signature) -> Callable[..., Any]:
    try:
        function = getattr(handle, entry.name)
    except AttributeError as error:
        promised = "" if entry.op is None else f", though its a8_info.ops promises {entry.op.name}"
        raise LibraryIncompatible(str(path), f"symbol {entry.name} is missing{promised}", _rebuild_hint()) from error
    if entry.takes_objects:
        return ctypes.PYFUNCTYPE(entry.restype, *entry.argtypes)((entry.name, handle))
    bound: Callable[..., Any] = function
    function.restype = entry.restype
    function.argtypes = list(entry.argtypes)
    return bound


def _rebuild_hint() -> str:
    return (
        f"install the package and its libraries from one build, or unset {settings.LIBRARY_PATH.name} if it points at "
        "an older one"
    )


def _handshake(backend: str, path: Path, get_info: Callable[..., Any], last_error: Callable[..., Any]) -> LibraryInfo:
    """Ask the library what it is, and refuse one that was built from other headers than ours."""
    room = (ctypes.c_char * _INFO_ROOM_BYTES)()
    raw = Info.from_buffer(room)
    status = get_info(ctypes.byref(raw))
    if status != Status.OK:
        error = NativeError(*_failure(status, last_error), GET_INFO.name)
        raise LibraryIncompatible(str(path), str(error), _rebuild_hint()) from error

    def require(what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise LibraryIncompatible(
                str(path), f"{what} is {theirs} in this library, but {ours} in this package", _rebuild_hint()
            )

    # The version first: the meaning of everything after it depends on it.
    require("the ABI version", raw.abi_version, ABI_VERSION)
    for name, struct in STRUCTS.items():
        require(f"the size of struct a8_{name}", getattr(raw, f"sizeof_{name}"), ctypes.sizeof(struct))
    require("the backend", raw.backend.decode("ascii", "replace"), backend)
    try:
        geometry = sources.geometry()
    except LibraryError as error:
        raise LibraryError(
            str(path), f"cannot be checked against the device sources: {error.reason}", error.hint
        ) from error
    for field in ("chunk", "tile_rows", "tile_cols"):
        name = f"A8_{field.upper()}"
        require(name, getattr(raw, field), geometry.get(name))
    return LibraryInfo(
        backend=backend,
        version=raw.version.decode("utf-8", "replace"),
        abi_version=raw.abi_version,
        ops=Op(raw.ops),
        isa_built=isa_names(raw.isa_built),
        isa_usable=isa_names(raw.isa_usable),
        isa_best=next(iter(isa_names(1 << raw.isa_best)), None) if raw.isa_best < 32 else None,
        architectures=raw.architectures.decode("utf-8", "replace"),
        toolkit=raw.toolkit,
        chunk=raw.chunk,
        tile_rows=raw.tile_rows,
        tile_cols=raw.tile_cols,
    )

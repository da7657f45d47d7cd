"""Where the native libraries and the device sources may be: ``A8MULTI_LIBRARY_PATH``, then the installed package.

Receives names, returns paths in order; opens nothing. Nothing else is ever searched (not the working directory, not the
system's library path), so that what is loaded follows from the settings alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import stat
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from a8multi import settings
from a8multi.errors import LibraryError, LibraryNotFound, SettingError

PACKAGE = "a8multi"
LIBRARIES = ("cpu", "cuda")

# What mends a package that lacks files of its own.
REINSTALL = "install it again: pip install --force-reinstall . in a checkout, or the wheel that it came from"


class Candidate(NamedTuple):
    """A file to try. ``forced`` when the user named it: then it must load, and nothing after it is tried."""

    path: Path
    forced: bool


def library_name(backend: str, platform: str = sys.platform) -> str:
    """File name of the library of ``backend`` ("cpu" or "cuda") on ``platform`` (a ``sys.platform``)."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(platform, ".so")
    return f"liba8multi_{backend}{suffix}"


def backend_of(name: str) -> str | None:
    """The backend whose library a file of this name is; a suffix such as ``-asan`` or ``.so.1`` is allowed."""
    for backend in LIBRARIES:
        rest = name.removeprefix(f"liba8multi_{backend}")
        if rest != name and not rest[:1].isalnum():
            return backend
    return None


@lru_cache(maxsize=1)
def package_directories() -> tuple[Path, ...]:
    """Directories of the installed package, in order.

    More than one in an editable install, where the modules stay in the checkout and the built libraries lie in
    site-packages: an import hook lists both in ``__path__``, and the metadata know the second in any case.
    """
    places: list[str] = []
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations is not None:
        places.extend(spec.submodule_search_locations)
    # Not found when the package is imported from a checkout that was never installed.
    with suppress(importlib.metadata.PackageNotFoundError):
        places.append(str(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE)))
    return tuple(dict.fromkeys(Path(place).absolute() for place in places))


def source_directories() -> tuple[Path, ...]:
    """Directories that hold the device sources (``include/a8`` and ``cuda``), in order: a checkout's, the package's."""
    checkout = Path(__file__).resolve().parent.parent / "native"
    return (checkout, *(directory / "lib" / "src" for directory in package_directories()))


def candidates(backend: str) -> tuple[Candidate, ...]:
    """Every path where the library of ``backend`` may be, in the order in which they are to be tried.

    Files in the installed package need not exist. An entry of ``A8MULTI_LIBRARY_PATH`` must exist and name a library: a
    directory that holds only the other backend's library, or a file that is that library, is passed over.

    Args:
        backend: "cpu" or "cuda".
    Raises:
        ValueError: for any other backend.
        SettingError: an entry is a file that is not named as a library.
        LibraryNotFound: an entry does not exist, or is a directory without any library.
        LibraryError: an entry cannot be read.
    """
    if backend not in LIBRARIES:
        raise ValueError(f"no native library is called {backend!r}: expected {' or '.join(LIBRARIES)}")
    found = [Candidate(path, True) for entry in settings.library_path() for path in _forced(entry, backend)]
    name = library_name(backend)
    found.extend(Candidate(directory / "lib" / name, False) for directory in package_directories())
    return tuple(found)


def _forced(entry: str, backend: str) -> list[Path]:
    """The file of ``backend`` that one entry of ``A8MULTI_LIBRARY_PATH`` names; none if it names only the other's."""
    variable = settings.LIBRARY_PATH.name
    hint = f"correct {variable}, or unset it to use the libraries of the installed package"
    path = Path(entry).absolute()
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
        names = [item.name for item in path.iterdir()] if is_directory else [path.name]
    except FileNotFoundError:
        raise LibraryNotFound(str(path), f"does not exist, but {variable} names it", hint) from None
    except OSError as error:
        raise LibraryError(
            str(path), f"cannot be read ({error.strerror or error}), but {variable} names it", hint
        ) from error
    if not is_directory:
        if backend_of(path.name) is None:
            raise SettingError(
                variable, entry, f"files named {' or '.join(library_name(name) for name in LIBRARIES)}, or directories"
            )
        return [path] if backend_of(path.name) == backend else []
    libraries = [library_name(name) for name in LIBRARIES]
    if not any(name in names for name in libraries):
        raise LibraryNotFound(
            str(path), f"holds neither {' nor '.join(libraries)}, but {variable} names this directory", hint
        )
    return [path / library_name(backend)] if library_name(backend) in names else []

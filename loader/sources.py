"""The device sources as text: the integers of geometry.h, and one flat string per entry file for NVRTC.

Receives paths below the source directory (``native/`` of a checkout, ``lib/src`` of the installed package) and returns
text or numbers. Compiles nothing.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from a8multi.errors import LibraryIncompatible, LibraryNotFound

from . import search

GEOMETRY = "include/a8/geometry.h"

# What the header says, for a package that has lost it: plain torch needs no sources, but the sizes.
WITHOUT_HEADER = {
    "A8_CHUNK": 16384,
    "A8_LANES": 256,
    "A8_DEALT": 8,
    "A8_TILE_ROWS": 512,
    "A8_TILE_COLS": 1024,
    "A8_RUN_ROWS": 64,
    "A8_SAMPLES": 8,
    "A8_TOTALS": 4,
    "A8_MIN_BLOCK": 32,
    "A8_MAX_BLOCK": 4096,
    "A8_USUAL_BLOCK": 128,
    "A8_THREADS": 256,
    "A8_UPLOAD_BYTES": 1024,
    "A8_FEW_CHUNKS": 2048,
}

_DEFINE = re.compile(
    r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(0[xX][0-9a-fA-F]+|\d+)[uUlL]*[ \t]*(?://.*)?$", re.MULTILINE
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once\b")
_OPENS = re.compile(r"^[ \t]*#[ \t]*if")
_CLOSES = re.compile(r"^[ \t]*#[ \t]*endif\b")


def root() -> Path:
    """Directory of the device sources; its ``include`` and itself are the include path.

    Raises:
        LibraryNotFound: neither the checkout nor the installed package holds them.
    """
    places = search.source_directories()
    for place in places:
        if (place / GEOMETRY).is_file():
            return place
    raise LibraryNotFound(
        str(places[-1]),
        f"{GEOMETRY} is in none of {', '.join(map(str, places))}",
        search.REINSTALL,
    )


def geometry() -> dict[str, int]:
    """Every integer ``#define`` of geometry.h by name, such as ``{"A8_CHUNK": 16384, ...}``.

    Raises:
        LibraryIncompatible: the file defines no integer at all.
    """
    try:
        path = root() / GEOMETRY
    except LibraryNotFound:
        return dict(WITHOUT_HEADER)
    found = {name: int(value, 0) for name, value in _DEFINE.findall(path.read_text(encoding="utf-8"))}
    if not found:
        raise LibraryIncompatible(str(path), "defines no integer", search.REINSTALL)
    return found


def flatten(entry: str) -> str:
    """One translation unit with every ``#include "..."`` of ``entry`` replaced by the file, for NVRTC and CuPy.

    Each file is inlined once, as ``#pragma once`` asks. ``#line`` directives keep the compiler's messages on the
    original files, by their paths below ``root()``. System includes stay where they are.

    Args:
        entry: path below ``root()`` with forward slashes, such as ``"cuda/kernels/adam.cuh"``.
    Raises:
        LibraryNotFound: the entry or a file that it includes is missing; says which file and line asks for it.
    """
    return "".join(_inline(root(), _locate(root(), None, entry, ""), set(), ()))


def _locate(base: Path, includer: PurePosixPath | None, name: str, asked_by: str) -> PurePosixPath:
    """Path below ``base`` of what ``#include "name"`` means: beside the includer, then the include path."""
    places = ([] if includer is None else [includer.parent]) + [PurePosixPath("include"), PurePosixPath(".")]
    for place in places:
        path = _normal(place / name)
        if path is not None and (base / path).is_file():
            return path
    tried = ", ".join(str(base / place / name) for place in places)
    raise LibraryNotFound(
        str(base / name),
        f"no such device source{asked_by}; tried {tried}",
        f"correct the #include, or {search.REINSTALL}",
    )


def _normal(path: PurePosixPath) -> PurePosixPath | None:
    """``path`` without "." and ".."; None when it leaves the source directory."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def _inline(
    base: Path,
    path: PurePosixPath,
    seen: set[PurePosixPath],
    parents: tuple[PurePosixPath, ...],
    conditional: bool = False,
) -> list[str]:
    """Lines of ``path``, reached through ``parents``, with its includes inlined.

    ``seen`` collects the files that are compiled for certain. A file that is included inside an #if may be skipped by
    the preprocessor and must still be found by a later include, so it is not counted as seen; the guard macro keeps the
    second copy out if the first one was compiled.
    """
    if not conditional:
        seen.add(path)
    guard = "A8_INLINED_" + re.sub(r"\W", "_", str(path))
    output = [f"#ifndef {guard}\n", f"#define {guard}\n", f'#line 1 "{path}"\n']
    parents = (*parents, path)
    depth = 0
    for number, line in enumerate((base / path).read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include is None:
            depth += bool(_OPENS.match(line)) - bool(_CLOSES.match(line))
            # The guard does the work of #pragma once, which NVRTC warns about in a main file.
            output.append("\n" if _PRAGMA_ONCE.match(line) else line + "\n")
            continue
        target = _locate(base, path, include[1], f" (asked for by {path}:{number})")
        if target in seen or target in parents:
            output.append("\n")
            continue
        output.extend(_inline(base, target, seen, parents, conditional or depth > 0))
        output.append(f'#line {number + 1} "{path}"\n')
    output.append("#endif\n")
    return output

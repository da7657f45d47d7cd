"""The kernels in the device sources, read from their text. Works without torch."""

from __future__ import annotations

import re

from a8multi.loader import sources

_KERNEL = re.compile(r'extern "C" __global__[^;{]*?\b(a8_\w+)\(')


def kernels_of(text: str) -> set[str]:
    """Names of the kernels that a source text defines; each is ``extern "C"``, so that CuPy finds it."""
    found = _KERNEL.findall(text)
    assert len(found) == len(set(found)) == len(re.findall(r"\b__global__\b", text)), found
    return set(found)


def entry_files() -> list[str]:
    """Source files with kernels that no other includes, each compiled on its own by CuPy, as paths for ``flatten``."""
    root = sources.root()
    names = [path.relative_to(root).as_posix() for path in sorted((root / "cuda" / "kernels").glob("*.cuh"))]
    own = "\n".join((root / name).read_text(encoding="utf-8") for name in names)
    included = {f"cuda/kernels/{name}" for name in re.findall(r'#[ \t]*include "([^"/]+)"', own)}
    return [name for name in names if name not in included and kernels_of(sources.flatten(name))]

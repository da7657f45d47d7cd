"""Finds, checks and binds the native libraries; probes the hardware. Standard library only: works without torch.

``load("cpu")`` or ``load("cuda")`` gives a ``Library``; ``python -m a8multi.loader`` prints what this machine has.
Importing this package opens no library and asks no driver.
"""

from __future__ import annotations

from .library import Library, LibraryInfo, load
from .search import Candidate, candidates
from .sources import flatten, geometry

__all__ = ["Candidate", "Library", "LibraryInfo", "candidates", "flatten", "geometry", "load"]

"""Every ``A8MULTI_*`` environment variable, in one table. Standard library only.

The variables are read when they are needed, never at import, so that a program may set them itself. An empty value
counts as unset. A value that is not valid raises ``SettingError``, which lists the valid ones; none is ever ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import SettingError

if TYPE_CHECKING:
    import logging

BACKEND_NAMES = ("cuda", "cupy", "cpu", "torch")
ISA_NAMES = ("auto", "baseline", "avx2", "avx512", "neon")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, what it is when unset, what it may be, and what it does."""

    name: str
    default: str
    values: str
    meaning: str


@dataclass(frozen=True)
class SettingReport:
    """A ``Setting`` with its present value (None: unset) and what is wrong with that value, if anything."""

    name: str
    default: str
    values: str
    meaning: str
    value: str | None
    error: str | None


def _either(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


BACKEND = Setting(
    "A8MULTI_BACKEND",
    "auto",
    f"auto, one of {_either(BACKEND_NAMES)}, or a comma list of these in order of preference",
    "Backend that runs the optimizers. Anything but auto is forced: it raises where it cannot run.",
)
CPU_ISA = Setting(
    "A8MULTI_CPU_ISA",
    "auto",
    _either(ISA_NAMES),
    "Instruction-set variant of the CPU library. The results do not depend on it.",
)
LIBRARY_PATH = Setting(
    "A8MULTI_LIBRARY_PATH",
    "",
    f"a list of directories or library files, separated by {os.pathsep!r}",
    "Where to look for the native libraries before the installed package. What it names must load.",
)
LOG = Setting(
    "A8MULTI_LOG",
    "",
    _either(LOG_LEVELS),
    "Level of the 'a8multi' logger, which then also prints to stderr if no handler is configured.",
)
REQUIRE_BACKEND = Setting(
    "A8MULTI_REQUIRE_BACKEND",
    "",
    f"a comma list of {_either(BACKEND_NAMES)}",
    "Tests only: backends whose tests must run; where they would be skipped, they fail.",
)

SETTINGS = (BACKEND, CPU_ISA, LIBRARY_PATH, LOG, REQUIRE_BACKEND)

_DECIDING = [setting.name for setting in (BACKEND, CPU_ISA, LIBRARY_PATH)]  # which backend runs
_DECIDING_KEYS = [os.environ.encodekey(name) for name in _DECIDING]


def _text(setting: Setting) -> str:
    return os.environ.get(setting.name, "").strip() or setting.default


def _one_of(setting: Setting, names: Sequence[str], value: str) -> str:
    for name in names:
        if value.lower() == name.lower():
            return name
    raise SettingError(setting.name, os.environ.get(setting.name, ""), setting.values)


def _names(setting: Setting, text: str) -> tuple[str, ...]:
    """The comma list without repetitions, in order."""
    return tuple(dict.fromkeys(_one_of(setting, BACKEND_NAMES, item.strip()) for item in text.split(",")))


def backend() -> tuple[str, ...] | None:
    """Backends that ``A8MULTI_BACKEND`` forces, in order of preference; None for automatic choice.

    Raises:
        SettingError: for a name that is not known, an empty item, or ``auto`` inside a list.
    """
    text = _text(BACKEND)
    return None if text.lower() == "auto" else _names(BACKEND, text)


def deciding() -> tuple[object, ...]:
    """Something that differs when a variable does on which the choice of a backend depends. Cheap: every step asks."""
    # os.environ decodes what it holds, and raises and catches an error for what is unset: ten times the time.
    held = getattr(os.environ, "_data", None)
    return tuple(map(os.environ.get, _DECIDING) if held is None else map(held.get, _DECIDING_KEYS))


def cpu_isa() -> str:
    """The variant that ``A8MULTI_CPU_ISA`` asks for, one of ``ISA_NAMES``.

    Raises:
        SettingError: for any other value.
    """
    return _one_of(CPU_ISA, ISA_NAMES, _text(CPU_ISA))


def library_path() -> tuple[str, ...]:
    """Entries of ``A8MULTI_LIBRARY_PATH`` in order, ``~`` expanded. Whether they exist is the loader's business."""
    entries = (entry.strip() for entry in _text(LIBRARY_PATH).split(os.pathsep))
    # Not Path.expanduser: it raises for an unknown user, before the loader can say which entry is at fault.
    return tuple(os.path.expanduser(entry) for entry in entries if entry)  # noqa: PTH111


def log_level() -> str | None:
    """The level that ``A8MULTI_LOG`` asks for, one of ``LOG_LEVELS``, or None when it is unset.

    Raises:
        SettingError: for any other value.
    """
    text = _text(LOG)
    return _one_of(LOG, LOG_LEVELS, text) if text else None


def require_backend() -> tuple[str, ...]:
    """Backends whose tests must not be skipped, from ``A8MULTI_REQUIRE_BACKEND``.

    Raises:
        SettingError: for a name that is not known.
    """
    text = _text(REQUIRE_BACKEND)
    return _names(REQUIRE_BACKEND, text) if text else ()


def logger() -> logging.Logger:
    """The ``a8multi`` logger at the level of ``A8MULTI_LOG``. Unset, the program's own configuration stands.

    Raises:
        SettingError: as ``log_level``.
    """
    import logging

    result = logging.getLogger("a8multi")
    level = log_level()
    if level is not None:
        result.setLevel(level)
        # A program that configured logging gets the records through its own handlers; another would double them.
        if not result.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
            result.addHandler(handler)
    return result


def describe() -> tuple[SettingReport, ...]:
    """Every variable with its default, present value and meaning, for reports. Never raises: see ``error``."""
    checks = {BACKEND: backend, CPU_ISA: cpu_isa, LIBRARY_PATH: library_path, LOG: log_level}
    checks[REQUIRE_BACKEND] = require_backend
    rows = []
    for setting in SETTINGS:
        error = None
        try:
            checks[setting]()
        except SettingError as problem:
            error = str(problem)
        value = os.environ.get(setting.name)
        rows.append(SettingReport(setting.name, setting.default, setting.values, setting.meaning, value, error))
    return tuple(rows)

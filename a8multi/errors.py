"""Every exception of a8multi. Standard library only, so that the loader can raise them without torch.

Each message says what was tried, where, why it failed and what to do next; the attributes hold the same facts for code.
All of them can be pickled, so that a worker process can hand one to its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "A8MultiError",
    "Attempt",
    "BackendUnavailable",
    "LibraryError",
    "LibraryIncompatible",
    "LibraryNotFound",
    "NativeError",
    "SettingError",
    "StateFormatError",
]


class A8MultiError(RuntimeError):
    """Base of every exception that a8multi defines. Catch it to handle any of them."""


class BackendUnavailable(A8MultiError):  # noqa: N818  (reads as the state it reports)
    """A backend that was asked for by name cannot run here, or cannot run this operation.

    Raised by the registry when the first optimizer or function needs a forced backend, and by a loaded library that
    lacks the entry. What to do: read the reason in the message, then choose another backend with ``A8MULTI_BACKEND``
    or ``a8multi.use_backend``; ``python -m a8multi.loader`` shows what this machine offers.
    """


class Attempt(NamedTuple):
    """One place where the loader looked for a native library, and what came of it."""

    path: str
    outcome: str


class LibraryError(A8MultiError):
    """A native library could not be loaded. Raised by ``a8multi.loader.load``.

    Raised as such when the file is there but cannot be read or opened; see the subclasses for the other cases.

    Attributes:
        path: the file (or directory) at fault.
        reason: why, in the operating system's own words where it gave some.
        hint: what to do next.
        attempts: every place where the loader looked, in order.
    """

    def __init__(self, path: str, reason: str, hint: str = "", attempts: Sequence[Attempt] = ()) -> None:
        super().__init__(path, reason, hint, tuple(attempts))
        self.path = path
        self.reason = reason
        self.hint = hint
        self.attempts = tuple(attempts)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.reason}"]
        if self.attempts:
            lines.append("Tried, in order:")
            lines.extend(f"  {path}: {outcome}" for path, outcome in self.attempts)
        if self.hint:
            lines.append(f"What to do: {self.hint}")
        return "\n".join(lines)


class LibraryNotFound(LibraryError):  # noqa: N818
    """No file of the library is at any place that is searched, or a source that belongs to it is missing.

    The ordinary case for the CUDA library of a package that was built without nvcc.
    What to do: reinstall, or point ``A8MULTI_LIBRARY_PATH`` at the directory that holds the library.
    """


class LibraryIncompatible(LibraryError):  # noqa: N818
    """The file is a library, but not one that this version of the package can drive.

    A symbol is missing, ``a8_get_info`` failed, or the ABI version, the size of a struct or the geometry differs.
    What to do: install package and libraries from one build; a stale ``A8MULTI_LIBRARY_PATH`` is the usual cause.
    """


class NativeError(A8MultiError):
    """An entry of a native library returned an error status. Raised by ``Library.check`` and ``Library.call``.

    Attributes:
        status: the ``a8_status`` that was returned, a ``loader.structs.Status`` where it is a known one.
        message: the text of ``a8_last_error``, which names the tensor's index where one is at fault.
        entry: the C function, or an empty string.
    """

    def __init__(self, status: int, message: str, entry: str = "") -> None:
        super().__init__(status, message, entry)
        self.status = status
        self.message = message
        self.entry = entry

    def __str__(self) -> str:
        name = getattr(self.status, "name", None)
        return f"{self.entry or 'native call'} failed with status {int(self.status)}" + (
            f" ({name}): {self.message}" if name else f": {self.message}"
        )


class StateFormatError(A8MultiError, ValueError):
    """An optimizer state, or an array of codes, is not in the format that the caller declared.

    Raised when a state of one format is loaded into an optimizer of another, or when shapes or dtypes do not fit.
    Nothing has been written by then. What to do: build the optimizer with the options it was saved with.
    """


class SettingError(A8MultiError, ValueError):
    """An ``A8MULTI_*`` environment variable has a value that is not valid. Raised by ``a8multi.settings``.

    Attributes:
        name: the variable.
        value: what it was set to.
        expected: what would have been valid.
    """

    def __init__(self, name: str, value: str, expected: str) -> None:
        super().__init__(name, value, expected)
        self.name = name
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.name}={self.value!r} is not valid: expected {self.expected}. Correct the variable, or unset it."

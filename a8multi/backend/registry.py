"""Which backend runs an operation on a device: probe, select, explain.

One row of ``BACKENDS`` is one backend: its name, the devices it serves and the class that runs it. Nothing is probed
before the first operation needs it. Automatic choice falls from one backend to the next and says so once, with the
reason; a forced choice that cannot run raises.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from a8multi import settings
from a8multi.errors import A8MultiError, BackendUnavailable, LibraryError, LibraryNotFound, SettingError

from . import devices
from .base import Backend, BackendReport


@dataclass(frozen=True)
class _Entry:
    """A row of the registry. devices: types it serves, empty for all; arguments: of the class."""

    name: str
    devices: tuple[str, ...]
    module: str
    kind: str
    arguments: tuple[str, ...] = ()


# In the order of automatic choice. A new backend is one module and one row.
BACKENDS = (
    _Entry("cuda", ("cuda",), "a8multi.backend.native", "NativeBackend", ("cuda",)),
    _Entry("cupy", ("cuda",), "a8multi.backend.cupy", "CupyBackend"),
    _Entry("cpu", ("cpu",), "a8multi.backend.native", "NativeBackend", ("cpu",)),
    _Entry("torch", (), "a8multi.backend.torch", "TorchBackend"),
)

# (name, where the libraries were looked for) -> the backend, or the error that says why there is none.
_loaded: dict[tuple[str, tuple[str, ...]], Any] = {}
_misfits: dict[tuple[Any, torch.device], str | None] = {}  # of a backend on a device
_chosen: dict[tuple[object, ...], Backend] = {}
_told: set[str] = set()
_lock = threading.Lock()
_override: ContextVar[tuple[str, ...] | None] = ContextVar("a8multi_backend", default=None)


def _load(entry: _Entry) -> Any:
    """The backend of a row; raises the reason, the same one until a setting changes, when it cannot run here."""
    # By the variable's value: a wrong one can be corrected, and a new one counts, in a process that goes on.
    key = entry.name, settings.library_path()
    with _lock:
        if key not in _loaded:
            try:
                module = importlib.import_module(entry.module)
                _loaded[key] = getattr(module, entry.kind)(*entry.arguments)
            except A8MultiError as error:
                _loaded[key] = error
        found = _loaded[key]
    if isinstance(found, A8MultiError):
        raise found
    return found


def _serves(entry: _Entry, device: torch.device) -> bool:
    # A ROCm build of torch calls its devices "cuda", but neither library nor NVRTC runs there.
    return not entry.devices or (device.type in entry.devices and not (device.type == "cuda" and torch.version.hip))


def _refusal(entry: _Entry, device: torch.device, op: str) -> str | None:
    """Why this backend cannot run ``op`` on ``device``; None when it can."""
    if not _serves(entry, device):
        return f"it serves {' and '.join(entry.devices)} tensors, not {device.type}"
    try:
        backend = _load(entry)
        report = backend.report()
    except SettingError:
        raise
    except LibraryError as error:
        # A library that the user named must load: another backend in its place would hide that it does not.
        if _user_named(error):
            raise
        return str(error)
    except A8MultiError as error:
        return str(error)
    if reason := _misfit(entry, backend, device):
        return reason
    return None if op in report.ops else f"it does not offer {op} (it offers {', '.join(report.ops)})"


def _user_named(error: LibraryError) -> bool:
    """Whether A8MULTI_LIBRARY_PATH names the file at fault, or the directory that holds it."""
    path = Path(error.path)
    # A directory need not hold every library: what is not found in it is no fault of the directory's.
    places = {path} if isinstance(error, LibraryNotFound) else {path, path.parent}
    return any(Path(entry).absolute() in places for entry in settings.library_path())


def _misfit(entry: _Entry, backend: Any, device: torch.device) -> str | None:
    """Why what the backend compiled cannot run on this device; None when it can, or compiles nothing for devices."""
    if device.type != "cuda" or not entry.devices:
        return None
    if device.index is None:  # whichever is current, another one the next time
        return devices.misfit(backend, device)
    key = backend, device
    if key not in _misfits:
        _misfits[key] = devices.misfit(backend, device)
    return _misfits[key]


def _forced() -> tuple[str, ...] | None:
    return _override.get() or settings.backend()


def backend_for(device: torch.device | str, op: str = "elementwise") -> Backend:
    """The backend that runs ``op`` on tensors of ``device`` now.

    Args:
        device: of the parameters.
        op: "codec", "elementwise" or "adafactor".
    Raises:
        BackendUnavailable: none of the backends that A8MULTI_BACKEND or ``use_backend`` names can; says why for each.
        SettingError: A8MULTI_BACKEND holds an unknown name.
    """
    # Every step asks, with a torch.device: an answer stands while nothing changes that it depends on.
    if not isinstance(device, torch.device):
        device = torch.device(device)
    key = (device, op, _override.get(), *settings.deciding())
    backend = _chosen.get(key)
    if backend is None:
        backend, refused = _choose(device, op)
        _tell(device, op, backend.name, refused)
        if device.type != "cuda" or device.index is not None:  # else whichever is current, another one the next time
            _chosen[key] = backend
    return backend


def _choose(device: torch.device, op: str) -> tuple[Backend, list[tuple[str, str]]]:
    """``backend_for``, and the backends (name, reason) that were asked before and refused."""
    forced = _forced()
    rows = [row for name in forced for row in BACKENDS if row.name == name] if forced else BACKENDS
    refused: list[tuple[str, str]] = []
    for row in rows:
        if forced is None and not _serves(row, device):
            continue
        reason = _refusal(row, device, op)
        if reason is None:
            backend: Backend = _load(row)
            if hasattr(backend, "check"):
                backend.check()
            return backend, refused
        refused.append((row.name, reason))
    tried = "\n".join(f"  {name}: {reason}" for name, reason in refused)
    raise BackendUnavailable(
        f"no backend can run {op} on {device} tensors. Tried, in order:\n{tried}\n"
        f"What to do: {'unset ' + settings.BACKEND.name + ' or leave use_backend()' if forced else 'report this'}, "
        f"or name another backend; a8multi.explain() shows what this machine offers."
    )


def _tell(device: torch.device, op: str, chosen: str, refused: list[tuple[str, str]]) -> None:
    """Log an automatic fallback once a process."""
    if not refused or _forced() is not None:
        return
    key = f"{device.type} {op} {chosen}"
    with _lock:
        if key in _told:
            return
        _told.add(key)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    settings.logger().warning("%s on %s tensors runs on the %r backend: %s", op, device.type, chosen, reasons)


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Force a backend, or several in order of preference, within a ``with`` block. Overrides A8MULTI_BACKEND.

    Args:
        names: of "cuda", "cupy", "cpu", "torch"; "auto" alone restores automatic choice unless the variable forces one.
    Raises:
        ValueError: for an unknown name; lists the valid ones. That a known one cannot run is raised by its first use.

    Example:
        >>> with a8multi.use_backend("torch"):
        ...     optimizer.step()
    """
    unknown = [name for name in names if name not in settings.BACKEND_NAMES]
    if names != ("auto",) and (unknown or not names):
        raise ValueError(f"unknown backend {unknown or names!r}: expected auto, {', '.join(settings.BACKEND_NAMES)}")
    token = _override.set(None if names == ("auto",) else names)
    try:
        yield
    finally:
        _override.reset(token)


def backends(device: torch.device | str | None = None) -> list[BackendReport]:
    """A report of every backend, whether it can run here or not.

    Args:
        device: the one to run on; None: any of this machine, so that a library that fits some of its CUDA devices
            counts as available, and its report names the others.
    """
    return [_report(row, None if device is None else torch.device(device)) for row in BACKENDS]


def _report(row: _Entry, device: torch.device | None) -> BackendReport:
    try:
        backend = _load(row)
        report: BackendReport = replace(backend.report(), devices=row.devices)
    except A8MultiError as error:
        return BackendReport(row.name, False, str(error), devices=row.devices)
    places = devices.cuda_devices() if device is None else (device,)
    reasons = [reason for place in places if (reason := _misfit(row, backend, place))]
    if reasons and len(reasons) == len(places):
        return replace(report, available=False, reason="\n".join(reasons))
    return replace(report, detail="; ".join([report.detail, *reasons]))


def explain() -> str:
    """``backends()`` as text, and which backend each device gets, with what the preferred ones lack."""
    lines = ["Backends, in order of automatic choice:"]
    for report in backends():
        state = "available" if report.available else "not available"
        facts = [report.version and f"version {report.version}", report.detail, report.path]
        lines.append(f"  {report.name:6} {state}: " + ", ".join(str(fact) for fact in facts if fact))
        lines.extend(f"         {line}" for line in report.reason.splitlines())
    try:
        forced = _forced()
        lines.append(f"Choice: {'forced to ' + ', '.join(forced) if forced else 'automatic'}")
    except SettingError as error:
        lines.append(f"Choice: none. {error}")
    for device in (torch.device("cpu"), *devices.cuda_devices()):
        for op in ("elementwise", "adafactor", "codec"):
            try:
                backend, refused = _choose(device, op)
                lines.append(f"  {op} on {device}: {backend.name}")
                lines.extend(f"    not {name}: {reason.partition(chr(10))[0]}" for name, reason in refused)
            except A8MultiError as error:
                lines.append(f"  {op} on {device}: none")
                lines.extend(f"    {line}" for line in str(error).splitlines())
    return "\n".join(lines)


def reset() -> None:
    """Forget what was probed, so that a library or a package that is new on this machine is seen. For notebooks."""
    with _lock:
        for memory in (_loaded, _misfits, _chosen, _told):
            memory.clear()

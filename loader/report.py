"""What ``python -m a8multi.loader`` says: the libraries, the hardware and the settings, as data and as text."""

from __future__ import annotations

import dataclasses
import platform
import sys
from typing import Any

from a8multi import settings
from a8multi.errors import A8MultiError, LibraryError

from . import compatibility, library, probe, search
from .structs import Op


def collect() -> dict[str, Any]:
    """Everything the loader knows about this machine, as JSON-compatible data. Never raises.

    Keys: ``ok`` (the CPU library loads), ``python``, ``system``, ``libraries`` (by backend: ``loaded``, ``path``,
    ``info``, ``reason``, ``attempts``), ``cpu`` and ``cuda`` (``probe.CpuReport``, ``probe.CudaReport``; each of its
    devices also has ``library_reason``, why the CUDA library that loaded cannot run there, or None), ``settings``.
    """
    libraries = {backend: _library(backend) for backend in search.LIBRARIES}
    return {
        "ok": libraries["cpu"]["loaded"],
        "python": f"{sys.implementation.name} {platform.python_version()}",
        "system": platform.platform(),
        "libraries": libraries,
        "cpu": dataclasses.asdict(probe.cpu()),
        "cuda": _cuda(libraries["cuda"]),
        "settings": [dataclasses.asdict(row) for row in settings.describe()],
    }


def _library(backend: str) -> dict[str, Any]:
    row: dict[str, Any] = {"loaded": False, "path": None, "info": None, "reason": None, "attempts": []}
    try:
        found = library.load(backend)
    except A8MultiError as error:
        row["reason"] = str(error)
        if isinstance(error, LibraryError):
            row["attempts"] = [attempt._asdict() for attempt in error.attempts]
        return row
    info = dataclasses.asdict(found.info)
    info["ops"] = [op.name for op in Op if op & found.info.ops]
    row.update(loaded=True, path=str(found.path), info=info, attempts=[a._asdict() for a in found.attempts])
    return row


def _cuda(library_row: dict[str, Any]) -> dict[str, Any]:
    cuda = dataclasses.asdict(probe.cuda())
    info = library_row["info"]
    for device in cuda["devices"]:
        device["library_reason"] = info and compatibility.misfit(
            library_row["path"],
            device["name"],
            toolkit=info["toolkit"],
            driver=cuda["driver_version"],
            architectures=info["architectures"],
            capability=device["compute_capability"],
        )
    return cuda


def text(report: dict[str, Any]) -> str:
    """``collect()`` for people."""
    lines = [f"a8multi loader: {report['python']}, {report['system']}", ""]
    for backend, row in report["libraries"].items():
        lines.extend(_library_lines(backend, row))
    cpu = report["cpu"]
    lines.append(f"processor: {cpu['name']} ({cpu['architecture']}, {cpu['processor_count']} logical)")
    if cpu["reason"] is None:
        lines.append(f"  usable {', '.join(cpu['isa_usable'])}; best {cpu['isa_best']}")
    else:
        lines.append("  instruction sets not known: the CPU library, which probes them, did not load")
    cuda = report["cuda"]
    version = f"CUDA {probe.version_text(cuda['driver_version'])}" if cuda["driver_version"] else "no version"
    lines.append(f"CUDA driver: {cuda['driver_library']}, {version}")
    if cuda["reason"] is not None:
        lines.append(f"  not usable: {cuda['reason']}")
    for device in cuda["devices"]:
        major, minor = device["compute_capability"]
        memory = device["total_memory_bytes"] / 2**30
        lines.append(f"  device {device['index']}: {device['name']}, sm_{major}{minor}, {memory:.1f} GiB")
        if device["library_reason"]:
            lines.append(f"    the CUDA library cannot run here: {device['library_reason']}")
    lines.append("settings:")
    for row in report["settings"]:
        value = "unset" if row["value"] is None else repr(row["value"])
        lines.append(f"  {row['name']}: {value} (default {row['default'] or 'none'}; {row['values']})")
        if row["error"]:
            lines.append(f"    {row['error']}")
    if not report["ok"]:
        lines.extend(["", "The CPU library did not load, so the vectorised CPU backend is not available: see above."])
    return "\n".join(lines)


def _library_lines(backend: str, row: dict[str, Any]) -> list[str]:
    if not row["loaded"]:
        return [f"{backend} library: not loaded", *(f"  {line}" for line in row["reason"].splitlines())]
    info = row["info"]
    lines = [f"{backend} library: {info['version']} at {row['path']}", f"  operations: {', '.join(info['ops'])}"]
    if info["isa_built"]:
        lines.append(f"  instruction sets built: {', '.join(info['isa_built'])}")
    if info["architectures"]:
        lines.append(f"  architectures: {info['architectures']} (toolkit {probe.version_text(info['toolkit'])})")
    return lines

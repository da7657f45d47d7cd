"""What this machine can run: processor features and CUDA devices, found without torch.

Both probes return a report and never raise; ``reason`` says why something cannot be used. The processor is probed by
compiled code (native/cpu/probe.cpp: CPUID and XGETBV), because only it sees what the operating system saves; CUDA is
asked through the driver's own library. Neither creates a CUDA context nor allocates device memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a8multi.errors import A8MultiError

from . import library

# As the driver writes versions: 1000 * major + 10 * minor. Nothing is tested on a driver older than CUDA 12.0.
MINIMUM_DRIVER = 12000

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True)
class CpuReport:
    """The processor. ``isa_*`` are names as in ``A8MULTI_CPU_ISA``; empty and None with a ``reason`` when not known."""

    architecture: str
    system: str
    name: str
    processor_count: int
    isa_built: tuple[str, ...] = ()
    isa_usable: tuple[str, ...] = ()
    isa_best: str | None = None
    library: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class CudaDevice:
    """One GPU as the driver lists it, before ``torch`` or anything else may reorder it."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_memory_bytes: int


@dataclass(frozen=True)
class CudaReport:
    """The CUDA driver and its devices. ``driver_version`` is 1000 * major + 10 * minor, 0 when there is none."""

    available: bool
    driver_library: str
    driver_version: int = 0
    devices: tuple[CudaDevice, ...] = ()
    reason: str | None = None


class _ProbeError(Exception):
    """Ends the probe of CUDA with a reason."""


def version_text(version: int) -> str:
    """``12080`` as ``"12.8"``."""
    return f"{version // 1000}.{version % 1000 // 10}"


def cpu() -> CpuReport:
    """Probe the processor through the CPU library. Never raises: without the library, ``reason`` says why."""
    facts = (platform.machine(), f"{platform.system()} {platform.release()}", _processor_name(), os.cpu_count() or 1)
    try:
        found = library.load("cpu")
    except A8MultiError as error:
        return CpuReport(*facts, reason=str(error))
    info = found.info
    return CpuReport(*facts, info.isa_built, info.isa_usable, info.isa_best, str(found.path))


def _processor_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    return value.strip()
    except OSError:
        pass  # not Linux
    return platform.machine()


def driver_name(platform_name: str = sys.platform) -> str:
    """File name of the CUDA driver's library, which the system's own search finds."""
    return "nvcuda.dll" if platform_name == "win32" else "libcuda.so.1"


def cuda(driver: str | None = None, minimum_driver: int = MINIMUM_DRIVER) -> CudaReport:
    """Probe the CUDA driver and its devices. Never raises and creates no context.

    It calls ``cuInit``: a process that forks afterwards cannot use CUDA in the child (as after ``torch.cuda.init``).

    Args:
        driver: library to ask instead of the system's.
        minimum_driver: oldest driver version to accept, 1000 * major + 10 * minor.
    """
    name = driver or driver_name()
    version = 0
    try:
        handle = _open_driver(name)
        version = _version(handle)
        if version < minimum_driver:
            raise _ProbeError(
                f"the driver supports CUDA {version_text(version)}, but {version_text(minimum_driver)} is needed: "
                "install a newer NVIDIA driver"
            )
        _call(handle, "cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        _call(handle, "cuDeviceGetCount", ctypes.byref(count))
        if count.value <= 0:
            raise _ProbeError("the driver reports no device: check CUDA_VISIBLE_DEVICES and nvidia-smi")
        devices = tuple(_device(handle, index) for index in range(count.value))
    except _ProbeError as error:
        return CudaReport(False, name, version, reason=str(error))
    return CudaReport(True, name, version, devices)


def driver_version(driver: str | None = None) -> int:
    """Newest CUDA version that the driver supports, 1000 * major + 10 * minor; 0 when it cannot be asked. Never raises.

    Unlike ``cuda`` it does not initialise the driver: the process may still fork.

    Args:
        driver: library to ask instead of the system's.
    """
    try:
        return _version(_open_driver(driver or driver_name()))
    except _ProbeError:
        return 0


def _open_driver(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise _ProbeError(
            f"the CUDA driver's library cannot be opened: {error}. Without an NVIDIA GPU this is to be expected; with "
            "one, install its driver"
        ) from error


def _version(handle: ctypes.CDLL) -> int:
    value = ctypes.c_int()
    _call(handle, "cuDriverGetVersion", ctypes.byref(value))
    return value.value


def _symbol(handle: ctypes.CDLL, name: str) -> Any:
    try:
        return getattr(handle, name)
    except AttributeError:
        raise _ProbeError(
            f"the CUDA driver's library has no symbol {name}: it is damaged, or not a CUDA driver"
        ) from None


def _call(handle: ctypes.CDLL, name: str, *args: Any) -> None:
    status = _symbol(handle, name)(*args)
    if status != 0:
        raise _ProbeError(f"{name} failed with CUDA error {status}{_error_text(handle, status)}")


def _error_text(handle: ctypes.CDLL, status: int) -> str:
    """The driver's words for an error, in brackets; nothing when it has none."""
    words = []
    for name in ("cuGetErrorName", "cuGetErrorString"):
        text = ctypes.c_char_p()
        function = getattr(handle, name, None)
        if function is not None and function(status, ctypes.byref(text)) == 0 and text.value:
            words.append(text.value.decode("utf-8", "replace"))
    return f" ({': '.join(words)})" if words else ""


def _device(handle: ctypes.CDLL, index: int) -> CudaDevice:
    device = ctypes.c_int()
    _call(handle, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    name = ctypes.create_string_buffer(256)
    _call(handle, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        _call(handle, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        capability.append(value.value)
    memory = ctypes.c_size_t()
    _call(handle, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return CudaDevice(index, name.value.decode("utf-8", "replace"), (capability[0], capability[1]), memory.value)

"""Whether what a backend compiled fits a CUDA device: the library's architectures and toolkit, or CuPy's NVRTC.

What this machine has is asked in three small functions, so that tests can put other devices and drivers in its place.
"""

from __future__ import annotations

from typing import Any

import torch

from a8multi.loader import compatibility, probe


def cuda_devices() -> tuple[torch.device, ...]:
    """Every CUDA device that torch can use, in torch's order."""
    # A ROCm build of torch calls its devices "cuda" too; neither the library nor NVRTC runs there.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", index) for index in range(count))


def describe(device: torch.device) -> tuple[str, tuple[int, int]]:
    """Name and compute capability of a CUDA device."""
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def driver_version() -> int:
    """CUDA version that the driver supports, 1000 * major + 10 * minor; 0 when it cannot be asked."""
    return probe.driver_version()


def misfit(backend: Any, device: torch.device) -> str | None:
    """Why the code of ``backend`` ("cuda", "cupy") cannot run on a CUDA device, and what to do; None when it can."""
    name, capability = describe(device)
    where = f"{device} ({name})"
    if backend.name == "cupy":
        major, minor = backend.nvrtc_version
        what = f"CuPy {backend.report().version}"
        return compatibility.misfit(what, where, toolkit=1000 * major + 10 * minor, driver=driver_version())
    info = backend.library.info
    return compatibility.misfit(
        str(backend.library.path),
        where,
        toolkit=info.toolkit,
        driver=driver_version(),
        architectures=info.architectures,
        capability=capability,
    )

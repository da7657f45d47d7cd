"""Can code that was compiled for CUDA run on a device? Its architectures and toolkit against device and driver.

Receives names and numbers, returns the reason why not, or None. Asks no device: ``probe`` and torch do that.

Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility"; CUDA Compatibility, "Minor Version
Compatibility". Machine code (sm_80) runs on devices of the same major and an equal or higher minor compute capability,
on every driver of the toolkit's major version or newer. PTX (compute_80) runs on every device from that one on, but
only a driver that knows the toolkit's PTX can compile it. A suffix narrows both: f to the family, which is the same
major here, a to the very device.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from a8multi import settings

from .probe import version_text

_IMAGE = re.compile(r"\b(sm|compute)_(\d+)(\d)([af]?)\b")

Capability = tuple[int, int]


class _Image(NamedTuple):
    """One compilation that a library holds. ptx: to be compiled by the driver; else machine code."""

    ptx: bool
    capability: Capability
    suffix: str

    def runs_on(self, device: Capability) -> bool:
        if self.suffix == "a":
            return device == self.capability
        if self.ptx and not self.suffix:
            return device >= self.capability
        return device[0] == self.capability[0] and device[1] >= self.capability[1]


def misfit(
    what: str, device: str, *, toolkit: int, driver: int, architectures: str = "", capability: Capability | None = None
) -> str | None:
    """Why the CUDA code of ``what`` cannot run on ``device``; None when it can, or when too little is known to say no.

    Args:
        what: the code, for the message: the library's path, or a package that compiles at run time.
        device: for the message, such as ``"cuda:0 (NVIDIA H200)"``.
        toolkit: CUDA version that compiled it, 1000 * major + 10 * minor; 0: not known.
        driver: CUDA version that the driver supports, likewise; 0: not known.
        architectures: what it was compiled for, ``"sm_80 sm_90 compute_90"``; without any such name it is for
            whatever device there is.
        capability: compute capability of the device, ``(9, 0)``; None: not known.
    """
    if toolkit and driver and driver // 1000 < toolkit // 1000:
        return (
            f"{what} was built by the CUDA {version_text(toolkit)} toolkit, which needs a driver for CUDA "
            f"{toolkit // 1000}.0 or newer, but this driver supports CUDA {version_text(driver)}: install a newer "
            f"NVIDIA driver, or a build by a CUDA {driver // 1000} toolkit, or use {settings.BACKEND.name}=torch"
        )
    images = [
        _Image(kind == "compute", (int(major), int(minor)), suffix)
        for kind, major, minor, suffix in _IMAGE.findall(architectures)
    ]
    if not images or capability is None:
        return None
    fitting = [image for image in images if image.runs_on(capability)]
    number = f"{capability[0]}{capability[1]}"
    rebuild = (
        f"rebuild it for this device (pip install . --config-settings=cmake.define.A8_CUDA_ARCHITECTURES={number} in a "
        f"checkout), or use {settings.BACKEND.name}=cupy, which compiles for the device it finds, or torch"
    )
    if not fitting:
        return (
            f"{what} was built for {architectures}, but {device} has compute capability "
            f"{capability[0]}.{capability[1]} (sm_{number}): {rebuild}"
        )
    if all(image.ptx for image in fitting) and toolkit and driver and driver < toolkit:
        return (
            f"{what} was built for {architectures}: {device} (sm_{number}) would need its PTX of CUDA "
            f"{version_text(toolkit)}, but this driver supports CUDA {version_text(driver)}: install a newer NVIDIA "
            f"driver, or {rebuild}"
        )
    return None

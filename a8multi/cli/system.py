"""What the reports say about the machine: versions of what is installed, and the devices torch can use."""

from __future__ import annotations

import importlib.metadata
import platform

from a8multi.cli.candidates import PEER_PACKAGES
from a8multi.loader import probe


def versions() -> dict[str, str | None]:
    """Versions by component; None for what is not there."""
    import numpy
    import torch

    import a8multi

    driver = probe.cuda()
    found: dict[str, str | None] = {
        "a8multi": a8multi.__version__,
        "torch": torch.__version__,
        "torch built with CUDA": torch.version.cuda,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": probe.cpu().name,
        "cuda driver supports": probe.version_text(driver.driver_version) if driver.driver_version else None,
    }
    return found | {package: _installed_version(package) for package in ("cupy", *PEER_PACKAGES)}


def _installed_version(package: str) -> str | None:
    """The version of the distribution that provides an import name: CuPy's is cupy-cuda13x, for example."""
    for distribution in importlib.metadata.packages_distributions().get(package, ()):
        return importlib.metadata.version(distribution)
    return None


def devices() -> list[tuple[str, str]]:
    """Every device that torch can use here: (name for torch.device, what it is)."""
    import torch

    found = [("cpu", f"{probe.cpu().name}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        found += [(f"cuda:{index}", torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found += [(f"xpu:{index}", torch.xpu.get_device_name(index)) for index in range(torch.xpu.device_count())]
    return found

"""What all tests share: one fixture over every backend and instruction set that this machine can run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from a8multi import settings
from a8multi.errors import BackendUnavailable

_ISAS = ("neon",) if platform.machine().lower() in {"arm64", "aarch64"} else ("baseline", "avx2", "avx512")


def _cases() -> list[object]:
    """All of them, or the one that the environment forces: tox runs the suite once for each."""
    isa = settings.cpu_isa()
    if settings.backend() == ("torch",):
        return ["torch"]
    if isa != "auto":
        return [f"cpu-{isa}"]
    return [
        "torch",
        *(f"cpu-{isa}" for isa in _ISAS),
        *(pytest.param(n, marks=pytest.mark.gpu) for n in ("cuda", "cupy")),
    ]


@dataclass(frozen=True)
class BackendCase:
    """The backend that the ``backend`` fixture has forced.

    Attributes:
        name: "torch", "cpu", "cuda" or "cupy".
        isa: instruction set of the CPU library, else None.
        device: type of the device to put tensors on.
    """

    name: str
    isa: str | None
    device: str

    def assert_ran(self) -> None:
        """Fail unless the last operation really ran on the forced instruction set."""
        from a8multi.backend.registry import backend_for

        if self.isa is not None:
            assert backend_for(self.device, "codec").isa_ran == self.isa  # type: ignore[attr-defined]


@pytest.fixture(params=_cases())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendCase]:
    """Forces each backend in turn, the CPU library once for each instruction set.

    One that cannot run is skipped with its reason; named in A8MULTI_REQUIRE_BACKEND, it fails.
    """
    # Not at the top: the loader's tests run where torch is not installed.
    from a8multi.backend.registry import backend_for, use_backend

    name, _, isa = request.param.partition("-")
    case = BackendCase(name, isa or None, "cuda" if name in {"cuda", "cupy"} else "cpu")
    monkeypatch.delenv(settings.CPU_ISA.name, raising=False)
    with use_backend(name):
        try:
            _require_device(case.device)
            backend_for(case.device, "codec")
        except BackendUnavailable as error:
            if name in settings.require_backend():
                pytest.fail(f"{settings.REQUIRE_BACKEND.name} names {name}, which cannot run: {error}")
            pytest.skip(f"{name}: {error}")
        if case.isa is not None:
            monkeypatch.setenv(settings.CPU_ISA.name, case.isa)
            try:
                backend_for(case.device, "codec")
            except BackendUnavailable as error:
                pytest.skip(f"{request.param}: {error}")
        yield case


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch sees no CUDA device")

"""CUDA tensors where the compiled library cannot run: cupy, then torch, with the reason wherever one would look.

No GPU is needed: the libraries are stubs that the tests compile, and one fixture puts devices, their driver and CuPy in
the place of this machine's.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import a8multi
from a8multi.backend import cupy as cupy_backend
from a8multi.backend import devices, native, registry
from a8multi.cli import main
from a8multi.cli.info import why
from a8multi.errors import LibraryError, LibraryNotFound
from a8multi.loader import library, search
from a8multi.optim import reader
from a8multi.plan import step_plan

Build = Callable[..., Path]
Use = Callable[..., None]
CUDA = search.library_name("cuda")
CUDA_STUB = 'STUB_BACKEND="cuda"'


class Fault(NamedTuple):
    """What is wrong with the CUDA library. defines: of the stub; None: there is no stub but ``text``, or nothing."""

    words: tuple[str, ...]
    defines: tuple[str, ...] | None = None
    text: str | None = None
    capability: tuple[int, int] = (9, 0)
    driver: int = 13000


FAULTS = {
    "missing": Fault(("no such file", "A8_CUDA=ON")),
    "not an ELF": Fault(("cannot be opened as a library",), text="this is text"),
    "wrong ABI": Fault(("the ABI version is 7 in this library",), ("STUB_ABI_VERSION=7",)),
    "missing symbol": Fault(("symbol a8_elementwise is missing",), ("STUB_NO_ELEMENTWISE",)),
    "other architectures": Fault(
        ("built for sm_75 sm_90", "compute capability 8.6", "A8_CUDA_ARCHITECTURES=86"), (), capability=(8, 6)
    ),
    "PTX that the driver does not know": Fault(
        ("PTX of CUDA 13.1", "supports CUDA 13.0", "newer NVIDIA driver"),
        ('STUB_ARCHITECTURES="sm_75 compute_80"', "STUB_TOOLKIT=13010"),
    ),
    "driver too old": Fault(
        ("CUDA 13.0 toolkit", "supports CUDA 12.4", "newer NVIDIA driver"), ("STUB_TOOLKIT=13000",), driver=12040
    ),
}


# What CuPy raises when the toolkit's libraries are not installed.
NO_NVRTC = RuntimeError("CuPy failed to load libnvrtc.so.13: cannot open shared object file")


@pytest.fixture(autouse=True)
def _fresh(clean_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.reset()
    # What it found in a package of these tests is none of later ones'.
    monkeypatch.setattr(reader, "_found", {}, raising=False)
    yield
    registry.reset()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(*capabilities, driver=, nvrtc=) puts such CUDA devices here.

    nvrtc: the version of CuPy's compiler, or why that one does not load; None: no CuPy.
    """

    def pretend(
        *capabilities: tuple[int, int], driver: int = 13000, nvrtc: tuple[int, int] | Exception | None = None
    ) -> None:
        def version() -> tuple[int, int] | None:
            if isinstance(nvrtc, Exception):
                raise nvrtc
            return nvrtc

        found = tuple(torch.device("cuda", index) for index in range(len(capabilities)))
        monkeypatch.setattr(devices, "cuda_devices", lambda: found)
        monkeypatch.setattr(devices, "describe", lambda device: ("Stub GPU", capabilities[device.index]))
        monkeypatch.setattr(devices, "driver_version", lambda: driver)
        for module in (native, cupy_backend):
            monkeypatch.setattr(module, "require_cuda", lambda: None)
        module = ModuleType("cupy")
        module.__version__ = "99.0"
        module.cuda = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version))
        monkeypatch.setitem(sys.modules, "cupy", None if nvrtc is None else module)

    return pretend


@pytest.fixture
def install(package: Use, build: Build, tmp_path: Path) -> Callable[..., Path]:
    """install(fault) makes a package whose CUDA library has it, beside the real CPU library. Returns the library."""
    cpu = library.load("cpu").path

    def make(fault: Fault) -> Path:
        folder = tmp_path / "package" / "lib"
        shutil.copytree(Path(__file__).parents[2] / "native" / "include", folder / "src" / "include")
        shutil.copy(cpu, folder)
        if fault.defines is not None:
            shutil.copy(build("native", CUDA_STUB, *fault.defines, name=CUDA), folder)
        elif fault.text is not None:
            (folder / CUDA).write_text(fault.text, encoding="utf-8")
        package(folder.parent)
        return folder / CUDA

    return make


def assert_reason(text: str, path: Path, fault: Fault) -> None:
    for word in (str(path), *fault.words):
        assert word in text


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("nvrtc", [(12, 4), None, NO_NVRTC], ids=["cupy", "no cupy", "no nvrtc"])
def test_automatic_choice_falls_back_and_says_why(
    name: str,
    nvrtc: tuple[int, int] | Exception | None,
    machine: Callable[..., None],
    install: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault = FAULTS[name]
    machine(fault.capability, driver=fault.driver, nvrtc=nvrtc)
    path = install(fault)
    expected = "cupy" if isinstance(nvrtc, tuple) else "torch"
    with caplog.at_level(logging.WARNING, "a8multi"):
        for _ in range(3):
            assert a8multi.backend_for("cuda:0").name == expected
    assert len(caplog.records) == 1
    assert_reason(caplog.text, path, fault)
    assert ("CuPy or its compiler NVRTC cannot be loaded" in caplog.text) is (expected == "torch")
    assert (str(NO_NVRTC) in caplog.text) is (nvrtc is NO_NVRTC)
    assert [one.available for one in a8multi.backends()[:2]] == [False, expected == "cupy"]
    assert main(["info"]) == 0

    report = a8multi.backends()[0]
    assert (report.name, report.available) == ("cuda", False)
    assert_reason(report.reason, path, fault)
    assert_reason(a8multi.explain(), path, fault)
    assert f"elementwise on cuda:0: {expected}" in a8multi.explain()
    assert f"; cuda: {path}" in why("cuda:0", {"elementwise": expected}, registry.backends("cuda:0"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_forced_choice_raises_the_same_reason(
    name: str, machine: Callable[..., None], install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    machine(fault.capability, driver=fault.driver, nvrtc=(12, 4))
    path = install(fault)
    monkeypatch.setenv("A8MULTI_BACKEND", "cuda")
    for op in ("elementwise", "adafactor", "codec", "elementwise"):
        with pytest.raises(a8multi.BackendUnavailable, match="What to do") as caught:
            a8multi.backend_for("cuda:0", op)
        assert_reason(str(caught.value), path, fault)
    monkeypatch.setenv("A8MULTI_BACKEND", "cuda,torch")
    assert a8multi.backend_for("cuda:0").name == "torch"


@pytest.mark.parametrize("name", ["not an ELF", "other architectures", "driver too old"])
def test_info_says_why(
    name: str, machine: Callable[..., None], install: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    machine(fault.capability, driver=fault.driver)
    path = install(fault)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert_reason(printed, path, fault)
    assert "elementwise on cuda:0: torch" in printed


def test_a_library_that_fits_is_chosen(machine: Callable[..., None], install: Callable[..., Path]) -> None:
    machine((9, 0), driver=12000, nvrtc=(12, 4))
    path = install(Fault((), ()))
    assert a8multi.backend_for("cuda:0").name == "cuda"
    assert a8multi.backends()[0].path == str(path)
    assert a8multi.backends()[0].available


def test_cupy_whose_compiler_is_newer_than_the_driver(
    machine: Callable[..., None], install: Callable[..., Path]
) -> None:
    machine((9, 0), driver=12040, nvrtc=(13, 0))
    install(FAULTS["driver too old"])
    assert a8multi.backend_for("cuda:0").name == "torch"
    cupy = a8multi.backends()[1]
    assert not cupy.available
    for word in ("CuPy 99.0", "CUDA 13.0", "supports CUDA 12.4"):
        assert word in cupy.reason


def test_each_device_gets_the_backend_that_fits_it(
    machine: Callable[..., None], install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0), (8, 6), nvrtc=(12, 4))
    install(Fault((), ()))
    for _ in range(2):
        assert [a8multi.backend_for(f"cuda:{index}").name for index in (0, 1)] == ["cuda", "cupy"]
    here = a8multi.backends()[0]
    assert here.available
    assert "cuda:1 (Stub GPU) has compute capability 8.6" in here.detail
    assert [registry.backends(f"cuda:{index}")[0].available for index in (0, 1)] == [True, False]
    text = a8multi.explain()
    assert "elementwise on cuda:0: cuda" in text
    assert "elementwise on cuda:1: cupy\n    not cuda: " in text
    assert "cuda:1 (Stub GPU) has" in why("cuda:1", {"elementwise": "cupy"}, registry.backends("cuda:1"))
    assert "has compute capability" not in why("cuda:0", {"elementwise": "cuda"}, registry.backends("cuda:0"))
    # Without a number it is the current one, which changes.
    for capability, expected in (((9, 0), "cuda"), ((8, 6), "cupy"), ((9, 0), "cuda")):
        monkeypatch.setattr(devices, "describe", lambda device, capability=capability: ("Stub GPU", capability))
        assert a8multi.backend_for("cuda").name == expected


def test_plain_torch_needs_no_file_of_the_package_but_its_modules(
    package: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path)
    monkeypatch.setattr(search, "source_directories", lambda: (tmp_path,))
    step_plan.sizes.cache_clear()
    parameter = torch.nn.Parameter(torch.ones(8192))
    parameter.grad = torch.ones_like(parameter)
    optimizer = a8multi.AdamW8bit([parameter])
    optimizer.step()
    assert a8multi.backend_for("cpu").name == "torch"
    assert (parameter < 1).all()


# --- A8MULTI_LIBRARY_PATH: what it names must load, but need not fit every device. ---


def test_a_named_library_that_is_broken_raises(
    machine: Callable[..., None], install: Callable[..., Path], use: Use, tmp_path: Path
) -> None:
    machine((9, 0), nvrtc=(12, 4))
    install(Fault((), ()))
    (tmp_path / CUDA).write_text("text", encoding="utf-8")
    for entry in (tmp_path / CUDA, tmp_path):
        use(entry)
        registry.reset()
        with pytest.raises(LibraryError, match="cannot be opened"):
            a8multi.backend_for("cuda:0")


def test_a_named_place_that_does_not_exist_raises(machine: Callable[..., None], use: Use, tmp_path: Path) -> None:
    machine((9, 0), nvrtc=(12, 4))
    use(tmp_path / "nowhere")
    for device in ("cpu", "cuda:0"):
        with pytest.raises(LibraryNotFound, match="does not exist, but A8MULTI_LIBRARY_PATH names it"):
            a8multi.backend_for(device)


@pytest.mark.parametrize("name", ["missing", "not an ELF"])
def test_a_named_cpu_library_does_not_make_the_packages_cuda_library_a_must(
    name: str, machine: Callable[..., None], install: Callable[..., Path], build: Build, use: Use
) -> None:
    machine((9, 0), nvrtc=(12, 4))
    path = install(FAULTS[name])
    places = [build("native").parent]
    if name == "missing":  # the package's own directory, as one may name it
        places.append(path.parent)
    for place in places:
        use(place)
        registry.reset()
        assert a8multi.backend_for("cuda:0").name == "cupy"


def test_a_named_library_for_other_devices_falls_back(
    machine: Callable[..., None], build: Build, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    machine((8, 6), nvrtc=(12, 4))
    path = build("native", CUDA_STUB, name=CUDA)
    use(path)
    with caplog.at_level(logging.WARNING, "a8multi"):
        assert a8multi.backend_for("cuda:0").name == "cupy"
    assert str(path) in caplog.text

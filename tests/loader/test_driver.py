"""The hardware probes, with CUDA drivers that the tests compile. They report, and never raise."""

from collections.abc import Callable
from pathlib import Path

import pytest

from a8multi.loader import probe

Build = Callable[..., Path]
Use = Callable[..., None]
NAME = "libcuda.so.1"


def stub(build: Build, *defines: str) -> probe.CudaReport:
    path = build("driver", *defines, name=NAME)
    report = probe.cuda(str(path))
    assert report.driver_library == str(path)
    assert report.available == (report.reason is None) == bool(report.devices)
    return report


def test_devices(build: Build) -> None:
    report = stub(build)
    assert report.driver_version == 13010
    assert report.devices == (
        probe.CudaDevice(0, "Stub A", (9, 0), 1 << 34),
        probe.CudaDevice(1, "Stub B", (12, 1), 2 << 34),
    )


def test_no_driver(tmp_path: Path) -> None:
    report = probe.cuda(str(tmp_path / NAME))
    assert not report.available
    assert "cannot be opened" in (report.reason or "")
    assert NAME in (report.reason or "")


def test_driver_that_is_not_a_library(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("text", encoding="utf-8")
    assert "cannot be opened" in (probe.cuda(str(tmp_path / NAME)).reason or "")


def test_missing_symbol_is_named(build: Build) -> None:
    report = stub(build, "STUB_NO_DEVICE_COUNT")
    assert "no symbol cuDeviceGetCount" in (report.reason or "")
    assert report.driver_version == 13010


def test_initialisation_error_has_the_drivers_words(build: Build) -> None:
    assert stub(build, "STUB_INIT_STATUS=999").reason == "cuInit failed with CUDA error 999 (CUDA_ERROR_STUB)"


def test_error_of_a_driver_without_words(build: Build) -> None:
    assert stub(build, "STUB_INIT_STATUS=999", "STUB_NO_ERROR_TEXT").reason == "cuInit failed with CUDA error 999"


def test_no_device(build: Build) -> None:
    assert "no device" in (stub(build, "STUB_DEVICES=0").reason or "")


def test_driver_too_old(build: Build) -> None:
    # cuInit would fail as well: the version is the better reason, so it comes first.
    report = stub(build, "STUB_DRIVER_VERSION=11040", "STUB_INIT_STATUS=999")
    assert (report.reason or "").startswith("the driver supports CUDA 11.4, but 12.0 is needed")
    assert report.driver_version == 11040


def test_minimum_driver_is_the_callers(build: Build) -> None:
    path = str(build("driver", name=NAME))
    assert probe.cuda(path, minimum_driver=13010).available
    assert not probe.cuda(path, minimum_driver=13020).available


def test_the_version_alone_does_not_initialise_the_driver(build: Build, tmp_path: Path) -> None:
    """So that a process may still fork after it was asked: the stub traps where it is initialised."""
    assert probe.driver_version(str(build("driver", "STUB_INIT_TRAPS", name=NAME))) == 13010
    assert probe.driver_version(str(tmp_path / NAME)) == 0


@pytest.mark.parametrize(("platform", "name"), [("linux", NAME), ("win32", "nvcuda.dll")])
def test_driver_name(platform: str, name: str) -> None:
    assert probe.driver_name(platform) == name


def test_cpu_comes_from_the_compiled_probe(build: Build, use: Use) -> None:
    path = build("native")
    use(path)
    report = probe.cpu()
    assert report.reason is None
    assert report.library == str(path)
    assert report.isa_built == ("baseline", "avx2", "avx512")
    assert report.isa_usable == ("baseline", "avx2")
    assert report.isa_best == "avx2"
    assert report.architecture
    assert report.name
    assert report.processor_count >= 1


def test_cpu_without_a_library_gives_the_reason(use: Use, tmp_path: Path) -> None:
    use(tmp_path / "nowhere")
    report = probe.cpu()
    assert str(tmp_path / "nowhere") in (report.reason or "")
    assert report.isa_best is None
    assert report.isa_usable == ()


def test_cpu_with_an_invalid_setting_gives_the_reason(use: Use, tmp_path: Path) -> None:
    (tmp_path / "other.so").touch()
    use(tmp_path / "other.so")
    assert "A8MULTI_LIBRARY_PATH" in (probe.cpu().reason or "")

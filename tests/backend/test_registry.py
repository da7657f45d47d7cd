"""Which backend runs. Automatic choice falls back and says so once; a forced one that cannot run raises."""

from __future__ import annotations

import logging
import platform
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import a8multi
from a8multi import settings
from a8multi.backend import registry
from a8multi.errors import LibraryError, LibraryNotFound, SettingError
from a8multi.optim import reader

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
FOREIGN_ISA = "baseline" if platform.machine().lower() in {"arm64", "aarch64"} else "neon"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing probed, no variable set; and nothing of these tests is left in the registry."""
    for setting in settings.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
    registry.reset()
    yield
    monkeypatch.undo()
    registry.reset()


def _step() -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    a8multi.AdamW8bit([param]).step()
    return param


# --- Choice. ---


@pytest.mark.parametrize("value", ["", "auto", "AUTO"])
def test_automatic_choice_on_the_cpu(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", value)
    assert [a8multi.backend_for("cpu", op).name for op in ("elementwise", "adafactor", "codec")] == ["cpu"] * 3


def test_other_devices_get_torch() -> None:
    assert a8multi.backend_for("meta").name == "torch"


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_one_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", name)
    assert a8multi.backend_for("cpu").name == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [("cuda,torch", "torch"), ("cuda, cpu ,torch", "cpu"), ("torch,cpu", "torch"), ("cupy,cpu", "cpu")],
)
def test_a_list_in_order_of_preference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str, expected: str
) -> None:
    """For CPU tensors; falling along one's own list is no surprise and logs nothing."""
    monkeypatch.setenv("A8MULTI_BACKEND", value)
    with caplog.at_level(logging.WARNING, "a8multi"):
        assert a8multi.backend_for("cpu").name == expected
    assert not caplog.records


@pytest.mark.parametrize("value", ["gpu", "cpu,", "auto,cpu", "cpu;torch"])
def test_an_unknown_name_lists_the_valid_ones(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", value)
    with pytest.raises(SettingError) as caught:
        _step()
    for word in ("A8MULTI_BACKEND", value, "auto", "cuda", "cupy", "cpu", "torch"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "cupy"])
def test_forced_for_the_wrong_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At the first step, not before; with what was tried, why, and what to do."""
    monkeypatch.setenv("A8MULTI_BACKEND", name)
    param = torch.nn.Parameter(torch.ones(8))
    optimizer = a8multi.AdamW8bit([param])
    optimizer.step()
    param.grad = torch.ones(8)
    with pytest.raises(a8multi.BackendUnavailable) as caught:
        optimizer.step()
    for word in (
        "elementwise",
        "cpu tensors",
        f"{name}: it serves cuda tensors",
        "What to do",
        "A8MULTI_BACKEND",
        "explain()",
    ):
        assert word in str(caught.value)
    assert torch.equal(param, torch.ones(8))
    assert not optimizer.state


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "cupy"])
def test_forced_without_a_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", name)
    with pytest.raises(a8multi.BackendUnavailable, match=r"(?s)CUDA device.*What to do"):
        a8multi.backend_for("cuda")


def test_forced_function() -> None:
    with a8multi.use_backend("cuda"), pytest.raises(a8multi.BackendUnavailable, match="codec"):
        a8multi.functional.quantize_blockwise(torch.ones(8))


def test_use_cuda_kernel_false_runs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """adafactor8bit's name for: plain torch operations."""
    ran = []
    with a8multi.use_backend("torch"):
        kind = type(a8multi.backend_for("cpu", "adafactor"))
    kept = kind.adafactor

    def noted(self: Any, *arguments: Any) -> None:
        ran.append(self.name)
        kept(self, *arguments)

    monkeypatch.setattr(kind, "adafactor", noted)
    for use in (True, False):
        param = torch.nn.Parameter(torch.ones(8))
        param.grad = torch.ones(8)
        a8multi.Adafactor8bit([param], use_cuda_kernel=use).step()
        assert ran == ([] if use else ["torch"])


# --- Falling back. ---


def _lose_the_cpu_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from a8multi.backend import native

    def missing(name: str) -> Any:
        raise LibraryNotFound(f"liba8multi_{name}.so", "no such file", "reinstall the package")

    monkeypatch.setattr(native, "load", missing)


def test_a_missing_library_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _lose_the_cpu_library(monkeypatch)
    with caplog.at_level(logging.WARNING, "a8multi"):
        for _ in range(3):
            _step()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    for word in ("elementwise", "cpu", "'torch'", "liba8multi_cpu.so", "no such file"):
        assert word in message
    with caplog.at_level(logging.WARNING, "a8multi"):
        registry.reset()
        _step()
    assert len(caplog.records) == 2, "reset() forgets what was told"


def test_a_missing_library_that_was_forced_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    _lose_the_cpu_library(monkeypatch)
    monkeypatch.setenv("A8MULTI_BACKEND", "cpu")
    for _ in range(2):
        with pytest.raises(a8multi.BackendUnavailable, match=r"(?s)liba8multi_cpu\.so.*reinstall.*What to do"):
            _step()


def test_a_named_library_must_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A8MULTI_LIBRARY_PATH forces: no fallback to another backend hides that the file is not a library."""
    broken = tmp_path / "liba8multi_cpu.so"
    broken.write_text("not a library")
    monkeypatch.setenv("A8MULTI_LIBRARY_PATH", str(broken))
    with pytest.raises((LibraryError, a8multi.BackendUnavailable)) as caught:
        _step()
    assert str(broken) in str(caught.value)
    assert "What to do" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "text"])
def test_a_wrong_library_path_can_be_corrected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """In the process that met it, as in a notebook; and a variable that turns wrong later is not ignored."""
    (tmp_path / "text").write_text("not a library")
    for _ in range(2):
        monkeypatch.setenv("A8MULTI_LIBRARY_PATH", str(tmp_path / name))
        with pytest.raises((LibraryError, SettingError), match=name):
            _step()
        monkeypatch.delenv("A8MULTI_LIBRARY_PATH")
        _step()
        assert a8multi.backend_for("cpu").name == "cpu"


def test_another_library_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the next step on, of optimizers that have taken steps too; that of before goes on for who holds it."""
    param, twin = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    optimizer, straight = a8multi.AdamW8bit([param]), a8multi.AdamW8bit([twin])
    packaged = a8multi.backend_for("cpu")
    copy = tmp_path / Path(packaged.report().path).name
    shutil.copy(packaged.report().path, copy)
    for path in (None, tmp_path, None, copy):
        for one in (param, twin):
            one.grad = torch.linspace(-1, 1, 5000)
        straight.step()
        if path is not None:
            monkeypatch.setenv("A8MULTI_LIBRARY_PATH", str(path))
        optimizer.step()
        chosen = a8multi.backend_for("cpu")
        assert chosen.report().path == str(copy if path else packaged.report().path)
        found = reader._find()
        assert isinstance(found, str) or found[0] is chosen.library
        assert torch.equal(param, twin)
        monkeypatch.delenv("A8MULTI_LIBRARY_PATH", raising=False)
        assert a8multi.backend_for("cpu") is packaged


def test_an_instruction_set_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_CPU_ISA", FOREIGN_ISA)
    with pytest.raises(a8multi.BackendUnavailable) as caught:
        _step()
    for word in (f"A8MULTI_CPU_ISA={FOREIGN_ISA}", "usable here", "Unset"):
        assert word in str(caught.value)


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_CPU_ISA", "sse9")
    with pytest.raises(SettingError, match=r"A8MULTI_CPU_ISA='sse9'.*avx2"):
        _step()


def test_every_usable_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    info = a8multi.backend_for("cpu").library.info
    assert info.isa_best in info.isa_usable
    for isa in info.isa_usable:
        monkeypatch.setenv("A8MULTI_CPU_ISA", isa)
        _step()
        assert a8multi.backend_for("cpu").isa_ran == isa
    monkeypatch.setenv("A8MULTI_CPU_ISA", "auto")
    _step()
    assert a8multi.backend_for("cpu").isa_ran == info.isa_best


# --- use_backend. ---


def test_use_backend_overrides_the_variable_and_nests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", "cuda")
    with a8multi.use_backend("torch"):
        assert a8multi.backend_for("cpu").name == "torch"
        with a8multi.use_backend("cuda", "cpu"):
            assert a8multi.backend_for("cpu").name == "cpu"
        assert a8multi.backend_for("cpu").name == "torch"
        with pytest.raises(KeyError), a8multi.use_backend("cpu"):
            raise KeyError
        assert a8multi.backend_for("cpu").name == "torch"
    with pytest.raises(a8multi.BackendUnavailable):
        a8multi.backend_for("cpu")


def test_use_backend_auto_gives_the_variable_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with a8multi.use_backend("torch"), a8multi.use_backend("auto"):
        assert a8multi.backend_for("cpu").name == "cpu"
    monkeypatch.setenv("A8MULTI_BACKEND", "torch")
    with a8multi.use_backend("cpu"), a8multi.use_backend("auto"):
        assert a8multi.backend_for("cpu").name == "torch"


def test_use_backend_is_of_one_thread() -> None:
    inside, seen = threading.Event(), []
    done = threading.Event()

    def other() -> None:
        inside.wait(10)
        seen.append(a8multi.backend_for("cpu").name)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with a8multi.use_backend("torch"):
        inside.set()
        assert done.wait(10)
        assert a8multi.backend_for("cpu").name == "torch"
    thread.join(10)
    assert seen == ["cpu"]


@pytest.mark.parametrize("names", [("gpu",), (), ("cpu", "auto"), ("CPU",)])
def test_use_backend_with_an_unknown_name(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="cuda, cupy, cpu, torch"), a8multi.use_backend(*names):
        pytest.fail("entered the block")


def test_backends_are_made_once_even_by_threads() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(a8multi.backend_for("cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len({id(backend) for backend in found}) == 1


# --- Reports. ---


def test_backends_reports_every_one() -> None:
    reports = {report.name: report for report in a8multi.backends()}
    assert list(reports) == ["cuda", "cupy", "cpu", "torch"]
    cpu = reports["cpu"]
    assert cpu.available
    assert cpu.reason == ""
    assert cpu.path is not None
    assert Path(cpu.path).is_file()
    assert cpu.version == a8multi.__version__
    assert cpu.ops == ("codec", "elementwise", "adafactor")
    assert cpu.devices == ("cpu",)
    assert a8multi.backend_for("cpu").library.info.isa_best in cpu.detail
    assert reports["torch"].available
    assert reports["torch"].version == torch.__version__
    assert reports["torch"].devices == ()
    for report in reports.values():
        assert report.available is (report.reason == ""), report.name


@NO_GPU
def test_reports_say_why_not() -> None:
    reports = {report.name: report for report in a8multi.backends()}
    for name in ("cuda", "cupy"):
        assert not reports[name].available
        assert "CUDA" in reports[name].reason


def test_explain_names_backends_choice_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    text = a8multi.explain()
    for report in a8multi.backends():
        assert report.name in text
        assert (report.path or "") in text
    assert "automatic" in text
    assert "elementwise on cpu: cpu" in text
    monkeypatch.setenv("A8MULTI_BACKEND", "torch,cpu")
    text = a8multi.explain()
    assert "forced to torch, cpu" in text
    assert "elementwise on cpu: torch" in text


def test_explain_never_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is what one calls when nothing works."""
    monkeypatch.setenv("A8MULTI_CPU_ISA", FOREIGN_ISA)
    assert FOREIGN_ISA in a8multi.explain()
    monkeypatch.setenv("A8MULTI_BACKEND", "cuda")
    assert "none" in a8multi.explain()
    monkeypatch.delenv("A8MULTI_CPU_ISA")
    monkeypatch.delenv("A8MULTI_BACKEND")
    monkeypatch.setenv("A8MULTI_LIBRARY_PATH", str(tmp_path / "nowhere"))
    registry.reset()
    assert str(tmp_path / "nowhere") in a8multi.explain()


@pytest.mark.parametrize(("name", "value"), [("A8MULTI_BACKEND", "gpu"), ("A8MULTI_CPU_ISA", "sse9")])
def test_explain_shows_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert f"{name}={value!r}" in a8multi.explain()

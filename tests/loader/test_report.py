"""``python -m a8multi.loader``, and that the loader needs nothing but the standard library."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import a8multi.loader
from a8multi import settings
from a8multi.loader import __main__ as command
from a8multi.loader import output, probe, report, search

Build = Callable[..., Path]
Use = Callable[..., None]


def test_report_of_a_library_that_loads(build: Build, use: Use, capsys: pytest.CaptureFixture[str]) -> None:
    path = build("native")
    use(path)
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    cpu = report["libraries"]["cpu"]
    assert cpu["path"] == str(path)
    assert cpu["info"]["ops"] == ["CODEC", "ELEMENTWISE", "ADAFACTOR"]
    assert cpu["attempts"] == [{"path": str(path), "outcome": "loaded"}]
    assert report["cpu"]["isa_best"] == "avx2"
    assert [row["name"] for row in report["settings"]] == [setting.name for setting in settings.SETTINGS]

    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert f"cpu library: 9.8.7 at {path}" in text
    assert "usable baseline, avx2; best avx2" in text


def test_report_without_a_library_says_why_and_fails(
    use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(tmp_path / "nowhere")
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert str(tmp_path / "nowhere") in text
    assert "What to do: " in text
    assert command.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert "does not exist" in report["libraries"]["cpu"]["reason"]


def test_invalid_settings_are_reported_not_raised(
    build: Build, use: Use, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(build("native"))
    monkeypatch.setenv("A8MULTI_CPU_ISA", "sse2")
    assert command.main([]) == 0
    assert "A8MULTI_CPU_ISA='sse2' is not valid" in capsys.readouterr().out


def test_devices_that_the_cuda_library_does_not_fit(
    build: Build, use: Use, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = (probe.CudaDevice(0, "Stub A", (9, 0), 1 << 34), probe.CudaDevice(1, "Stub B", (12, 1), 1 << 34))
    monkeypatch.setattr(probe, "cuda", lambda: probe.CudaReport(True, "libstub", 13010, devices))
    use(build("native"), build("native", 'STUB_BACKEND="cuda"', name=search.library_name("cuda")))
    assert command.main(["--json"]) == 0
    fits, other = json.loads(capsys.readouterr().out)["cuda"]["devices"]
    assert fits["library_reason"] is None
    assert "built for sm_75 sm_90, but Stub B has compute capability 12.1" in other["library_reason"]
    assert command.main([]) == 0
    assert (
        f"  device 1: Stub B, sm_121, 16.0 GiB\n    the CUDA library cannot run here: {other['library_reason']}\n"
        in (capsys.readouterr().out)
    )


def test_a_driver_older_than_the_cuda_library(build: Build, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (probe.CudaDevice(0, "Stub A", (9, 0), 1 << 34),)
    monkeypatch.setattr(probe, "cuda", lambda: probe.CudaReport(True, "libstub", 12040, devices))
    use(build("native", 'STUB_BACKEND="cuda"', "STUB_TOOLKIT=13000", name=search.library_name("cuda")))
    reason = report.collect()["cuda"]["devices"][0]["library_reason"]
    assert "CUDA 13.0 toolkit" in reason
    assert "this driver supports CUDA 12.4" in reason


def test_letters_that_the_encoding_lacks(use: Use, tmp_path: Path) -> None:
    use(tmp_path / "\N{LATIN SMALL LETTER E WITH ACUTE}")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "a8multi.loader"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{tmp_path}{os.sep}\\xe9: does not exist" in done.stdout


def test_no_standard_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a process started with it closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert output.printing("name", lambda: 3) == 3


def test_errors_of_the_work_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        output.printing("name", lambda: 1 // 0)


def test_the_command_runs_without_torch_and_numpy(build: Build, use: Use) -> None:
    use(build("native"))
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "runpy.run_module('a8multi.loader', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("a8multi loader: ")


def test_importing_opens_no_library_and_prints_nothing() -> None:
    code = (
        "import ctypes, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'opened {args}')\n"
        "ctypes.CDLL.__init__ = refuse\n"
        "import a8multi.loader.report\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", sorted(Path(a8multi.loader.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_only_the_standard_library_errors_and_settings_are_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{name.name}" for name in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"{path.name} imports from outside"
            continue
        for module in modules:
            allowed = module.split(".")[0] in sys.stdlib_module_names or module.startswith(
                ("a8multi.errors.", "a8multi.settings")
            )
            assert allowed, f"{path.name} imports {module}"

"""`a8multi info`: complete, valid JSON, a self-test that can fail, and the sizes of optimizer state."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import a8multi
from a8multi import settings
from a8multi.backend import BackendReport
from a8multi.cli.info import why
from a8multi.cli.optimizers import state_bytes
from a8multi.cli.parameter_sets import llama_like
from a8multi.cli.system import devices
from a8multi.estimate import optimizers

Command = Callable[..., Any]


def test_json_is_one_complete_document(command: Command) -> None:
    result = command("info", "--json")
    report = json.loads(result.out)
    assert result.status == 0
    assert report["passed"] is True
    assert {row["name"] for row in report["backends"]} == set(settings.BACKEND_NAMES)
    for row in report["backends"]:
        assert isinstance(row["available"], bool)
        assert row["available"] or row["reason"]
    assert report["versions"]["a8multi"] == a8multi.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "system", "cpu", "cuda driver supports"} <= set(report["versions"])
    assert [row["name"] for row in report["environment"]] == [one.name for one in settings.SETTINGS]
    cpu = report["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["why"]
    assert cpu["backends"] == {
        op: a8multi.backend_for(torch.device("cpu"), op=op).name for op in ("elementwise", "adafactor")
    }
    assert [test["optimizer"] for test in cpu["self_tests"]] == ["AdamW8bit", "Adafactor8bit"]
    for test in cpu["self_tests"]:
        assert test["passed"] is True
        assert 0 <= test["max_difference"] <= test["tolerance"] < test["moved"]
    assert report["explain"] == a8multi.explain()


def test_text_names_everything(command: Command) -> None:
    result = command("info")
    assert result.status == 0
    assert result.out.count("PASS") == 2 * len(devices())
    for word in (*settings.BACKEND_NAMES, *(one.name for one in settings.SETTINGS), "AdamW8bit", "torch", "cpu"):
        assert word in result.out


def test_forced_backend_is_the_reason(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A8MULTI_BACKEND", "torch")
    cpu = json.loads(command("info", "--json").out)["devices"][0]
    assert cpu["backends"] == {"elementwise": "torch", "adafactor": "torch"}
    assert "A8MULTI_BACKEND" in cpu["why"]


def test_why_names_what_the_preferred_backends_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A8MULTI_BACKEND", raising=False)
    reports = [
        BackendReport("cuda", True, ops=("elementwise",), devices=("cuda",)),
        BackendReport("cupy", False, "CuPy is not installed\nand more", devices=("cuda",)),
        BackendReport("cpu", True, ops=("elementwise", "adafactor"), devices=("cpu",)),
        BackendReport("torch", True, ops=("elementwise", "adafactor")),
    ]
    assert why("cuda:1", {"elementwise": "cuda", "adafactor": "torch"}, reports) == (
        "automatic choice, the first of cuda, cupy, torch that can run; "
        "cuda: does not offer adafactor; cupy: CuPy is not installed"
    )
    assert why("cpu", {"elementwise": "cpu", "adafactor": "cpu"}, reports).endswith(
        "the first of cpu, torch that can run"
    )
    assert why("mps", {"elementwise": "torch"}, reports).endswith("the first of torch that can run")


@pytest.mark.parametrize("fault", ["wrong", "idle", "nan", "raises"])
def test_faulty_backend_fails_the_self_test(command: Command, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The faults are put around the optimizer, outside the reference: as if the chosen backend had them."""
    in_reference = []
    use_backend = a8multi.use_backend

    @contextlib.contextmanager
    def watched(name: str) -> Iterator[None]:
        with use_backend(name):
            in_reference.append(True)
            yield
            in_reference.clear()

    class Faulty(a8multi.AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            if in_reference:
                return super().step(closure)
            if fault == "raises":
                raise RuntimeError("kernel on strike")
            if fault != "idle":
                super().step(closure)
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.view(-1)[0] += {"wrong": 1e-3, "idle": 0.0, "nan": float("nan")}[fault]
            return None

    monkeypatch.setattr(a8multi, "use_backend", watched)
    monkeypatch.setattr(a8multi, "AdamW8bit", Faulty)
    result = command("info", "--json")
    report = json.loads(result.out)
    assert result.status == 1
    assert report["passed"] is False
    adamw, adafactor = report["devices"][0]["self_tests"]
    assert (adamw["passed"], adafactor["passed"]) == (False, True)
    errors = {"raises": "RuntimeError: kernel on strike", "nan": "the parameters are not finite"}
    assert adamw["error"] == errors.get(fault)
    assert "FAIL" in command("info").out


# --- --model-size ---


def test_model_size_counts_every_optimizer(command: Command) -> None:
    result = command("info", "--model-size", "2e7", "--json")
    report = json.loads(result.out)
    assert result.status == 0
    assert report["model_size"] == 2e7
    assert abs(report["parameters"] / 2e7 - 1) < 0.02
    shapes = llama_like(2e7)
    assert (report["parameters"], report["tensors"]) == (sum(map(math.prod, shapes)), len(shapes))
    rows = [row for row in report["optimizers"] if row["optimizer"] != "torch AdamW"]
    assert {row["optimizer"].lower() for row in rows} == set(optimizers())
    for row in rows:
        found = a8multi.estimate_state_bytes(shapes, row["optimizer"], **row["options"])
        assert row["state_bytes"] == found.total_bytes
        assert row["bytes_by_format"] == found.bytes_by_format
        assert row["bytes_per_parameter"] == found.bytes_per_parameter


def test_model_size_of_torch_is_what_torch_makes(command: Command) -> None:
    report = json.loads(command("info", "--model-size", "1e7", "--json").out)
    rows = [row for row in report["optimizers"] if row["optimizer"] == "torch AdamW"]
    assert [row["options"] for row in rows] == [{"parameters": "fp32"}, {"parameters": "bf16"}]
    for row, dtype in zip(rows, (torch.float32, torch.bfloat16), strict=True):
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in llama_like(1e7)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters)
        optimizer.step()
        assert row["state_bytes"] == state_bytes(optimizer) == sum(row["bytes_by_format"].values())


def test_model_size_in_words(command: Command) -> None:
    result = command("info", "--model-size", "7e9")
    assert result.status == 0
    assert "6.941 G parameters: 33 layers of width 4096, 300 tensors" in result.out
    lines = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in result.out.splitlines()[1:]}
    assert lines["torch AdamW parameters=fp32"] == ["51.713", "8.000"]
    assert lines["AdamW8bit"][1] == "2.062"
    assert lines["AdamW8bit first_moment=nf4"][1] == "1.562"


@pytest.mark.parametrize("size", ["1e6", "1e14"])
def test_model_size_out_of_range(command: Command, size: str) -> None:
    result = command("info", "--model-size", size)
    assert result.status == 2
    assert "--model-size" in result.err
    assert "from 1e+07 to 1e+13" in result.err


@pytest.mark.parametrize("size", [1e7, 1e8, 1.1e9, 6.7e9, 7e10, 1e13])
def test_llama_like_is_as_large_as_asked_for(size: float) -> None:
    shapes = llama_like(size)
    assert abs(sum(map(math.prod, shapes)) / size - 1) < 0.02
    assert shapes[0] == shapes[-1] == (32000, shapes[0][1])

"""`a8multi info`: complete, valid JSON, and a self-test that can fail."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import a8multi
from a8multi import settings
from a8multi.backend import BackendReport
from a8multi.cli.info import why
from a8multi.cli.system import devices

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
    assert cpu["backends"] == {op: a8multi.backend_for(torch.device("cpu"), op=op).name for op in ("elementwise", "adafactor")}
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
    assert why("cpu", {"elementwise": "cpu", "adafactor": "cpu"}, reports).endswith("the first of cpu, torch that can run")
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

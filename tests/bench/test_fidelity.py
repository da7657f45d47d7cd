"""bench/fidelity.py: the measure itself, on a tiny model and a text of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Two of its tensors have 4096 elements or more: their state is quantised, and they are what is counted.
TINY_MODEL = "--threads 1 --width 40 --layers 1 --heads 2 --context 16 --batch-size 4"
TINY_COUNTED = 256 * 40 + 40 * 120 + 2 * 40 * 160
FAMILIES = ("adamw", "classics", "adafactor", "came", "apollo")
# Rows without quantised state.
EXACT = {"a8multi Adafactor8bit factored"}

Result = dict[str, Any]
Measure = Callable[..., tuple[int, Result]]


@pytest.fixture
def families(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("fidelity_families")


@pytest.fixture
def measure(script: Callable[[str], ModuleType], text: Path, tmp_path: Path) -> Measure:
    """Runs the script on the tiny model. Returns the exit status and the JSON."""
    fidelity = script("fidelity")

    def run(*arguments: object) -> tuple[int, Result]:
        output = tmp_path / "result.json"
        fixed = ["--data", str(text), "--json", str(output), *TINY_MODEL.split()]
        status = fidelity.main([*fixed, *map(str, arguments)])
        return status, json.loads(output.read_text(encoding="utf-8"))

    return run


def _rows(result: Result) -> dict[str, Result]:
    return {row["name"]: row for row in result["rows"]}


def test_default_is_close_and_fp32_state_is_exact(measure: Measure) -> None:
    status, result = measure("--steps", 12, "--report-at", 2, 12, "--only", "a8multi*")
    rows = _rows(result)
    assert status == 0
    assert rows["a8multi AdamW8bit, m and v fp32"]["worst"]["error"] < 1e-5
    default = rows["a8multi AdamW8bit"]
    # The first update is that of the gradient: its state is quantised only afterwards.
    assert 1e-4 < default["errors"]["2"] < 0.1
    assert 1e-4 < default["errors"]["12"] < 0.1
    assert default["worst"]["error"] < 0.1
    assert default["errors"]["12"] < rows["a8multi AdamW8bit, m nf4"]["errors"]["12"] < 0.5


def test_json_is_complete(measure: Measure) -> None:
    _, result = measure("--steps", 3, "--report-at", 1, 3, "--only", "a8multi*")
    assert result["counted_parameter_count"] == TINY_COUNTED < result["parameter_count"]
    assert result["steps"] == 3
    assert {"family": "adamw", "threads": 1, "device": "cpu"}.items() <= result["config"].items()
    assert result["command"].startswith("python bench/fidelity.py --data ")
    assert result["final_loss"] > 0
    assert {"python", "cpu", "torch", "a8multi", "bitsandbytes"} <= set(result["versions"])
    assert {"date", "device", "text_digest"} <= set(result)
    assert result["backend"] in {"cpu", "torch"}
    row = _rows(result)["a8multi AdamW8bit"]
    assert row["reference"] == "torch AdamW fp32"
    assert row["note"] is None
    assert list(row["curve"]) == ["1", "2", "3"]
    assert row["errors"] == {at: row["curve"][at] for at in ("1", "3")}
    assert row["worst"]["error"] == max(row["curve"].values())
    # Two codes a parameter and 8 bytes a started block of 128; two float32 moments in the small tensors.
    blocks, parameters = 80 + 38 + 50 + 50, result["parameter_count"]
    state_bytes = 2 * TINY_COUNTED + 8 * blocks + 8 * (parameters - TINY_COUNTED)
    assert row["state_bytes_per_param"] == pytest.approx(state_bytes / parameters, rel=1e-12)


def test_error_is_that_of_a_known_update(
    families: ModuleType, measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decoupled weight decay is scaled by lr too, so a tenth more of it is a tenth more of the whole update; it stays a
    # tenth at every step only if the candidate starts each from the parameters of the reference.
    faster = families.Candidate("faster", "torch.optim:AdamW", {**families.ADAMW, "lr": 1.1e-3})
    absent = families.Candidate("absent", "no_such_package.optim:AdamW")
    broken = families.Candidate("broken", "torch.optim:AdamW", {"lr": -1.0})
    monkeypatch.setitem(families.FAMILIES, "adamw", (faster, absent, broken))
    status, result = measure("--steps", 8)
    rows = _rows(result)
    assert status == 0
    assert list(rows["faster"]["curve"].values()) == pytest.approx([0.1] * 8, rel=1e-4)
    assert rows["absent"]["note"] == "not installed"
    assert rows["broken"]["note"] == "step 1: ValueError: Invalid learning rate: -1.0"
    assert rows["absent"]["curve"] == rows["broken"]["curve"] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_equal(measure: Measure, tmp_path: Path, family: str) -> None:
    options = ["--family", family, "--only", "a8multi*", "--report-at", 6]
    _, straight = measure(*options)
    checkpoint = tmp_path / "checkpoint.pt"
    measure(*options, "--steps", 3, "--resume", checkpoint)
    status, resumed = measure(*options, "--resume", checkpoint)
    assert status == 0
    assert resumed["rows"] == straight["rows"]
    assert resumed["final_loss"] == straight["final_loss"]
    # Not by starting again: a finished run has nothing left to do.
    assert measure(*options, "--resume", checkpoint)[1]["rows"] == straight["rows"]


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_reference_is_the_same_rule(measure: Measure, family: str) -> None:
    status, result = measure("--family", family, "--steps", 2, "--report-at", 1, 2, "--only", "a8multi*")
    assert status == 0
    assert result["rows"]
    for row in result["rows"]:
        assert row["note"] is None, row
        assert row["reference"] == row["name"].partition(",")[0] + " fp32"
        # The first update is made before the state is quantised, so only another rule could make it differ.
        assert row["errors"]["1"] == 0, row
        quantised = row["name"] not in EXACT
        assert (1e-4 < row["errors"]["2"] < 0.4) if quantised else (row["errors"]["2"] == 0), row


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.usefixtures("backend")
def test_cuda(measure: Measure, tmp_path: Path) -> None:
    options = ["--device", "cuda", "--only", "a8multi*", "--report-at", 1, 6, "--resume", tmp_path / "checkpoint.pt"]
    measure(*options, "--steps", 3)
    status, result = measure(*options)
    rows = _rows(result)
    assert status == 0
    assert result["config"]["device"] == "cuda:0"
    assert result["backend"] == "cuda"
    assert result["versions"]["torch built with CUDA"]
    assert rows["a8multi AdamW8bit, m and v fp32"]["worst"]["error"] < 1e-4
    assert 1e-4 < rows["a8multi AdamW8bit"]["errors"]["6"] < 0.1


def test_plot(measure: Measure, tmp_path: Path) -> None:
    plot = tmp_path / "error.png"
    assert measure("--family", "classics", "--steps", 2, "--only", "*Lion*", "*Adagrad*", "--png", plot)[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_names_say_the_rule(families: ModuleType) -> None:
    rules: dict[str, Any] = {}
    for candidate in (one for family in families.FAMILIES.values() for one in family if one.package == "a8multi"):
        reference = candidate.with_fp32_state()
        assert rules.setdefault(reference.name, reference) == reference
        parameter = torch.nn.Parameter(torch.zeros(64, 256))
        parameter.grad = torch.ones_like(parameter)
        optimizer = reference.build([parameter])
        optimizer.step()
        state = optimizer.state[parameter].values()
        assert {value.dtype for value in state if isinstance(value, torch.Tensor)} <= {torch.float32}, reference


def test_resume_refuses_another_run(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    options = ["--steps", 1, "--only", "*m and v fp32", "--resume", checkpoint]
    assert measure(*options)[0] == 0
    capsys.readouterr()
    assert measure(*options, "--seed", 1)[0] == 2
    assert "made with other options" in capsys.readouterr().err
    checkpoint.write_bytes(b"not a checkpoint")
    assert measure(*options)[0] == 2
    assert "not a checkpoint of this script" in capsys.readouterr().err
    assert measure("--only", "nothing of that name")[0] == 2
    assert "m and v fp32" in capsys.readouterr().err

"""bench/losses.py on a tiny model and a text of its own."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import a8multi

TINY = "--threads 1 --width 40 --layers 1 --heads 2 --context 16 --batch-size 4 --warmup 1"

Result = dict[str, Any]
Measure = Callable[..., tuple[int, Result]]


@pytest.fixture
def losses(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("losses")


@pytest.fixture
def measure(losses: ModuleType, text: Path, tmp_path: Path) -> Measure:
    """Runs the script on the tiny model. Returns the exit status and the JSON."""

    def run(*arguments: object) -> tuple[int, Result]:
        output = tmp_path / "losses.json"
        status = losses.main(["--data", str(text), "--json", str(output), *TINY.split(), *map(str, arguments)])
        return status, json.loads(output.read_text(encoding="utf-8"))

    return run


def _rows(result: Result) -> dict[str, Result]:
    return {row["name"]: row for row in result["rows"]}


def test_rows_are_compared_with_fp32(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("a8multi AdamW8bit", "a8multi AdamW8bit, m and v fp32")
    plot = tmp_path / "losses.png"
    status, result = measure("--steps", 25, "--seeds", 3, "--only", *names, "--png", plot)
    rows = _rows(result)
    assert status == 0
    assert list(rows) == ["torch AdamW fp32", *names]
    reference, ours, same = rows.values()
    assert [run["seed"] for run in ours["runs"]] == [0, 1, 2]
    assert len(ours["runs"][0]["curve"]) == 3
    # It learns: from log(256) = 5.5 downwards, with every seed differently.
    assert all(run["validation_loss"] < 4.5 < 5 < run["curve"][0] for run in ours["runs"])
    assert len({run["validation_loss"] for run in reference["runs"]}) == 3
    own = [run["validation_loss"] for run in ours["runs"]]
    other = [run["validation_loss"] for run in reference["runs"]]
    assert ours["mean"] == pytest.approx(statistics.fmean(own))
    assert reference["standard_error"] == pytest.approx(statistics.stdev(other) / math.sqrt(3))
    assert ours["difference"] == pytest.approx(statistics.fmean(own) - statistics.fmean(other))
    assert ours["difference"] != 0
    assert ours["within_one_standard_error"] is (abs(ours["difference"]) <= reference["standard_error"])
    assert abs(same["difference"]) < 1e-4
    assert same["within_one_standard_error"] is True
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "within s.e. of fp32" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["classics", "adafactor", "came", "apollo"])
def test_every_family_trains(measure: Measure, family: str) -> None:
    status, result = measure("--family", family, "--steps", 2, "--seeds", 1, "--only", "a8multi*")
    assert status == 0
    for row in result["rows"]:
        assert row["note"] is None, row
        assert math.isfinite(row["mean"])
        # One seed has no spread, so that nothing can be said.
        assert row["standard_error"] is None
        assert row.get("within_one_standard_error") is None


def test_resume_makes_what_is_missing(measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--family", "classics", "--only", "a8multi Lion8bit", "--steps", 3, "--seeds", 2]
    _, straight = measure(*options)
    cut = json.loads(json.dumps(straight))
    kept, lost = cut["rows"]
    kept["runs"][0]["curve"] = [123.0]
    del kept["runs"][1], lost["runs"][:]
    (tmp_path / "losses.json").write_text(json.dumps(cut))
    status, resumed = measure(*options, "--resume")
    assert status == 0
    # Taken over as it was found, not made again.
    assert resumed["rows"][0]["runs"][0]["curve"] == [123.0]
    assert resumed["rows"][0]["runs"][1] == straight["rows"][0]["runs"][1]
    assert resumed["rows"][1] == straight["rows"][1]
    assert measure(*options, "--resume", "--batch-size", 5)[0] == 2
    assert "made with other options" in capsys.readouterr().err
    (tmp_path / "losses.json").write_text('{"rows": []}')
    assert measure(*options, "--resume")[0] == 2
    assert "no result of this script" in capsys.readouterr().err


def test_more_seeds_go_on(measure: Measure) -> None:
    options = ["--only", "a8multi AdamW8bit", "--steps", 1, "--resume"]
    _, two = measure(*options, "--seeds", 2)
    _, ten = measure(*options, "--seeds", 10)
    assert ten["config"]["seeds"] == 10
    for before, after in zip(two["rows"], ten["rows"], strict=True):
        assert [run["seed"] for run in after["runs"]] == list(range(10))
        assert after["runs"][:2] == before["runs"]
    assert measure(*options, "--seeds", 3)[1] == ten


def test_finished_result_is_plotted_anywhere(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "losses.png"
    options = ["--only", "a8multi AdamW8bit", "--steps", 1, "--seeds", 1]
    _, result = measure(*options)
    result |= {"config": result["config"] | {"device": "cuda:99", "threads": 99}}
    (tmp_path / "losses.json").write_text(json.dumps(result))
    assert measure(*options, "--resume", "--device", "cuda:99", "--png", plot) == (0, result)
    assert plot.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    # What is missing must be made as the rest was.
    assert measure(*options, "--resume", "--seeds", 2)[0] == 2
    assert "device 'cuda:99' instead of 'cpu'" in capsys.readouterr().err
    assert measure(*options, "--resume", "--seeds", 2, "--device", "cuda:99")[0] == 2
    assert "cannot use --device cuda:99" in capsys.readouterr().err


def test_merged_parts_are_the_whole(measure: Measure, tmp_path: Path) -> None:
    names = ("a8multi Lion8bit", "a8multi SGD8bit")
    options = ["--family", "classics", "--steps", 2, "--only"]
    _, whole = measure(*options, *names, "--seeds", 2)
    parts = []
    for seed, name in itertools.product((1, 0), reversed(names)):
        parts.append(tmp_path / f"part-{len(parts)}.json")
        parts[-1].write_text(json.dumps(measure(*options, name, "--seeds", 1, "--seed", seed)[1]))
    plot = tmp_path / "merged.png"
    status, merged = measure("--merge", *parts, "--png", plot)
    assert status == 0
    assert merged["rows"] == whole["rows"]
    assert merged["config"] == whole["config"]
    assert len(merged["parts"]) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    # A result that was begun anew holds some runs twice; and it can go on from the merged one.
    (tmp_path / "again.json").write_text(json.dumps(whole))
    assert measure("--merge", tmp_path / "again.json", *parts)[1]["rows"] == whole["rows"]
    _, more = measure(*options, *names, "--seeds", 3, "--resume")
    assert [len(row["runs"]) for row in more["rows"]] == [3] * 4


def test_differences_are_of_the_seeds_that_both_have(measure: Measure, tmp_path: Path) -> None:
    _, result = measure("--only", "a8multi AdamW8bit", "--steps", 1, "--seeds", 2)
    reference, ours = result["rows"]
    expected = ours["runs"][1]["validation_loss"] - reference["runs"][1]["validation_loss"]
    del ours["runs"][0]
    part = tmp_path / "part.json"
    part.write_text(json.dumps(result))
    _, merged = measure("--merge", part)
    assert merged["rows"][1]["difference"] == pytest.approx(expected)
    del reference["runs"][1]
    part.write_text(json.dumps(result))
    _, merged = measure("--merge", part)
    assert "difference" not in merged["rows"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"steps": 7}}, "made with other options (steps 7 instead of 1)"),
        ({"text_digest": "another"}, "made with another text"),
        ({"versions": {"torch": "another"}}, "made with other versions of packages"),
        ({"rows": [{"name": "a8multi Gone8bit", "reference": None, "runs": [], "note": None}]}, "does not have"),
        ({"format": "another"}, "no result of this script"),
    ],
)
def test_merge_refuses(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Result, message: str
) -> None:
    _, result = measure("--only", "a8multi AdamW8bit", "--steps", 1, "--seeds", 1)
    parts = tmp_path / "first.json", tmp_path / "second.json"
    parts[0].write_text(json.dumps(result))
    for key, value in change.items():
        result[key] = result[key] | value if isinstance(value, dict) else value
    parts[1].write_text(json.dumps(result))
    capsys.readouterr()
    assert measure("--merge", *parts)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.usefixtures("backend")
# Known of captured modules: gradients are handed over on the stream of the capture, which costs time only.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_cuda(measure: Measure) -> None:
    names = ("a8multi AdamW8bit", "a8multi AdamW8bit, m and v fp32")
    status, result = measure("--device", "cuda", "--steps", 25, "--seeds", 2, "--only", *names)
    assert status == 0
    assert result["config"]["device"] == "cuda:0"
    assert result["backend"] == "cuda"
    assert [row["note"] for row in result["rows"]] == [None] * 3
    _, ours, same = result["rows"]
    assert all(run["validation_loss"] < 4.5 < 5 < run["curve"][0] for run in ours["runs"])
    assert abs(same["difference"]) < 1e-3
    # The steps of a captured model train it as on the CPU.
    with a8multi.use_backend("auto"):
        _, on_cpu = measure("--steps", 25, "--seeds", 2, "--only", *names)
    assert [row["mean"] for row in result["rows"]] == pytest.approx([row["mean"] for row in on_cpu["rows"]], abs=5e-3)


def test_failures_are_rows(measure: Measure, script: Callable[[str], ModuleType], monkeypatch: Any) -> None:
    families = script("fidelity_families")
    diverging = families.Candidate("diverging", "torch.optim:SGD", {"lr": 1e30})
    absent = families.Candidate("absent", "no_such_package.optim:AdamW")
    monkeypatch.setitem(families.FAMILIES, "adamw", (diverging, absent))
    status, result = measure("--steps", 5, "--seeds", 2)
    rows = _rows(result)
    assert status == 0
    assert rows["diverging"]["note"].startswith("seed 0: DivergenceError: diverging: the loss is")
    assert rows["diverging"]["runs"] == []
    assert rows["absent"]["note"] == "not installed"
    assert len(rows["torch AdamW fp32"]["runs"]) == 2

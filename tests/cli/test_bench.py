"""`a8multi bench`: what is timed, what is written, what happens to a peer that fails."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from a8multi.cli import bench as bench_command
from a8multi.cli import candidates
from a8multi.cli.bench import make_parameters, measure
from a8multi.cli.candidates import CANDIDATES, REFERENCE, Candidate
from a8multi.cli.parameter_sets import PARAMETER_SETS

Command = Callable[..., Any]
CPU = torch.device("cpu")
SHAPES: list[tuple[int, ...]] = [(64, 128), (64,), (3, 5, 7)]


@pytest.fixture
def bench(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `a8multi bench` on three small tensors of the CPU."""
    monkeypatch.setitem(PARAMETER_SETS, "tiny", lambda: SHAPES)
    return lambda *arguments: command("bench", "--set", "tiny", "--device", "cpu", "--steps", 3, *arguments)


@pytest.mark.parametrize(
    ("name", "tensor_count", "parameter_count"),
    [
        ("tinyllama-1.1b", 201, 1_100_048_384),
        ("lora-r16-7b", 448, 29_360_128),
        ("vit-s", 149, 22_049_512),
        ("gpt2-52m", 73, 52_176_384),
        ("lora-r8", 128, 2_097_152),
    ],
)
def test_parameter_sets(name: str, tensor_count: int, parameter_count: int) -> None:
    shapes = PARAMETER_SETS[name]()
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensor_count, parameter_count)


def test_parameters_are_as_announced_and_seeded() -> None:
    shapes: list[tuple[int, ...]] = [(300, 300)]
    (one,), (again,), (other,) = (make_parameters(shapes, CPU, torch.bfloat16, seed) for seed in (0, 0, 1))
    assert one.grad is not None
    assert (one.dtype, one.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert one.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert one.grad.float().std().item() == pytest.approx(1e-3, rel=0.02)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_table_and_json_hold_every_optimizer(bench: Command, tmp_path: Path) -> None:
    result = bench("--only", "a8multi", "--dtype", "bf16", "--json", tmp_path / "b.json", "--threads", 1)
    assert result.status == 0, result.out + result.err
    document = json.loads((tmp_path / "b.json").read_text())
    assert (document["set"], document["dtype"], document["device"], document["threads"]) == ("tiny", "bf16", "cpu", 1)
    assert document["parameter_count"] == 64 * 128 + 64 + 105
    assert document["versions"]["torch"] == torch.__version__
    assert "..." not in result.out  # who reads the results alone does not end the measurement
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [REFERENCE.name] + [one.name for one in CANDIDATES if one.package == "a8multi"]
    for name, row in rows.items():
        assert name in result.out
        assert len(row["times_ms"]) == len(row["reference_times_ms"]) == 3
        assert row["ms"] == statistics.median(row["times_ms"]) > 0
        ratios = [a / b for a, b in zip(row["times_ms"], row["reference_times_ms"], strict=True)]
        assert row["ratio"] == statistics.median(ratios)
        assert row["ratio_of_medians"] == row["ms"] / statistics.median(row["reference_times_ms"])
    # Two moments of two bytes; the step counters of three tensors add a little.
    assert rows[REFERENCE.name]["state_bytes_per_param"] == pytest.approx(4, abs=0.01)


class Candidates(torch.optim.SGD):
    """Writes down who steps."""

    order: ClassVar[list[str]] = []
    name = "candidate"

    def step(self, closure: Any = None) -> None:
        self.order.append(self.name)


class References(Candidates):
    name = "reference"


def test_candidate_and_reference_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "REFERENCE", Candidate("reference", f"{__name__}:References"))
    candidate = Candidate("x", f"{__name__}:Candidates")
    row = measure(candidate, make_parameters(SHAPES, CPU, torch.float32, 0), CPU, 4)
    assert row.error is None
    assert Candidates.order == ["reference", "candidate"] * (2 + 4)


class Broken(torch.optim.SGD):
    def __init__(self, *arguments: object, **options: object) -> None:
        raise OSError("no kernel image\nfor this device")


def test_failing_peer_is_a_row_with_the_reason(bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = (Candidate("broken peer", f"{__name__}:Broken"), *CANDIDATES)
    monkeypatch.setattr(candidates, "CANDIDATES", peers)
    result = bench("--only", "broken*", "--json", tmp_path / "b.json")
    assert result.status == 0
    assert "broken peer: OSError: no kernel image" in result.out
    assert json.loads((tmp_path / "b.json").read_text())["rows"][1]["ms"] is None


def test_failure_of_ours_is_exit_status_1(bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Candidate("a8multi X", "a8multi:AdamW8bit", {"lr": -1.0})
    monkeypatch.setattr(candidates, "CANDIDATES", (failing,))
    result = bench()
    assert result.status == 1
    assert "a8multi X: ValueError: lr must be" in result.out


def test_rank_of_apollo_fits_every_matrix() -> None:
    (ours,) = (one for one in CANDIDATES if one.name == "a8multi APOLLO8bit rank 256")
    parameters = make_parameters([(300, 512), (512,), (16, 4096), (300, 300)], CPU, torch.float32, 0)
    groups = ours.build(parameters).param_groups
    found = {group["apollo_rank"]: [tuple(one.shape) for one in group["params"]] for group in groups}
    assert found == {256: [(300, 512), (512,), (300, 300)], 16: [(16, 4096)]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "0 is not 1 or more"),
        (["--only", "nothing"], "a8multi AdamW8bit"),
        (["--json", "no-such-directory/b.json"], "no-such-directory"),
        (["--json", "."], "--json .: cannot be written"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "--device meta"),
        (["--threads", "3000000000"], "--threads: 3000000000 is more than"),
        (["--seed", "99999999999999999999999"], "--seed: 99999999999999999999999 is more than"),
    ],
)
def test_bad_arguments(bench: Command, arguments: list[str], words: str) -> None:
    result = bench(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("a8multi bench: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_table_is_shown_when_the_file_cannot_be_written(bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may be full by then."""
    monkeypatch.setattr(bench_command, "require_writable", lambda option, path: None)
    result = bench("--only", "a8multi Lion8bit", "--json", ".")
    assert result.status == 2
    assert "ratio" in result.out
    assert "a8multi bench: error: --json .: cannot be written" in result.err


def test_too_little_memory_is_one_line(bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 7 GiB.\nAnd more")

    monkeypatch.setattr(bench_command, "make_parameters", fail)
    result = bench()
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert "CUDA out of memory. Tried to allocate 7 GiB.); choose a smaller --set" in result.err

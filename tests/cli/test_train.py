"""`a8multi train`: resuming, stopping, comparing, and what it writes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from a8multi.cli import train as train_command
from a8multi.cli.data import load_text
from a8multi.cli.optimizers import OPTIMIZERS
from a8multi.cli.trainer import CHECKPOINT_NAME, TrainConfig, Trainer

Command = Callable[..., Any]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / CHECKPOINT_NAME, weights_only=True)


def _bits(value: Any) -> Any:
    """The value with every tensor as (dtype, shape, bytes), so that == compares bits: 0.0 is not -0.0."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(item) for item in value]
    return value


def _assert_same_bits(one: Path, other: Path) -> None:
    first, second = _checkpoint(one), _checkpoint(other)
    assert first["step"] == second["step"]
    assert len(first["runs"]) == len(second["runs"])
    for a, b in zip(first["runs"], second["runs"], strict=True):
        for part in ("model", "optimizer", "losses"):
            assert _bits(a[part]) == _bits(b[part]), part


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_resume_is_bit_exact(train: Command, command: Command, tmp_path: Path, optimizer: str, dtype: str) -> None:
    options = ["--optimizer", optimizer, "--dtype", dtype, "--warmup", 12]
    assert train(*options, "--steps", 20, "--output", tmp_path / "straight").status == 0
    assert train(*options, "--steps", 10, "--output", tmp_path / "resumed").status == 0
    halfway, end = (_checkpoint(tmp_path / name)["runs"][0]["model"] for name in ("resumed", "straight"))
    assert not torch.equal(halfway["byte_embedding.weight"], end["byte_embedding.weight"])
    # Work in between must not matter: nothing may draw from torch's own generator.
    torch.rand(3)
    assert command("train", "--resume", tmp_path / "resumed", "--steps", 20).status == 0
    _assert_same_bits(tmp_path / "straight", tmp_path / "resumed")


def test_eight_bit_state_is_in_the_checkpoint(train: Command, tmp_path: Path) -> None:
    """Guards the test above: on a model whose tensors are all too small to quantise it would show nothing."""
    train("--optimizer", "adamw8bit", "--steps", 2, "--output", tmp_path)
    states = _checkpoint(tmp_path)["runs"][0]["optimizer"]["state"].values()
    dtypes = {value.dtype for state in states for value in state.values() if isinstance(value, torch.Tensor)}
    assert dtypes & {torch.int8, torch.uint8}


def test_compare_resumes_both_runs(train: Command, command: Command, tmp_path: Path) -> None:
    assert train("--compare", "--steps", 8, "--output", tmp_path / "straight").status == 0
    assert train("--compare", "--steps", 3, "--output", tmp_path / "resumed").status == 0
    assert command("train", "--resume", tmp_path / "resumed" / CHECKPOINT_NAME, "--steps", 8).status == 0
    _assert_same_bits(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor8bit"])
def test_compare_trains_the_twin_beside(train: Command, tmp_path: Path, optimizer: str) -> None:
    twin = OPTIMIZERS[optimizer].twin
    result = train("--optimizer", optimizer, "--compare", "--steps", 60, "--output", tmp_path)
    assert result.status == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG_SIGNATURE)
    ours, theirs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert (ours["optimizer"], theirs["optimizer"]) == (optimizer, twin)
    # The same weights and batch: the losses before the first update are the same float.
    assert ours["losses"][0] == theirs["losses"][0]
    assert ours["losses"][0] - ours["train_loss"] > 0.5
    assert ours["train_loss"] == pytest.approx(sum(ours["losses"][-20:]) / 20)
    assert abs(ours["train_loss"] - theirs["train_loss"]) < 0.02
    for word in (optimizer, twin, "bytes/param", "optimizer s", "backend", "Loss difference at step 60"):
        assert word in result.out
    assert f"{ours['train_loss'] - theirs['train_loss']:+.4f} train" in result.out


def test_state_is_smaller_than_the_twins(train: Command, tmp_path: Path) -> None:
    train("--compare", "--steps", 2, "--output", tmp_path)
    ours, theirs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert theirs["state_bytes"] / theirs["parameter_count"] == pytest.approx(8, abs=0.01)
    # Small vectors stay in fp32, hence the room above 2.06.
    assert ours["state_bytes"] / ours["parameter_count"] < 2.6


def test_twin_of_bf16_is_fp32_from_the_same_values(text_file: Path) -> None:
    config = TrainConfig(compare=True, dtype="bf16", width=64, layers=1, heads=2, context=16, batch_size=2)
    ours, twin = Trainer(config, load_text(str(text_file), 16)).runs
    for a, b in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
        assert (a.dtype, b.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(a.float(), b)


def test_learning_rate_warms_up(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(optimizer="adamw", lr=1.0, warmup=3, width=8, layers=1, heads=1, context=4, batch_size=1)
    trainer = Trainer(config, load_text(str(text_file), 4))
    optimizer = trainer.runs[0].optimizer
    seen = []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(6):
        trainer.train_step()
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_ctrl_c_finishes_the_step_and_resumes(
    train: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--steps", 12, "--output", tmp_path / "straight").status == 0
    backward = torch.Tensor.backward

    def backward_and_interrupt(self: torch.Tensor, *args: Any) -> None:
        backward(self, *args)
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward_and_interrupt)
        stopped = train("--steps", 12, "--output", tmp_path / "stopped")
    assert stopped.status == 130
    assert _checkpoint(tmp_path / "stopped")["step"] == 7
    assert not (tmp_path / "stopped" / "loss.png").exists()
    line = next(line for line in stopped.out.splitlines() if line.startswith("Go on with: a8multi "))
    resumed = command(*shlex.split(line.removeprefix("Go on with: a8multi ")))
    assert resumed.status == 0
    assert (tmp_path / "stopped" / "loss.png").exists()
    _assert_same_bits(tmp_path / "straight", tmp_path / "stopped")


def test_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with train_command.StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals: Windows cannot send SIGINT to one process")
def test_ctrl_c_of_a_real_process(tmp_path: Path, tiny_arguments: list[str]) -> None:
    options = "--steps 1000000 --checkpoint-every 5"
    process = subprocess.Popen(
        [sys.executable, "-m", "a8multi", *tiny_arguments, *options.split(), "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    checkpoint = tmp_path / "run" / CHECKPOINT_NAME
    deadline = time.monotonic() + 60
    try:
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert f"a8multi train --resume {checkpoint}" in out
    assert _checkpoint(tmp_path / "run")["step"] >= 5


def test_earlier_checkpoint_is_kept(train: Command, tmp_path: Path) -> None:
    train("--optimizer", "adamw", "--steps", 2, "--output", tmp_path)
    result = train("--optimizer", "adamw", "--steps", 3, "--output", tmp_path)
    assert "checkpoint.previous.pt" in result.out
    assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["step"] == 2
    assert _checkpoint(tmp_path)["step"] == 3


def _one_line_error(result: Any, *words: str) -> None:
    assert result.status == 2
    assert result.out == ""
    assert result.err.startswith("a8multi train: error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "0 is not 1 or more"]),
        (["--steps", "many"], ["'many' is not a whole number"]),
        (["--lr", "nan"], ["--lr"]),
        (["--seed", "-1"], ["--seed"]),
        (["--optimizer", "sgd"], ["adamw8bit", "adafactor8bit"]),
        (["--data", "no-such-file"], ["no-such-file", "no such file"]),
        (["--context", "100000"], ["--context"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--device", "meta"], ["--device meta"]),
        (["--threads", "3000000000"], ["--threads", "3000000000"]),
        (["--width", "100000000"], ["--width", "100000000"]),
        (["--batch-size", "1000000000000"], ["--batch-size", "1000000000000"]),
        (["--seed", "99999999999999999999999"], ["--seed", "99999999999999999999999"]),
        (["--heads", "3"], ["width 64 is not a multiple of heads 3"]),
        (["--resume", "no-such-checkpoint"], ["no checkpoint at no-such-checkpoint"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_bad_arguments(train: Command, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    _one_line_error(train("--output", tmp_path, *arguments), *words)


@pytest.fixture
def finished(train: Command, tmp_path: Path) -> Path:
    """The directory of a finished run of two steps."""
    train("--optimizer", "adamw", "--steps", 2, "--output", tmp_path / "finished")
    return tmp_path / "finished"


def test_resume_refuses_what_would_change_the_bits(command: Command, finished: Path) -> None:
    _one_line_error(command("train", "--resume", finished, "--steps", 4, "--seed", 5), "--seed 5", "checkpoint's 0")
    _one_line_error(command("train", "--resume", finished), "2 steps already", "--steps N")


def test_resume_refuses_another_text(command: Command, finished: Path, text_file: Path) -> None:
    text_file.write_bytes(text_file.read_bytes().replace(b"fox", b"cat"))
    _one_line_error(command("train", "--resume", finished, "--steps", 4), "not the one this checkpoint was trained on")


@pytest.mark.parametrize("content", ["text", "tensor", "truncated"])
def test_resume_refuses_what_is_no_checkpoint(command: Command, finished: Path, content: str) -> None:
    path = finished / CHECKPOINT_NAME
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "tensor":
        torch.save(torch.ones(3), path)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    _one_line_error(command("train", "--resume", finished, "--steps", 4), str(path), "checkpoint")


def _drop(checkpoint: dict[str, Any], name: str) -> None:
    del checkpoint[name]


def _option(checkpoint: dict[str, Any], **options: Any) -> None:
    checkpoint["config"] |= options


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda it: _drop(it, "config"), "config"),
    "no step": (lambda it: _drop(it, "step"), "step"),
    "no text": (lambda it: _drop(it, "text_digest"), "text_digest"),
    "no runs": (lambda it: _drop(it, "runs"), "runs"),
    "no run": (lambda it: it["runs"].clear(), "does not fit"),
    "no losses": (lambda it: _drop(it["runs"][0], "losses"), "losses"),
    "optimizer": (lambda it: _option(it, optimizer="sgd8bit"), "optimizer 'sgd8bit'"),
    "dtype": (lambda it: _option(it, dtype="fp8"), "dtype 'fp8'"),
    "width in words": (lambda it: _option(it, width="wide"), "width 'wide'"),
    "width": (lambda it: _option(it, width=32), "size mismatch"),
    "other state": (lambda it: _option(it, optimizer="adafactor8bit"), "does not fit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_from_a_damaged_checkpoint_is_one_line(command: Command, finished: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    checkpoint, path = _checkpoint(finished), finished / CHECKPOINT_NAME
    damage(checkpoint)
    torch.save(checkpoint, path)
    _one_line_error(command("train", "--resume", finished, "--steps", 4), str(path), words)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("[...] can't allocate memory: 9 bytes")])
def test_too_little_memory_is_one_line(train: Command, tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    def fail(_self: Trainer) -> None:
        raise error

    monkeypatch.setattr(Trainer, "train_step", fail)
    result = train("--output", tmp_path)
    assert result.status == 2
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith(f"a8multi train: error: there is not enough memory ({error})")
    assert "--batch-size" in last_line


# --- Where the results go. ---


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ("a-file", "a-file"),
        ("a-file/below", "a-file/below"),
        ("run", "run/loss.png"),
        ("run", "run/result.json"),
        ("run", f"run/{CHECKPOINT_NAME}.partial"),
    ],
)
def test_output_is_tried_before_the_first_step(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, fault: str
) -> None:
    monkeypatch.setattr(Trainer, "train_step", lambda _self: pytest.fail("took a step"))
    (tmp_path / "a-file").touch()
    if output == "run":
        (tmp_path / fault).mkdir(parents=True)
    _one_line_error(train("--output", tmp_path / output), f"--output {tmp_path / fault}: cannot be written")


def test_table_is_shown_when_a_file_cannot_be_written(train: Command, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(_trainer: Trainer, _path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_command, "_plot", fail)
    result = train("--steps", 2, "--output", tmp_path)
    assert result.status == 2
    assert "bytes/param" in result.out
    assert f"a8multi train: error: --output {tmp_path / 'loss.png'}: cannot be written (No space left" in result.err
    assert json.loads((tmp_path / "result.json").read_text())["steps_done"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a system whose closed pipes are an error of their own")
def test_results_are_written_for_a_reader_of_one_line(tiny_arguments: list[str], tmp_path: Path) -> None:
    """`a8multi train | head -1`."""
    command = [sys.executable, "-m", "a8multi", *tiny_arguments, "--steps", "2", "--output", str(tmp_path / "run")]
    # Unbuffered, its very first words may come too late for such a reader, which ends it before the first step.
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline().startswith("Model: ")
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    finally:
        process.stderr.close()
        process.kill()
        process.wait()
    assert process.returncode == 141, err
    assert "Traceback" not in err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {CHECKPOINT_NAME, "loss.png", "result.json"}


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_extra_names_the_command(train: Command, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    _one_line_error(train(), package, 'pip install "a8multi[train]"')


def test_divergence_is_reported(train: Command, tmp_path: Path) -> None:
    result = train("--optimizer", "adamw", "--lr", "1e30", "--warmup", 0, "--steps", 50, "--output", tmp_path)
    assert result.status == 1
    assert "diverged" in result.err
    assert "--lr" in result.err

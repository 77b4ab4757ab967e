"""Runs that are killed, stopped or half-saved, and go on as though nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train_runs import Workplace, read_json, read_lines

from train import sft
from train.callbacks import Stopper
from train.run import COMPLETE

ROOT = Path(__file__).parents[1]
# Dropout, parts of a step, several epochs, a validation: all that a checkpoint has to bring back.
SETTINGS: dict[str, Any] = {
    "num_epochs": 50,
    "n_checkpoints": 25,
    "lora__dropout": 0.2,
    "micro_batch_size": 3,
    "validation_fraction": 0.25,
    "n_evals": 5,
}
WAIT_S = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def whole(place: Workplace) -> Path:
    status, run = place.run("whole", **SETTINGS)
    assert status == 0
    return run


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def start(place: Workplace, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.sft", *place.words(name, **SETTINGS)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"train_loss") >= step):
        assert process.poll() is None, "the trainer ended by itself"
        assert time.monotonic() < deadline, "the trainer does not get on"
        time.sleep(0.005)


def test_killed_at_any_moment_it_ends_in_the_same_adapter(place: Workplace, whole: Path) -> None:
    run = place.folder / "killed"
    process = start(place, "killed")
    wait_for_step(run, 17, process)
    process.kill()
    process.wait()
    assert not (run / "result.json").exists()
    assert not (run / "adapter").exists()
    assert list(run.glob(f"checkpoints/*/{COMPLETE}"))
    status, _ = place.run("killed", **SETTINGS)
    assert status == 0
    assert adapter(run) == adapter(whole)
    steps = [r["step"] for r in read_lines(run / "metrics.jsonl") if "train_loss" in r]
    assert steps == list(range(1, 151))  # each once, though some were trained twice
    assert tokens_of(run) == tokens_of(whole)  # counted on, not from 0
    messages = [event["message"] for event in read_lines(run / "events.jsonl")]
    assert len(messages) == len(set(messages)) == 25


@pytest.mark.slow
def test_killed_at_ten_random_moments(place: Workplace, whole: Path) -> None:
    """Kill -9 while it starts, trains or saves: the adapter is the same bytes."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)  # shown when the test fails
    moments = random.Random(seed)
    run = place.folder / "killed-ten-times"
    reached = []
    for kill in range(10):
        process = start(place, run.name)
        if kill % 5 == 0:  # somewhere from the import of torch to the first step
            time.sleep(moments.uniform(0, 8))
        else:
            done = len(steps_of(run))
            wait_for_step(run, min(done + moments.randrange(1, 15), 145), process)
            time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.wait()
        reached.append(max(steps_of(run), default=0))
        assert not (run / "result.json").exists()
    status, _ = place.run(run.name, **SETTINGS)
    assert status == 0
    assert adapter(run) == adapter(whole)
    assert steps_of(run) == list(range(1, 151))
    assert len(set(reached)) > 5, reached


def tokens_of(run: Path) -> list[int]:
    records = read_lines(run / "metrics.jsonl")
    return [record["trained_tokens"] for record in records if "train_loss" in record]


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last
    return [record["step"] for record in records if "train_loss" in record]


def test_told_to_stop_it_saves_and_ends_soon(place: Workplace, whole: Path) -> None:
    run = place.folder / "stopped"
    process = start(place, "stopped")
    wait_for_step(run, 5, process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=WAIT_S) == sft.STOPPED == 143
    assert time.monotonic() - asked < 10
    last = max(r["step"] for r in read_lines(run / "metrics.jsonl"))
    assert (run / f"checkpoints/checkpoint-{last}" / COMPLETE).exists()
    assert not (run / "error.json").exists()
    status, _ = place.run("stopped", **SETTINGS)
    assert status == 0
    assert adapter(run) == adapter(whole)


def test_killed_after_training_it_only_publishes(place: Workplace, whole: Path) -> None:
    run = place.folder / "published"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    (run / "adapter").rename(run / "adapter.tmp")
    resolved = (run / "resolved_config.json").read_text("utf-8")
    (run / "resolved_config.json").write_text(resolved.replace(str(whole), str(run)))
    status, _ = place.run("published", **SETTINGS)
    assert status == 0
    assert adapter(run) == adapter(whole)
    assert not (run / "adapter.tmp").exists()
    assert read_json(run / "result.json")["steps"] == 150


def test_a_half_written_checkpoint_is_passed_over(place: Workplace, whole: Path) -> None:
    run = place.folder / "half"
    run.mkdir()
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    (newest / COMPLETE).unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    status, _ = place.run("half", **SETTINGS)
    assert status == 0
    assert adapter(run) == adapter(whole)


def test_an_unfinished_run_is_not_resumed_with_other_settings(
    place: Workplace, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.folder / "mixed"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    status, _ = place.run("mixed", **{**SETTINGS, "learning_rate": 0.5, "seed": 3})
    assert status == 2
    told = capsys.readouterr().err
    assert "learning_rate is 0.5, but the unfinished run" in told
    assert "seed is 3" in told


def test_a_stop_before_training_ends_at_once() -> None:
    with pytest.raises(SystemExit) as caught:
        Stopper()._receive(signal.SIGTERM, None)
    assert caught.value.code == sft.STOPPED


def test_a_step_that_lasts_too_long_is_given_up() -> None:
    code = (
        "import os, signal, time; from train import callbacks; callbacks.GRACE_S = 0.2; "
        "stopper = callbacks.Stopper(); stopper.install(); stopper.on_train_begin(); "
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=WAIT_S)
    assert done.returncode == sft.STOPPED

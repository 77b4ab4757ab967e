"""The same folder asked again: what a run that began there allows, refuses and remembers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import Workplace, read_json, read_lines, write_rows

from train.run import COMPLETE, RunFolder
from train.sft_trainer import LoraTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def rows(place: Workplace) -> Path:
    return write_rows(place.folder / "own.jsonl")


@pytest.fixture(scope="module")
def finished(place: Workplace, rows: Path) -> Path:
    status, run = place.run("finished", train_file=rows, validation_fraction=0.25)
    assert status == 0
    return run


def unfinished(run: Path, name: str) -> Path:
    """Return a copy of a run as it is before its adapter is saved."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "adapter")
    return copy


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.parent.name[11:]) for path in run.glob(f"checkpoints/*/{COMPLETE}"))


def test_a_finished_run_with_other_settings_is_refused(
    place: Workplace, finished: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"train_file": rows, "validation_fraction": 0.25}
    assert place.run("finished", **settings, micro_batch_tokens=64)[0] == 0
    assert place.run("finished", **settings, learning_rate=0.5)[0] == 2
    told = capsys.readouterr().err
    assert "learning_rate is 0.5, but the finished run in" in told
    assert not (finished / "error.json").exists()


def test_what_saves_memory_may_change(place: Workplace, finished: Path, rows: Path) -> None:
    run = unfinished(finished, "thrifty")
    status, _ = place.run(
        run.name,
        train_file=rows,
        validation_fraction=0.25,
        micro_batch_tokens=64,
        gradient_checkpointing=True,
    )
    assert status == 0
    assert adapter(run) == adapter(finished)  # it had all its steps
    assert read_json(run / "resolved_config.json")["plan"]["micro_batch_tokens"] == 64


def test_seconds_are_those_of_all_attempts(place: Workplace, finished: Path, rows: Path) -> None:
    run = unfinished(finished, "long")
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None
    assert 0 < json.loads((newest / COMPLETE).read_text())["seconds"] < 600
    (newest / COMPLETE).write_text('{"seconds": 1000.0}')
    assert place.run(run.name, train_file=rows, validation_fraction=0.25)[0] == 0
    assert 1000 <= read_json(run / "result.json")["seconds"] < 1600


def test_a_changed_file_is_refused(
    place: Workplace, finished: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(finished, "changed")
    kept = rows.read_text()
    write_rows(rows, 25)
    try:
        status, _ = place.run(run.name, train_file=rows, validation_fraction=0.25)
    finally:
        rows.write_text(kept)
    assert status == 2
    told = capsys.readouterr().err
    assert f"train_file {rows} has changed since the unfinished run in {run} began" in told
    assert "validation_file" not in told
    assert place.run(run.name, train_file=rows, validation_fraction=0.25)[0] == 0
    assert adapter(run) == adapter(finished)


def test_another_base_is_refused(place: Workplace, finished: Path, rows: Path) -> None:
    run = unfinished(finished, "other-base")
    resolved = read_json(run / "resolved_config.json")
    resolved["base"]["fingerprint"] = "another"
    (run / "resolved_config.json").write_text(json.dumps(resolved))
    status, _ = place.run(run.name, train_file=rows, validation_fraction=0.25)
    assert status == 2
    assert f"base_model {place.base} has changed" in read_json(run / "error.json")["message"]


def test_the_validation_loss_told_is_that_of_the_adapter(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loss rises, the last step's without early stopping, the first's with it."""

    def rising(self: LoraTrainer, *_: Any) -> torch.Tensor:
        return torch.tensor([self.state.global_step, 0, 1], dtype=torch.float64)

    monkeypatch.setattr(LoraTrainer, "_sums", rising)
    for name, early, wanted in (("rising", False, 6.0), ("best", True, 1.0)):
        status, run = place.run(
            name, validation_fraction=0.1, n_evals=6, early_stopping__enabled=early
        )
        assert status == 0
        losses = [r["valid_loss"] for r in read_lines(run / "metrics.jsonl") if "valid_loss" in r]
        assert losses == [1, 2, 3, *([] if early else [4, 5, 6])]
        assert read_json(run / "result.json")["valid_loss"] == wanted


def test_a_run_that_stopped_early_stays_stopped(place: Workplace) -> None:
    settings: dict[str, Any] = {
        "num_epochs": 20,
        "learning_rate": 1e-5,
        "validation_fraction": 0.25,
        "n_evals": 20,
        "early_stopping__enabled": True,
        "early_stopping__min_delta": 1,
    }
    status, run = place.run("early", **settings)
    assert status == 0
    first, trained = read_json(run / "result.json"), (run / "metrics.jsonl").read_text()
    assert first["steps"] == 9
    again = unfinished(run, "early-again")
    assert place.run(again.name, **settings)[0] == 0
    result = read_json(again / "result.json")
    for name in ("steps", "valid_loss", "best_step", "trained_tokens", "train_loss"):
        assert result[name] == first[name], name
    assert adapter(again) == adapter(run)
    assert (again / "metrics.jsonl").read_text() == trained
    assert (again / "events.jsonl").read_text() == (run / "events.jsonl").read_text()


def test_an_old_checkpoint_stays_until_the_new_one_is_whole(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = RunFolder.mark_complete

    def killed(self: RunFolder, step: int, *args: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        mark(self, step, *args)

    settings: dict[str, Any] = {"n_checkpoints": 6, "keep_checkpoints": 1}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_complete", killed)
        with pytest.raises(KeyboardInterrupt):
            place.run("one-kept", **settings)
    run = place.folder / "one-kept"
    assert steps_of(run) == [3]
    assert place.run("one-kept", **settings)[0] == 0
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-6"]


def test_warnings_are_told_where_the_command_is_run(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_length": 24, "num_epochs": 1}
    assert place.run("warned", "--dry-run", **settings)[0] == 0
    assert "examples of train.jsonl truncated to 24 tokens" in capsys.readouterr().out
    assert place.run("warned", **settings)[0] == 0
    assert "warned: warning: " in capsys.readouterr().err

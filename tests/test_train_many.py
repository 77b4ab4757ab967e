"""Several adapters at once: each must come out as though it had been trained alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_runs import Workplace, read_json, read_lines, signals_restored, write_rows

from train import many, together
from train.run import COMPLETE

ROOT = Path(__file__).parents[1]
WAIT_S = 120.0
# Of different sizes, shapes, schedules and ends; the third has dropout and cannot join a product.
MEMBERS: dict[str, dict[str, Any]] = {
    "long": {"num_epochs": 4, "lora__r": 4, "n_checkpoints": 6, "seed": 1},
    "short": {"num_epochs": 1, "batch_size": 5, "learning_rate": 3e-3, "micro_batch_size": 2},
    "dropout": {"num_epochs": 2, "lora__dropout": 0.3, "seed": 3},
    "stops": {
        "num_epochs": 12,
        "learning_rate": 0.05,
        "validation_fraction": 0.25,
        "n_evals": 12,
        "early_stopping__enabled": True,
        "early_stopping__patience": 1,
        "weight_decay": 0.1,
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"), "qwen2")


@pytest.fixture(scope="module")
def alone(place: Workplace) -> dict[str, Path]:
    runs = {}
    for name, settings in MEMBERS.items():
        status, runs[name] = place.run(f"alone-{name}", **settings)
        assert status == 0
    return runs


def config(place: Workplace, folder: str, **settings: Any) -> Path:
    """Write the configuration of a run in `folder`; returns its path."""
    values: dict[str, Any] = {}
    for word in place.words(folder, **settings):
        key, _, value = word.partition("=")
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name or key] = yaml.safe_load(value)
    path = place.folder / f"{folder}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def together_runs(
    place: Workplace, prefix: str, members: dict[str, dict[str, Any]] = MEMBERS, *flags: str
) -> tuple[int, dict[str, Path]]:
    paths = [str(config(place, f"{prefix}-{name}", **given)) for name, given in members.items()]
    with signals_restored():
        status = many.main([*flags, "--config", *paths])
    return status, {name: place.folder / f"{prefix}-{name}" for name in members}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "adapter/adapter_model.safetensors"))


def losses(run: Path) -> list[tuple[int, float]]:
    name = ("train_loss", "valid_loss")
    return [
        (line["step"], line[key])
        for line in read_lines(run / "metrics.jsonl")
        for key in name
        if key in line
    ]


def assert_same_run(run: Path, other: Path, exactly: bool) -> None:
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    steps, values = zip(*losses(run), strict=True)
    other_steps, others = zip(*losses(other), strict=True)
    assert steps == other_steps
    assert values == (others if exactly else pytest.approx(others, rel=1e-4))
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if exactly:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3, msg=name)
    for name in ("steps", "best_step", "trained_tokens"):
        assert read_json(run / "result.json")[name] == read_json(other / "result.json")[name]


def test_at_once_each_is_what_it_is_alone(
    place: Workplace, alone: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = []
    plain = together.run_layer
    monkeypatch.setattr(together, "run_layer", lambda s: (joined.append(len(s)), plain(s))[1])
    status, runs = together_runs(place, "joint")
    assert status == 0
    assert {2, 3} <= set(joined)  # while the short one lasts, and after
    for name, run in runs.items():
        assert_same_run(run, alone[name], exactly=False)


def test_without_joint_products_it_is_the_same_bit_for_bit(
    place: Workplace, alone: dict[str, Path]
) -> None:
    status, runs = together_runs(place, "turns", MEMBERS, "--max-tokens", "0")
    assert status == 0
    for name, run in runs.items():
        assert_same_run(run, alone[name], exactly=True)


def test_a_run_that_fails_harms_no_other(
    place: Workplace, alone: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    members = {
        "short": MEMBERS["short"],
        "diverges": {"learning_rate": 1e30, "num_epochs": 4},
        "long": MEMBERS["long"],
        "no-rows": {"train_file": place.folder / "absent.jsonl"},
    }
    capsys.readouterr()
    status, runs = together_runs(place, "fails", members, "--json")
    assert status == 1  # of the first that failed
    errors = {name: run / "error.json" for name, run in runs.items()}
    assert read_json(errors["diverges"])["code"] == "loss_not_finite"
    assert read_json(errors["no-rows"])["code"] == "file_not_found"
    for name in ("short", "long"):
        assert not errors[name].exists()
        assert_same_run(runs[name], alone[name], exactly=False)
    told = json.loads(capsys.readouterr().out)
    assert [one["status"] for one in told] == ["succeeded", "failed", "succeeded", "failed"]
    assert told[0]["steps"] == 5
    assert told[1]["code"] == "loss_not_finite"


def test_a_joint_pass_without_memory_is_computed_one_by_one(
    place: Workplace, alone: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = together.run_layer

    def scarce(segments: Any) -> Any:
        if len(segments) > 1 and segments[0].layer.self_attn.layer_idx == 1:
            raise RuntimeError("not enough memory")
        return plain(segments)

    monkeypatch.setattr(together, "run_layer", scarce)
    members = {name: MEMBERS[name] for name in ("long", "short")}
    status, runs = together_runs(place, "scarce", members)
    assert status == 0
    for name, run in runs.items():
        assert_same_run(run, alone[name], exactly=True)


def start(place: Workplace, prefix: str, members: dict[str, dict[str, Any]]) -> Any:
    paths = [str(config(place, f"{prefix}-{name}", **given)) for name, given in members.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "train.many", "--config", *paths],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(run: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"train_loss") >= step):
        assert process.poll() is None, "the trainer ended by itself"
        assert time.monotonic() < deadline, "the trainer does not get on"
        time.sleep(0.005)


LONGER = {
    "one": {"num_epochs": 50, "n_checkpoints": 25, "validation_fraction": 0.25, "n_evals": 5},
    "two": {"num_epochs": 40, "n_checkpoints": 20, "lora__dropout": 0.2, "micro_batch_size": 3},
}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_or_stopped_all_go_on_from_their_checkpoints(
    place: Workplace, number: signal.Signals, status: int
) -> None:
    prefix = number.name.lower()
    process = start(place, prefix, LONGER)
    folders = {name: place.folder / f"{prefix}-{name}" for name in LONGER}
    wait_for_step(folders["two"], 17, process)
    process.send_signal(number)
    assert process.wait(timeout=WAIT_S) == status
    for folder in folders.values():
        assert not (folder / "result.json").exists()
        assert list(folder.glob(f"checkpoints/*/{COMPLETE}"))
    assert together_runs(place, prefix, LONGER)[0] == 0
    for name, settings in LONGER.items():
        done, other = place.run(f"{prefix}-alone-{name}", **settings)
        assert done == 0
        assert_same_run(folders[name], other, exactly=False)
        steps = [step for step, _ in losses(folders[name])]
        assert steps == sorted(steps)


def test_finished_runs_are_left_as_they_are(
    place: Workplace, alone: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("long", "short"):
        shutil.copytree(alone[name], place.folder / f"again-{name}")
        path = place.folder / f"again-{name}/resolved_config.json"
        path.write_text(path.read_text("utf-8").replace(f"alone-{name}", f"again-{name}"), "utf-8")
    (place.folder / "again-short/result.json").unlink()
    before = (place.folder / "again-long/result.json").stat().st_mtime_ns
    members = {name: MEMBERS[name] for name in ("long", "short")}
    status, runs = together_runs(place, "again", members)
    assert status == 0
    assert (runs["long"] / "result.json").stat().st_mtime_ns == before
    assert_same_run(runs["short"], alone["short"], exactly=True)

    capsys.readouterr()
    members = {"long": MEMBERS["long"] | {"seed": 99}}
    status, _ = together_runs(place, "again", members)
    assert status == 2
    assert "seed is 99, but the finished run in" in capsys.readouterr().err
    assert (runs["long"] / "result.json").stat().st_mtime_ns == before


def test_what_cannot_be_trained_at_once_is_told_together(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    first = config(place, "bad-1")
    second = config(
        *(place, "bad-2"),
        **{"dtype": "bfloat16", "lora__use_dora": True, "wandb__project": "p"},
        load_in_4bit=True,
    )
    same = config(place, "bad-3", output_dir=place.folder / "bad-1")
    assert many.main(["--config", str(first), str(second), str(same)]) == 2
    told = capsys.readouterr().err
    assert "dtype of run 2 is bfloat16, but float32 of run 1" in told
    assert "load_in_4bit of run 2 is True, but False of run 1" in told
    assert "runs 1 and 3 have the same output_dir" in told
    assert "run 2 asks lora.use_dora" in told
    assert "run 2 names wandb.project" in told
    assert not (place.folder / "bad-1").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning_rat=1"], "learning_rate"),
        (["base_model=absent-model"], "absent-model"),
    ],
)
def test_wrong_settings_start_nothing(
    place: Workplace, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    path = config(place, "wrong")
    with signals_restored():
        assert many.main(["--config", str(path), "--", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (place.folder / "wrong").exists()


def test_a_runs_folder_stands_for_its_configuration(place: Workplace) -> None:
    folder = place.folder / "as-folder"
    folder.mkdir()
    config(place, "as-folder", num_epochs=1).rename(folder / "config.yaml")
    with signals_restored():
        assert many.main(["--config", str(folder)]) == 0
    assert read_json(folder / "result.json")["status"] == "succeeded"


def test_more_processes_than_one_are_refused(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert many.main(["--config", str(config(place, "two-processes"))]) == 2
    assert "2 processes were launched" in capsys.readouterr().err


def test_rows_of_several_kinds_and_lengths(place: Workplace) -> None:
    """Each run has its own file; a shared base keeps the weights that it was loaded with."""
    before = (place.base / "model.safetensors").read_bytes()
    members = {}
    for name, count in (("few", 11), ("more", 40)):
        path = write_rows(place.folder / f"{name}.jsonl", count)
        members[name] = {"train_file": path, "num_epochs": 2, "lora__target_modules": "[q_proj]"}
    members["more"]["lora__target_modules"] = "all-linear"
    status, runs = together_runs(place, "files", members)
    assert status == 0
    for name, settings in members.items():
        assert place.run(f"files-alone-{name}", **settings)[0] == 0
        assert_same_run(runs[name], place.folder / f"files-alone-{name}", exactly=False)
    assert (place.base / "model.safetensors").read_bytes() == before

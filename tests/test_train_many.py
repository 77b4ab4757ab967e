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

"""Going on from an adapter, checkpoints laid out as models, early stopping, losses of rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import random_adapter, tiny_model, tiny_tokenizer
from train_runs import Workplace, read_json, read_lines

from data.adapter_checks import check_adapter
from data.render import IGNORED, render
from data.rows import PromptCompletion
from train.callbacks import evals_without_gain
from train.config import Plan, SftConfig
from train.trainer import _published, checkpoint_steps, spread

STILL = {"learning_rate": 1e-12, "num_epochs": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def first(place: Workplace) -> Path:
    """Three epochs, with the losses of the rows at the end."""
    status, run = place.run("first", num_epochs=3, score_examples=24, lora__r=4, learning_rate=0.02)
    assert status == 0
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_every_epochs_checkpoint_is_laid_out_as_an_adapter(first: Path) -> None:
    events = [event for event in read_lines(first / "events.jsonl") if event["data"]]
    assert [event["message"] for event in events] == [
        f"Checkpoint created at step {step}" for step in (3, 6, 9)
    ]
    assert [event["data"]["checkpoint"] for event in events] == [3, 6, 9]
    assert events[0]["data"]["metrics"]["step"] == 3
    assert math.isfinite(events[0]["data"]["metrics"]["train_loss"])
    origin = read_json(first / "adapter/hone.json")
    for step in (3, 6, 9):
        folder = first / f"models/step-{step}"
        facts = check_adapter(folder, origin["base_fingerprint"])
        assert facts.rank == 4
        assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "tiny-base"
    last, final = weights(first / "models/step-9"), weights(first / "adapter")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert {p.name for p in (first / "checkpoints").iterdir()} >= {"checkpoint-7", "checkpoint-9"}


def test_losses_of_rows_are_those_of_the_model(place: Workplace, first: Path) -> None:
    rows = read_lines(place.rows)
    found = read_lines(first / "example_losses.jsonl")
    assert [row["line"] for row in found] == list(range(1, 25))
    model = PeftModel.from_pretrained(tiny_model("llama"), str(first / "adapter")).eval()
    tokenizer = tiny_tokenizer()
    for row, scored in zip(rows, found, strict=True):
        example = render(tokenizer, PromptCompletion(row["prompt"], row["completion"]))
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        assert scored["loss"] == pytest.approx(loss, rel=1e-4)
        assert scored["tokens"] == len(example)
        assert scored["learned_tokens"] == sum(label != IGNORED for label in example.labels)
        assert 0 <= scored["token_accuracy"] <= 1


def test_too_many_rows_are_told_instead(place: Workplace) -> None:
    status, run = place.run("many", score_examples=23, **STILL)
    assert status == 0
    assert not (run / "example_losses.jsonl").exists()
    assert any("24 examples of" in e["message"] for e in read_lines(run / "events.jsonl"))


def test_a_run_goes_on_from_an_adapter(place: Workplace, first: Path) -> None:
    start = first / "models/step-6"
    status, run = place.run("second", start_adapter=start, **STILL)
    assert status == 0
    before, after = weights(start), weights(run / "adapter")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-6), name
    assert any(bool(tensor.any()) for name, tensor in after.items() if "lora_B" in name)
    found = read_json(run / "adapter/adapter_config.json")
    assert (found["r"], found["lora_alpha"]) == (4, 8)
    base = tiny_model("llama").state_dict()  # nothing was merged into it
    for name, tensor in load_file(place.base / "model.safetensors").items():
        assert torch.equal(base[name], tensor)


def test_the_loss_goes_on_where_it_was(place: Workplace, first: Path) -> None:
    """The first step from the end of a run is as good as that run's end, not as its start."""
    status, run = place.run("third", start_adapter=first / "adapter", num_epochs=1)
    assert status == 0
    early = read_lines(first / "metrics.jsonl")[0]["train_loss"]
    again = read_lines(run / "metrics.jsonl")[0]["train_loss"]
    assert again < early - 0.3


@pytest.mark.parametrize("case", ["shape", "base", "missing", "scores"])
def test_adapters_that_cannot_be_gone_on_from(place: Workplace, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "adapter"
    settings = {}
    if case != "missing":
        random_adapter(tiny_model("llama"), folder)
    if case == "base":
        origin = {"base_model": "another", "base_fingerprint": "base-another"}
        (folder / "hone.json").write_text(json.dumps(origin))
    if case == "shape":
        settings["lora__r"] = 8
    if case == "scores":
        (folder / "head.safetensors").write_bytes(b"")
    status, run = place.run(f"refused-{case}", start_adapter=folder, **settings)
    assert status in (1, 2)
    if case == "base":
        assert read_json(run / "error.json")["code"] == "adapter_wrong_base"
    if case == "scores":
        assert "is a reward model" in read_json(run / "error.json")["message"]


def test_what_is_no_adapter_of_the_other_base_is_refused_before_training(
    place: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    random_adapter(tiny_model("llama"), folder)
    origin = {"base_model": "another", "base_fingerprint": "base-another"}
    (folder / "hone.json").write_text(json.dumps(origin))
    given = {"compare_with": folder, "compare_base": place.base, "validation_fraction": 0.2}
    status, run = place.run("far", **given)
    assert status == 1
    assert "compare_with" in read_json(run / "error.json")["message"]
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("losses", "min_delta", "warmup", "stalled"),
    [
        ([], 0.0, 0, 0),
        ([3.0, 2.0, 1.0], 0.0, 0, 0),
        ([3.0, 2.0, 2.0, 2.5], 0.0, 0, 2),
        ([3.0, 2.95, 2.9, 2.85], 0.1, 0, 0),
        ([3.0, 2.99, 2.98], 0.1, 0, 2),
        ([3.0, 4.0, 5.0, 6.0], 0.0, 3, 1),
        ([3.0, 4.0, 2.0, 2.5], 0.0, 0, 1),
        ([3.0, math.nan], 0.0, 0, 1),
    ],
)
def test_evaluations_without_gain(
    losses: list[float], min_delta: float, warmup: int, stalled: int
) -> None:
    assert evals_without_gain(losses, min_delta, warmup) == stalled


def test_the_warm_up_puts_early_stopping_off(place: Workplace) -> None:
    status, run = place.run(
        "warm",
        num_epochs=20,
        learning_rate=1e-9,
        validation_fraction=0.25,
        n_evals=20,
        early_stopping__enabled=True,
        early_stopping__min_delta=1,
        early_stopping__warmup_evals=5,
    )
    assert status == 0
    # Evaluations are every 3 steps; 6 and 7 are the first that count.
    assert read_json(run / "result.json")["steps"] == 7 * 3


def test_as_many_evaluations_as_were_asked_for(place: Workplace) -> None:
    settings = {"validation_fraction": 0.5, "batch_size": 4, "num_epochs": 3}
    status, run = place.run("evaluations", n_evals=8, n_checkpoints=8, **settings)
    assert status == 0
    lines = read_lines(run / "metrics.jsonl")
    steps = [line["step"] for line in lines if "valid_loss" in line]
    assert steps == [2, 3, 4, 5, 6, 7, 8, 9]  # of nine
    told = [
        line["step"]
        for line in read_lines(run / "events.jsonl")
        if "checkpoint" in (line["data"] or {})
    ]
    assert told == steps


@pytest.mark.parametrize(("total", "count"), [(9, 8), (10, 4), (7, 7), (3, 20), (100, 1)])
def test_steps_are_spread_evenly_to_the_end(total: int, count: int) -> None:
    steps = sorted(spread(total, count))
    assert len(steps) == min(total, count)
    assert steps[-1] == total
    gaps = {after - before for before, after in zip([0, *steps], steps, strict=False)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "asked", "steps", "published"),
    [
        (8, 3, {}, range(3, 25, 3), range(3, 25, 3)),
        (2, 10, {}, (5, 10, 15, 20), (10, 20)),
        (1, 2, {}, (1, 2), (2,)),
        (3, 4, {}, (2, 4, 6, 8, 10, 12), (4, 8, 12)),
        (3, 4, {"n_checkpoints": 2}, (6, 12), (6, 12)),
        (1, 5, {"n_checkpoints": 3}, (2, 4, 5), (2, 4, 5)),
    ],
)
def test_when_checkpoints_are_made(
    tmp_path: Path,
    epochs: int,
    per_epoch: int,
    asked: dict[str, int],
    steps: object,
    published: object,
) -> None:
    config = SftConfig(train_file=tmp_path, output_dir=tmp_path, **asked)
    plan = Plan(
        num_epochs=epochs,
        batch_size=8,
        micro_batch_size=8,
        micro_batch_tokens=1024,
        learning_rate=1.0,
        learning_rate_multiplier=1.0,
        max_length=8,
        steps_per_epoch=per_epoch,
        total_steps=epochs * per_epoch,
    )
    found = checkpoint_steps(config, plan)
    assert sorted(found) == list(steps)  # type: ignore[call-overload]
    is_published = _published(config, plan, found)
    assert [s for s in sorted(found) if is_published(s)] == list(published)  # type: ignore[call-overload]

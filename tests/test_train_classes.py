"""Classification metrics of a validation, beside scikit-learn over PEFT's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sklearn import metrics
from tiny_models import random_adapter, tiny_model, tiny_tokenizer
from train_runs import ROOT, Workplace, launch, read_lines
from transformers import AutoModelForCausalLM

from data.errors import InvalidInput
from data.job_methods import unusable_rows
from data.job_spec import JobSpec
from data.rows import Format
from train.job_log import step_metrics_csv

THREE = ("0", "1", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def write(path: Path, classes: tuple[str, ...], count: int = 40) -> Path:
    rows = [
        {"prompt": f"{'ab' * (i % 5)}{i}:", "completion": classes[i * 7 % 10 % len(classes)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run(place: Workplace, name: str, rows: Path, start: Path, **asked: Any) -> dict[str, float]:
    """Validate an adapter that learns nothing; returns the metrics told."""
    status, folder = place.run(
        name,
        train_file=rows,
        validation_file=rows,
        start_adapter=start,
        num_epochs=1,
        n_evals=1,
        learning_rate=1e-12,
        micro_batch_size=3,
        classification__enabled="true",
        **{f"classification__{key}": value for key, value in asked.items()},
    )
    assert status == 0
    [record] = [line for line in read_lines(folder / "metrics.jsonl") if "valid_loss" in line]
    table = step_metrics_csv(folder / "metrics.jsonl").decode().splitlines()
    told = {name: value for name, value in record.items() if name.startswith("classification/")}
    assert set(told) <= set(table[0].split(","))
    return {name.partition("/")[2]: value for name, value in told.items()}


def expected(place: Workplace, rows: Path, start: Path) -> tuple[list[int], torch.Tensor]:
    """Return the right classes, and the probabilities [N, classes] of their first tokens."""
    tokenizer = tiny_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(start)).eval()
    read = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    classes = sorted({row["completion"] for row in read})
    firsts = [tokenizer.encode(one)[0] for one in classes]
    found = []
    for row in read:
        ids = torch.tensor([tokenizer.encode(row["prompt"])])
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[0, -1, firsts].softmax(-1))
    return [classes.index(row["completion"]) for row in read], torch.stack(found)


@pytest.fixture(scope="module")
def start(place: Workplace) -> Path:
    return random_adapter(tiny_model("llama"), place.folder / "start", std=0.5)


def test_many_classes(place: Workplace, start: Path) -> None:
    rows = write(place.folder / "three.jsonl", THREE)
    told = run(place, "three", rows, start, n_classes=3)
    right, scores = expected(place, rows, start)
    said = scores.argmax(1).tolist()
    assert len(set(said)) > 1  # or the metrics would say little
    assert told == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(right, said),
            "weighted_f1-score": metrics.f1_score(right, said, average="weighted"),
        }
    )


def test_two_classes(place: Workplace, start: Path) -> None:
    rows = write(place.folder / "two.jsonl", THREE[:2])
    told = run(place, "two", rows, start, positive_class='"1"', betas="[0.5, 2]")
    right, scores = expected(place, rows, start)
    said = scores.argmax(1).tolist()
    assert len(set(said)) == 2
    assert told == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(right, said),
            "precision": metrics.precision_score(right, said),
            "recall": metrics.recall_score(right, said),
            "f1.0": metrics.f1_score(right, said),
            "f0.5": metrics.fbeta_score(right, said, beta=0.5),
            "f2.0": metrics.fbeta_score(right, said, beta=2),
            "auroc": metrics.roc_auc_score(right, scores[:, 1]),
            "auprc": metrics.average_precision_score(right, scores[:, 1]),
        }
    )


def test_two_processes_tell_what_one_does(place: Workplace, start: Path) -> None:
    rows = write(place.folder / "shared.jsonl", THREE[:2])
    settings: dict[str, Any] = {
        "train_file": rows,
        "validation_file": rows,
        "start_adapter": start,
        "num_epochs": 1,
        "n_evals": 1,
        "learning_rate": 1e-12,
        "classification__enabled": "true",
        "classification__positive_class": '"1"',
    }
    told = []
    for count in (1, 2):
        words = place.words(f"by-{count}", **settings)
        assert launch("train.sft", words, count, (ROOT / "tests",)) == 0
        records = read_lines(place.folder / f"by-{count}" / "metrics.jsonl")
        [record] = [line for line in records if "valid_loss" in line]
        told.append({name: value for name, value in record.items() if "classification/" in name})
    assert len(told[0]) == 6
    assert told[0] == pytest.approx(told[1])


@pytest.mark.parametrize(
    ("classes", "asked", "message"),
    [
        (THREE, {"n_classes": 2}, "3 different completions, '0', '1', '2', but 2 classes"),
        (THREE[:2], {"positive_class": "x"}, "positive_class is 'x'; the classes are '0', '1'"),
        (("ab", "aab"), {"n_classes": 2}, "begin with the same token"),
        (THREE, {}, "give n_classes, or the positive_class of two"),
        (THREE, {"n_classes": 3, "positive_class": '"1"'}, "positive_class is of two classes"),
        (THREE, {"n_classes": 3, "betas": "[1]"}, "betas need a positive_class"),
    ],
)
def test_refused_classes(
    place: Workplace,
    classes: tuple[str, ...],
    asked: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write(place.folder / "refused.jsonl", classes)
    status, _ = place.run(
        "refused",
        train_file=rows,
        validation_file=rows,
        classification__enabled="true",
        **{f"classification__{key}": value for key, value in asked.items()},
    )
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "param"),
    [
        ({}, "classification.n_classes"),
        ({"n_classes": 1}, "classification.n_classes"),
        ({"n_classes": 3, "positive_class": "a"}, "classification.positive_class"),
        ({"n_classes": 2, "betas": [1]}, "classification.betas"),
        ({"positive_class": "a", "betas": [0]}, "classification.betas[0]"),
        ({"positive_class": "a", "betas": 1}, "classification.betas"),
        ({"positive_class": 1}, "classification.positive_class"),
        ({"classes": 2}, "classification.classes"),
    ],
)
def test_refused_jobs(section: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        JobSpec("m", "f", "v", options={"classification": section})
    assert caught.value.param == param


def test_jobs_need_rows_to_classify() -> None:
    section = {"classification": {"n_classes": 3}}
    with pytest.raises(InvalidInput, match="validation_file") as caught:
        JobSpec("m", "f", options=section)
    assert caught.value.param == "classification"
    assert "`classification` needs" in (unusable_rows("supervised", section, Format.CHAT) or "")
    assert unusable_rows("supervised", section, Format.PROMPT_COMPLETION) is None

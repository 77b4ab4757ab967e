"""`prompt_loss_weight`: a weighted cross-entropy, computed here with transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_models import EOS_ID, random_adapter, tiny_model, tiny_tokenizer
from torch.nn import functional
from train_runs import Workplace, read_json, read_lines
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import InvalidInput
from data.job_methods import METHODS, unusable_rows
from data.job_spec import JobSpec
from data.rows import Format

STEPS = 3
RATE = 1e-3
ROWS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def start(place: Workplace) -> Path:
    """An adapter to begin with, so that the first gradient reaches A and B alike."""
    return random_adapter(tiny_model("llama"), place.folder / "start", std=0.1)


def rows_of(path: Path) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each row's prompt, and of its completion with EOS."""
    tokenizer = tiny_tokenizer()
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        (tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), EOS_ID])
        for row in rows
    ]


def weighted_loss(model: PeftModel, path: Path, weight: float) -> torch.Tensor:
    """Return `sum(w nll) / sum(w)` over all rows, one at a time: w is 1 for a completion's tokens,
    `weight` for a prompt's. A row's first token is predicted by nothing."""
    total, weights = torch.zeros(()), 0.0
    for prompt, completion in rows_of(path):
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids).logits[0, :-1]
        nll = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        row = torch.tensor([weight] * (len(prompt) - 1) + [1.0] * len(completion))
        total, weights = total + (row * nll).sum(), weights + float(row.sum())
    return total / weights


def reference(place: Workplace, start: Path, weight: float) -> tuple[dict[str, np.ndarray], float]:
    """Train by hand; returns the adapter's tensors and the first step's loss."""
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = weighted_loss(model, place.rows, weight)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(str(place.folder / f"by-hand-{weight}"))
    found = load_file(place.folder / f"by-hand-{weight}" / "adapter_model.safetensors")
    return found, losses[0]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_training_is_a_weighted_cross_entropy(place: Workplace, start: Path, weight: float) -> None:
    status, run = place.run(
        f"weight-{weight}",
        prompt_loss_weight=weight,
        start_adapter=start,
        dtype="float32",
        batch_size=ROWS,
        micro_batch_size=5,  # a step's parts must share one divisor
        num_epochs=STEPS,
        learning_rate=RATE,
        lr_scheduler="constant",
        warmup_fraction=0.0,
        max_grad_norm=1e9,
    )
    assert status == 0
    expected, first_loss = reference(place, start, weight)
    steps = [r["train_loss"] for r in read_lines(run / "metrics.jsonl") if "train_loss" in r]
    assert len(steps) == STEPS
    assert steps[0] == pytest.approx(first_loss, rel=1e-4)
    found = load_file(run / "adapter/adapter_model.safetensors")
    before = load_file(start / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-5, err_msg=name)
        assert np.abs(values - before[name]).max() > RATE  # it did move


def test_validation_counts_completions_alone(place: Workplace, start: Path) -> None:
    found = []
    for weight in (0.0, 0.7):
        _, run = place.run(
            f"valid-{weight}",
            prompt_loss_weight=weight,
            start_adapter=start,
            dtype="float32",
            validation_file=place.rows,
            learning_rate=1e-12,
            num_epochs=1,
            n_evals=1,
        )
        records = read_lines(run / "metrics.jsonl")
        found += [record["valid_loss"] for record in records if "valid_loss" in record]
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(start)).eval()
    with torch.no_grad():
        expected = float(weighted_loss(model, place.rows, 0.0))
    assert found == pytest.approx([expected, expected], rel=1e-5)


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(("row", "kind"), [(CHAT, Format.CHAT), ({"text": "a b"}, Format.TEXT)])
def test_rows_without_a_prompt_are_refused(place: Workplace, row: object, kind: Format) -> None:
    path = place.folder / f"{kind}.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 12, "utf-8")
    status, run = place.run(f"refused-{kind}", train_file=path, prompt_loss_weight=0.1)
    assert status == 2
    told = read_json(run / "error.json")["message"]
    assert "prompt_loss_weight is 0.1" in told
    assert str(kind) in told
    told_of_a_job = unusable_rows("supervised", {"prompt_loss_weight": 0.1}, kind)
    assert told_of_a_job is not None
    assert "`prompt_loss_weight` needs" in told_of_a_job
    assert unusable_rows("supervised", {"prompt_loss_weight": 0.0}, kind) is None


def test_a_base_that_scales_its_logits_is_refused(place: Workplace, tmp_path: Path) -> None:
    values = tiny_model("llama").config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept += ("num_attention_heads", "num_key_value_heads", "pad_token_id", "eos_token_id")
    config = AutoConfig.for_model("granite", **{name: values[name] for name in kept})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "granite")
    tiny_tokenizer().save_pretrained(tmp_path / "granite")
    settings = {"base_model": tmp_path / "granite", "num_epochs": 1}
    status, run = place.run("scaled", prompt_loss_weight=0.1, **settings)
    assert status == 2
    assert "scales its logits in a way of its own" in read_json(run / "error.json")["message"]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"supervised"}))
def test_other_methods_have_no_such_weight(method: str) -> None:
    grader = {"type": "string_check", "input": "a", "reference": "a", "operation": "eq"}
    graded = {"grader": grader} if METHODS[method].graded else {}
    with pytest.raises(InvalidInput, match=f"not used by the method '{method}'") as caught:
        JobSpec(
            "base",
            "file-1",
            method={"type": method, method: graded},
            options={"prompt_loss_weight": 0.1},
        )
    assert caught.value.param == "prompt_loss_weight"


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), True])
def test_weights_outside_0_to_1_are_refused(weight: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        JobSpec("base", "file-1", options={"prompt_loss_weight": weight})
    assert caught.value.param == "prompt_loss_weight"

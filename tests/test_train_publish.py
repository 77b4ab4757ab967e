"""The trial of a saved adapter: the engine must answer as the trainer, but for rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import save_tiny_base
from transformers import AutoModelForCausalLM

from data.errors import TrainingFailed
from train.base_model import load_base
from train.config import RunConfig
from train.publish import write_adapter
from train.run import RunFolder

ROWS = [list(range(5 + i, 45 + i)) for i in range(3)]


def publish(place: Path, dtype: str, served_scale: float, rows: list[list[int]] = ROWS) -> None:
    """Write an adapter whose saved B is `served_scale` times what the trainer computes with."""
    save_tiny_base(place / "tiny-base", "llama")
    config = RunConfig(
        base_model=str(place / "tiny-base"),
        models_dir=place / "models",
        output_dir=place / "run",
        dtype=dtype,
        device="cpu",
        threads=1,
    )
    base = load_base(config)
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    learned = [p for name, p in model.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in learned:
            parameter.normal_(std=0.3)

    def save(folder: Path) -> None:
        with torch.no_grad():
            for parameter in learned:
                parameter.mul_(served_scale)
            model.save_pretrained(str(folder), save_embedding_layers=False)
            for parameter in learned:
                parameter.div_(served_scale)

    run = RunFolder(config.output_dir)
    run.prepare()
    write_adapter(run, model, base, config, rows, {}, save=save)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_answers_as_trained_is_put_in_place(tmp_path, dtype):
    publish(tmp_path, dtype, 1.0)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_prompts_of_one_token_are_enough_for_a_trial(tmp_path):
    publish(tmp_path, "float32", 1.0, [[5], [6], [7]])
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_answers_otherwise_is_not(tmp_path, dtype):
    with pytest.raises(TrainingFailed, match="would answer differently from what was trained"):
        publish(tmp_path, dtype, 0.01)
    assert not (tmp_path / "run/adapter").exists()


def test_every_load_is_tried_on_tokens_that_the_adapter_changes(tmp_path):
    """What is recorded is PEFT's, and an adapter without its effect is told by it."""
    publish(tmp_path, "float32", 1.0)
    folder = tmp_path / "run/adapter"
    trial = json.loads((folder / "probe.json").read_text())["trial"]
    ids = trial["token_ids"]
    assert any(ids == row[i : i + len(ids)] for row in ROWS for i in range(len(row)))
    found = []
    for tuned in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-base", dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(folder)) if tuned else model
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
        found.append(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]])
    assert found[1].tolist() == pytest.approx(trial["logprobs"], abs=1e-4)
    assert float((found[1] - found[0]).mean()) > 0.5

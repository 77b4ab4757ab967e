"""`train.sft` on a tiny base: what a run leaves behind, and how it fails."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from train_runs import Workplace, read_json, read_lines
from transformers import AutoModelForCausalLM

from data.adapter_checks import check_adapter
from train import command, evaluate, publish
from train.sft_trainer import LoraTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def finished(place: Workplace) -> Path:
    status, run = place.run("finished", validation_fraction=0.25, n_evals=2, n_checkpoints=3)
    assert status == 0
    return run


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter/adapter_model.safetensors")


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert found == {
        "adapter",
        "checkpoints",
        "events.jsonl",
        "metrics.jsonl",
        "models",
        "report.html",
        "resolved_config.json",
        "result.json",
    }
    adapter = {path.name for path in (finished / "adapter").iterdir()}
    assert adapter >= {"adapter_config.json", "adapter_model.safetensors", "hone.json"}
    assert adapter >= {"README.md", "loss.png", "probe.json"}
    assert (finished / "adapter/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_registry_would_take_the_adapter(finished: Path) -> None:
    origin = read_json(finished / "adapter/hone.json")
    facts = check_adapter(finished / "adapter", origin["base_fingerprint"])
    assert facts.rank == 16


def test_plain_peft_loads_the_adapter_and_agrees_with_the_probe(
    place: Workplace, finished: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(finished / "adapter")).eval()
    probe = read_json(finished / "adapter/probe.json")
    for ids, logprobs in zip(probe["token_ids"], probe["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        found = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found, logprobs, atol=1e-4)


def test_the_adapter_names_no_path_of_this_machine(place: Workplace, finished: Path) -> None:
    for name in ("adapter_config.json", "README.md", "hone.json"):
        assert str(place.folder) not in (finished / "adapter" / name).read_text("utf-8")


def test_metrics_tell_every_step(finished: Path) -> None:
    records = read_lines(finished / "metrics.jsonl")
    trained = [record for record in records if "train_loss" in record]
    assert [record["step"] for record in trained] == [1, 2, 3, 4, 5, 6]
    assert {record["total_steps"] for record in trained} == {6}
    assert trained[-1]["epoch"] == 2.0
    assert all(math.isfinite(record["tokens_per_s"]) for record in trained)
    validated = [record for record in records if "valid_loss" in record]
    assert [record["step"] for record in validated] == [3, 6]


def test_events_tell_of_checkpoints(finished: Path) -> None:
    messages = [event["message"] for event in read_lines(finished / "events.jsonl")]
    assert messages == [f"Checkpoint created at step {step}" for step in (2, 4, 6)]


def test_resolved_config_and_result_hold_numbers(place: Workplace, finished: Path) -> None:
    resolved = read_json(finished / "resolved_config.json")
    assert resolved["plan"]["learning_rate"] == 1e-3
    assert resolved["versions"]["trl"]
    assert len(resolved["train_data"]["sha256"]) == 64
    result = read_json(finished / "result.json")
    assert result["status"] == "succeeded"
    assert result["trained_tokens"] == 2 * resolved["train_data"]["tokens"]
    assert result["hyperparameters"]["num_epochs"] == 2


def test_a_finished_run_is_left_alone(place: Workplace, finished: Path) -> None:
    before = (finished / "result.json").stat().st_mtime_ns
    status, _ = place.run("finished", validation_fraction=0.25, n_evals=2, n_checkpoints=3)
    assert status == 0
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_validation_loss_is_the_mean_over_tokens(place: Workplace) -> None:
    """Against the untrained base: a rate of nearly zero leaves it as it was."""
    status, run = place.run(
        "untrained", learning_rate=1e-12, num_epochs=1, n_evals=1, validation_file=place.rows
    )
    assert status == 0
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    total, count = 0.0, 0
    for line in place.rows.read_text("utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = (tokenizer.encode(row[key]) for key in ("prompt", "completion"))
        answer.append(EOS_ID)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        scores = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + answer) - 1), answer]
        total, count = total - float(scores.sum()), count + len(answer)
    [found] = [r["valid_loss"] for r in read_lines(run / "metrics.jsonl") if "valid_loss" in r]
    assert found == pytest.approx(total / count, rel=1e-5)
    [told] = [e["message"] for e in read_lines(run / "events.jsonl") if e["level"] == "warn"]
    assert told.startswith("24 validation examples are also training examples")


@pytest.mark.parametrize("settings", [{"micro_batch_size": 1}, {"micro_batch_tokens": 40}])
def test_how_a_step_is_cut_changes_nothing(place: Workplace, settings: dict[str, int]) -> None:
    _, whole = place.run("whole", micro_batch_size=8)
    _, parts = place.run(f"parts-{next(iter(settings))}", **settings)
    for name, values in weights(whole).items():
        np.testing.assert_allclose(weights(parts)[name], values, atol=2e-6, err_msg=name)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(place: Workplace) -> None:
    runs = [place.run(f"seed-{i}", seed=seed)[1] for i, seed in enumerate((1, 1, 2))]
    blobs = [(run / "adapter/adapter_model.safetensors").read_bytes() for run in runs]
    assert blobs[0] == blobs[1] != blobs[2]


def test_lora_settings_reach_the_adapter(place: Workplace) -> None:
    lora = {"r": 4, "alpha": 12, "target_modules": "[q_proj,v_proj]", "use_rslora": True}
    settings = {f"lora__{name}": value for name, value in lora.items()}
    status, run = place.run("lora", gradient_checkpointing=True, num_epochs=1, **settings)
    assert status == 0
    found = read_json(run / "adapter/adapter_config.json")
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (4, 12, True)
    assert sorted(found["target_modules"]) == ["q_proj", "v_proj"]


def test_early_stopping_keeps_the_best_checkpoint(place: Workplace) -> None:
    status, run = place.run(
        "early",
        num_epochs=20,
        learning_rate=1e-9,
        validation_fraction=0.25,
        n_evals=20,
        early_stopping__enabled=True,
        early_stopping__min_delta=1,
    )
    assert status == 0
    result = read_json(run / "result.json")
    assert result["steps"] == 9  # the first evaluation counts, then two bring nothing
    [told] = [e["message"] for e in read_lines(run / "events.jsonl") if e["level"] == "warn"]
    assert told == (
        f"Early stopping: no improvement in 2 evaluations; best step {result['best_step']}"
    )
    resolved = read_json(run / "resolved_config.json")
    assert result["trained_tokens"] == 3 * resolved["train_data"]["tokens"]


def test_long_rows_are_told_with_their_lines(place: Workplace) -> None:
    status, run = place.run("long", max_length=24, num_epochs=1)
    assert status == 0
    [told] = [e for e in read_lines(run / "events.jsonl") if e["level"] == "warn"]
    lengths = [
        len(row["prompt"] + row["completion"]) + 1
        for row in map(json.loads, place.rows.read_text().splitlines())
    ]
    lines = [line for line, length in enumerate(lengths, 1) if length > 24]
    assert told["message"] == (
        f"{len(lines)} examples of train.jsonl truncated to 24 tokens: "
        f"lines {', '.join(map(str, lines))}"
    )


def test_wandb_logs_offline(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    status, _ = place.run("wandb", num_epochs=1, wandb__project="hone-test")
    assert status == 0
    assert list(place.folder.glob("**/offline-run-*/*.wandb"))


def test_dry_run_plans_and_leaves_nothing(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    status, run = place.run("dry", "--dry-run")
    assert status == 0
    printed = capsys.readouterr().out
    assert "total_steps: 6" in printed
    assert "tokens_per_s:" in printed
    assert not run.exists()


def test_show_tokens_prints_what_the_model_sees(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    status, run = place.run("tokens", "--show-tokens", "1")
    assert status == 0
    printed = capsys.readouterr().out
    assert "line 1: 11 tokens, 8 learned" in printed  # r0: + " refund" + EOS
    assert "*       2 '<|im_end|>'" in printed
    assert not run.exists()


def failure(run: Path) -> dict[str, Any]:
    assert not (run / "result.json").exists()
    assert not (run / "adapter").exists()
    return read_json(run / "error.json")


def test_a_missing_file(place: Workplace) -> None:
    status, run = place.run("missing", train_file=place.folder / "none.jsonl")
    assert status == 2
    assert failure(run)["code"] == "file_not_found"
    assert "none.jsonl is not a file" in failure(run)["message"]


@pytest.mark.parametrize(("count", "code"), [(0, "empty_file"), (9, "invalid_n_examples")])
def test_too_few_examples(place: Workplace, count: int, code: str) -> None:
    path = place.folder / f"{count}.jsonl"
    path.write_text("".join(place.rows.read_text().splitlines(keepends=True)[:count]))
    status, run = place.run(f"few-{count}", train_file=path)
    assert status == 2
    assert code in failure(run)["message"]


def test_rows_over_the_limit_if_that_is_an_error(place: Workplace) -> None:
    status, run = place.run("strict", max_length=24, on_long="error")
    assert status == 2
    assert failure(run)["code"] == "example_too_long"


def test_an_unknown_base(place: Workplace) -> None:
    status, run = place.run("base", base_model="smollm2-135m-instrct")
    assert status == 2
    assert 'did you mean "smollm2-135m-instruct"?' in failure(run)["message"]


def test_no_network_for_the_base(place: Workplace) -> None:
    status, run = place.run("offline", base_model="nobody/nothing-at-all")
    assert status == 2
    assert failure(run)["code"].startswith("model_")
    assert "already downloaded" in failure(run)["message"]  # what to do about it


def test_a_loss_that_is_not_finite(place: Workplace) -> None:
    status, run = place.run("nan", learning_rate=1e30, warmup_fraction=0, max_grad_norm=1e9)
    assert status == 1
    error = failure(run)
    assert error["code"] == "loss_not_finite"
    assert "Lower learning_rate" in error["message"]


def test_an_adapter_that_would_answer_differently(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = publish._score
    monkeypatch.setattr(
        publish, "_score", lambda *args: [[x + 0.1 for x in row] for row in score(*args)]
    )
    status, run = place.run("probe", num_epochs=1)
    assert status == 1
    assert failure(run)["code"] == "probe_mismatch"


def test_a_full_disk_while_a_checkpoint_is_written(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files fails writes in the kernel, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = LoraTrainer._save_checkpoint

    def save(self: LoraTrainer, *args: Any) -> None:
        if self.state.global_step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        saved(self, *args)

    monkeypatch.setattr(LoraTrainer, "_save_checkpoint", save)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        status, run = place.run("full", n_checkpoints=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == command.DISK_FULL
    assert failure(run)["code"] == "disk_full"
    assert "free some space" in failure(run)["message"]
    monkeypatch.undo()
    status, run = place.run("full", n_checkpoints=3)  # from the checkpoint before
    assert status == 0
    assert not (run / "error.json").exists()


def test_a_tuned_model_answers_rightly_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workplace(
        tmp_path, "qwen3"
    )  # tied weights would fix the logit of EOS, which is padding
    path = place.folder / "letters.jsonl"  # within reach of two random layers
    rows = [
        {"prompt": "x" * (index % 5) + answer[0].upper(), "completion": answer}
        for index in range(8)
        for answer in ("abc", "def", "ghi")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, run = place.run("learned", train_file=path, num_epochs=20, learning_rate=1e-2)
    assert status == 0
    words = ["--file", path, "--base-model", place.base, "--models-dir", place.folder / "models"]
    found = {}
    for name, more in (("base", []), ("tuned", ["--adapter", run / "adapter"])):
        capsys.readouterr()
        command = [str(word) for word in (*words, *more, "--json", "--threads", 1)]
        assert evaluate.main(command) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["base"]["exact_match"] == 0
    assert found["tuned"]["exact_match"] == 1
    assert found["tuned"]["questions"] == 15  # of 24 rows: one prompt is one question
    assert found["tuned"]["by_answer"] == [["abc", 5, 5], ["def", 5, 5], ["ghi", 5, 5]]

"""Datasets that need not fit in memory, runs of several processes, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_weights
from tiny_models import tiny_tokenizer
from train_runs import Workplace, launch, read_json, read_lines, write_rows
from transformers import AutoTokenizer

from data.render import IGNORED, Example, render, render_pairs, truncate
from data.rows import Chat, Message, PromptCompletion, Text
from train import batches
from train.batches import LengthGroupedSampler, as_dataset, load_file
from train.sft_trainer import LoraTrainer
from train.token_store import open_rows
from train.token_store import write_rows as store_rows

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def warnings_of(run: Path) -> list[str]:
    return [e["message"] for e in read_lines(run / "events.jsonl") if e["level"] == "warn"]


token_rows = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9),
    max_size=20,
)


@given(token_rows, st.integers(2, 10))
def test_what_is_stored_is_what_was_rendered(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[int, bool]]], length: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    examples = []
    for row in rows:
        ids = tuple(token for token, _ in row)
        labels = tuple(token if learned else IGNORED for token, learned in row)
        examples.append(Example(ids, labels))
    store_rows(folder, ((10 * index, example) for index, example in enumerate(examples)))
    found = open_rows(folder)
    shutil.rmtree(folder)  # it stays readable
    assert list(found) == examples
    assert found.lines.tolist() == [10 * index for index in range(len(rows))]
    assert found.lengths.tolist() == [len(example) for example in examples]
    assert found.num_learned == sum(example.num_trained for example in examples)
    assert found.num_repeated == len(rows) - len({example.input_ids for example in examples})
    every_other = found.select(np.arange(0, len(rows), 2)).cut(length)
    wanted = [truncate(example, length) for example in examples[::2]]
    assert every_other[:] == wanted
    assert every_other.num_learned == sum(example.num_trained for example in wanted)
    assert every_other.lengths.tolist() == [len(example) for example in wanted]


def reference_order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """The order as it is described, row by row."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    tail = len(order) % batch_size
    full, rest = order[: len(order) - tail], order[len(order) - tail :]
    found = []
    pool = batch_size * batches.POOL_BATCHES
    for start in range(0, len(full), pool):
        rows = sorted(full[start : start + pool], key=lengths.__getitem__)
        found += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    shuffled = torch.randperm(len(found), generator=generator).tolist()
    return [row for index in shuffled for row in found[index]] + rest


@given(st.lists(st.integers(1, 30), max_size=900), st.integers(1, 9), st.integers(0, 3))
def test_the_order_is_that_of_lengths_alone(lengths: list[int], batch: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch, seed=5)
    sampler.set_epoch(epoch)
    assert list(sampler) == reference_order(lengths, batch, 5, epoch)


texts = st.text(max_size=12)


@given(st.lists(st.tuples(texts, texts, st.booleans()), max_size=6), st.booleans())
def test_rows_rendered_together_are_rows_rendered_alone(
    rows: list[tuple[str, str, bool]], has_bos: bool
) -> None:
    tokenizer = TOKENIZER if has_bos else WITHOUT_BOS
    made = [Text(b) if is_text else PromptCompletion(a, b) for a, b, is_text in rows]
    assert render_pairs(tokenizer, made) == [render(tokenizer, row) for row in made]


WITHOUT_BOS = tiny_tokenizer()
WITHOUT_BOS.bos_token = None


def test_conversations_are_rendered_one_by_one() -> None:
    chat = Chat((Message("user", "a"), Message("assistant", "b")))
    assert render_pairs(TOKENIZER, [Text("a"), chat]) is None


def test_a_store_is_found_again_if_it_is_of_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, store = write_rows(tmp_path / "rows.jsonl"), tmp_path / "tokens/train"
    first = load_file(path, TOKENIZER, 10, store, "base-a")
    with monkeypatch.context() as patch:
        patch.setattr(batches, "validate", None)  # neither checked nor rendered again
        again = load_file(path, TOKENIZER, 10, store, "base-a")
    assert list(again.examples) == list(first.examples)
    assert (again.digest, again.kind, again.lines.tolist()) == (
        *(first.digest, first.kind),
        first.lines.tolist(),
    )
    write_rows(path, 30)
    assert len(load_file(path, TOKENIZER, 10, store, "base-a").examples) == 30
    meta = json.loads((store / batches.META).read_text())
    load_file(path, TOKENIZER, 10, store, "base-b")
    assert json.loads((store / batches.META).read_text())["key"] != meta["key"]


def test_rows_are_read_when_a_batch_asks(tmp_path: Path) -> None:
    rendered = load_file(write_rows(tmp_path / "rows.jsonl"), TOKENIZER, 10)
    dataset = as_dataset(rendered.examples)
    assert dataset[3]["input_ids"] == list(rendered.examples[3].input_ids)
    assert dataset[[5, 2]]["labels"] == [list(rendered.examples[i].labels) for i in (5, 2)]


def test_a_finished_run_keeps_no_tokens(place: Workplace) -> None:
    status, run = place.run("tokens-gone", num_epochs=1)
    assert status == 0
    assert not (run / "tokens").exists()


def test_every_row_truncated_is_told(place: Workplace) -> None:
    status, run = place.run("all-cut", num_epochs=1, max_length=9)
    assert status == 0
    assert any(
        "every example of train.jsonl (24) was truncated to 9" in text for text in warnings_of(run)
    )


def test_validation_rows_in_training_are_told_with_their_lines(place: Workplace) -> None:
    valid = place.folder / "leak.jsonl"
    lines = place.rows.read_text().splitlines(keepends=True)
    other = json.dumps({"prompt": "not there", "completion": " x"}) + "\n"
    valid.write_text(other + lines[4] + other.replace("x", "y") + lines[9])
    status, run = place.run("leak", num_epochs=1, validation_file=valid)
    assert status == 0
    assert any(
        "2 validation examples are also training examples" in text and "lines 2, 4" in text
        for text in warnings_of(run)
    )


def test_an_absurd_rate_is_told_and_a_broken_loss_keeps_the_checkpoint(place: Workplace) -> None:
    status, run = place.run(
        "absurd", learning_rate=1e30, warmup_fraction=0, max_grad_norm=1e9, n_checkpoints=6
    )
    assert status == 1
    assert any("the learning rate is 1e+30, 1e+33 times" in text for text in warnings_of(run))
    assert (run / "checkpoints/checkpoint-1/complete").exists()
    message = read_json(run / "error.json")["message"]
    assert "The loss is nan at step 2" in message
    assert "the step's rows were lines " in message


def test_memory_that_runs_out_is_told_with_numbers(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LoraTrainer.compute_loss

    def greedy(self: LoraTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            torch.empty(1 << 50)  # the allocator itself refuses
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "compute_loss", greedy)
    status, run = place.run("memory", num_epochs=1)
    assert status == 1
    error = read_json(run / "error.json")
    assert error["code"] == "out_of_memory"
    assert "Memory ran out at step 3, in a part of 8 rows of " in error["message"]
    assert "set micro_batch_tokens=" in error["message"]
    assert " GB)" in error["message"]


def base_with(place: Workplace, name: str, **tokens: Any) -> Path:
    folder = place.folder / name
    shutil.copytree(place.base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for key, value in tokens.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_base_without_padding_token_trains_alike(place: Workplace) -> None:
    adapters = []
    for name, base in (("pad", place.base), ("no-pad", base_with(place, "b1", pad_token=None))):
        status, run = place.run(name, num_epochs=1, base_model=base)
        assert status == 0
        adapters.append(load_weights(run / "adapter/adapter_model.safetensors"))
    for key, tensor in adapters[0].items():
        np.testing.assert_array_equal(adapters[1][key], tensor)


def test_a_base_without_eos_is_refused(place: Workplace) -> None:
    base = base_with(place, "b2", eos_token=None)
    status, run = place.run("no-eos", base_model=base)
    assert status == 2
    error = read_json(run / "error.json")
    assert error["code"] == "eos_token_missing"
    assert "set eos_tokens in the model's YAML" in error["message"]


def test_four_bits_need_a_gpu(place: Workplace) -> None:
    status, run = place.run("four-bits", load_in_4bit=True, device="cpu")
    assert status == 2
    message = read_json(run / "error.json")["message"]
    assert "load_in_4bit is true, but the run is on a CPU" in message


def launch_environment(name: str, prepare: Any) -> dict[str, str]:
    """What `accelerate launch --config_file` would give each process."""
    path = ROOT / f"configs/accelerate/{name}.yaml"
    words = ["--config_file", str(path), "--num_processes", "2", "-m", "train.sft"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = list(defaults.deepspeed_config)
    found = prepare(arguments)
    return dict(found[1] if isinstance(found, tuple) else found)


def test_fsdp2_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch_environment("fsdp2", prepare_multi_gpu_env)
    for name in [key for key in found if key.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.setenv(name, found[name])
    assert found["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True


def test_zero_3_reaches_the_trainer() -> None:
    found = launch_environment("deepspeed_zero3", prepare_deepspeed_cmd_env)
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(place: Workplace) -> None:
    """By `accelerate launch`, with gloo; neither rows nor their parts divide evenly."""
    names = ("train_loss", "train_mean_token_accuracy", "trained_tokens", "valid_loss")
    found = []
    for name, count in (("one-process", 1), ("two-processes", 2)):
        words = place.words(
            name,
            train_file=write_rows(place.folder / "25.jsonl", 25),
            validation_file=write_rows(place.folder / "71.jsonl", 71),
            num_epochs=3,
            n_evals=3,
            prompt_loss_weight=0.3,
            micro_batch_tokens=80,
            device="cpu",
        )
        assert launch("train.sft", words, count) == 0
        run = place.folder / name
        plan = read_json(run / "resolved_config.json")["plan"]
        assert plan["micro_batch_size"] == 8 // count  # there were so many processes
        records = read_lines(run / "metrics.jsonl")
        told = {key: [record[key] for record in records if key in record] for key in names}
        told["in the end"] = [read_json(run / "result.json")["valid_loss"]]
        messages = [event["message"] for event in read_lines(run / "events.jsonl")]
        assert len(messages) == len(set(messages))
        found.append((told, load_weights(run / "adapter/adapter_model.safetensors")))
    for key, values in found[0][0].items():
        exact = key != "train_mean_token_accuracy"  # TRL's mean over the parts of a step
        np.testing.assert_allclose(
            found[1][0][key], values, rtol=1e-4 if exact else 0.5, err_msg=key
        )
    for key, tensor in found[0][1].items():
        np.testing.assert_allclose(found[1][1][key], tensor, atol=2e-5, err_msg=key)


BROKEN = {
    "nan_in_the_second": """
whole = LoraTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    nan = float("nan") if self.state.global_step == 1 and RANK == "1" else 1.0
    return whole(self, *args, **kwargs) * nan
LoraTrainer.compute_loss = compute_loss
""",
    "no_adapter_in_the_first": """
def write_adapter(*args, **kwargs):
    raise TrainingFailed("it would not serve", code="probe_mismatch")
trainer.write_adapter = write_adapter
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [("nan_in_the_second", "loss_not_finite"), ("no_adapter_in_the_first", "probe_mismatch")],
)
def test_what_fails_in_one_process_fails_the_run(place: Workplace, name: str, code: str) -> None:
    module = f"""
import os, sys
from data.errors import TrainingFailed
from train import sft, trainer
from train.sft_trainer import LoraTrainer
RANK = os.environ["RANK"]
{BROKEN[name]}
sys.exit(sft.main())
"""
    (place.folder / f"{name}.py").write_text(module)
    words = place.words(name, num_epochs=1, device="cpu")
    assert launch(name, words, 2, (place.folder,)) != 0
    run = place.folder / name
    assert read_json(run / "error.json")["code"] == code
    assert not (run / "result.json").exists()
    assert not (run / "adapter").exists()

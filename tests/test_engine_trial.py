"""An adapter that would not answer as its trainer said is not loaded; PEFT is the trainer here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, tiny_model, tiny_tokenizer

from data.errors import AdapterRefused
from serve.engine.base import AdapterRef
from serve.engine.local import EngineConfig, LocalEngine

IDS = (40, 41, 42, 43)
CONFIG = EngineConfig(kv_budget_bytes=2**20, max_lora_rows=32)


def record(folder: Path, arch: str, ids: tuple[int, ...] = IDS, dtype: str = "float32") -> None:
    """Write what PEFT says of some tokens, as a trainer does."""
    model = PeftModel.from_pretrained(tiny_model(arch), str(folder)).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    logprobs = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    trial = {"token_ids": list(ids), "logprobs": logprobs, "dtype": dtype}
    (folder / "probe.json").write_text(json.dumps({"trial": trial}))


def edit_trial(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "probe.json"
        trial = json.loads(path.read_text())["trial"] | values
        path.write_text(json.dumps({"trial": {k: v for k, v in trial.items() if v is not None}}))

    return change


def weaken(folder: Path) -> None:
    """Change what the adapter says, and nothing that a check of its files could see."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * 0.5 if "lora_B" in n else t for n, t in tensors.items()}, path)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])  # with kernels, and by the model's own code
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_what_answers_as_recorded_is_loaded_and_what_does_not_is_refused(
    tmp_path: Path, arch: str, in_bfloat16: bool
) -> None:
    if in_bfloat16 and arch == "gpt2":
        pytest.skip("products in bfloat16 are the kernels'")
    good = random_adapter(tiny_model(arch), tmp_path / "good")
    bad = random_adapter(tiny_model(arch), tmp_path / "bad", seed=1)
    for folder in (good, bad):
        record(folder, arch)
    weaken(bad)
    with LocalEngine(tiny_model(arch), tiny_tokenizer(), CONFIG, in_bfloat16=in_bfloat16) as engine:
        engine.load_adapter(AdapterRef("good", str(good)))
        with pytest.raises(AdapterRefused, match="it would answer differently") as caught:
            engine.load_adapter(AdapterRef("bad", str(bad)))
        assert caught.value.code == "adapter_probe_mismatch"
        assert [state.digest for state in engine.adapters()] == ["good"]


def test_another_dtype_may_round_but_not_differ(tmp_path: Path) -> None:
    folder = random_adapter(tiny_model("llama"), tmp_path / "adapter")
    record(folder, "llama", dtype="bfloat16")
    path = folder / "probe.json"
    trial = json.loads(path.read_text())["trial"]
    for digest, off, fits in (("near", 0.3, True), ("far", 0.6, False)):
        edit_trial(logprobs=[value + off for value in trial["logprobs"]])(folder)
        with LocalEngine(tiny_model("llama"), tiny_tokenizer(), CONFIG) as engine:
            if fits:
                engine.load_adapter(AdapterRef(digest, str(folder)))
                continue
            with pytest.raises(AdapterRefused, match="serve with the dtype it was trained in"):
                engine.load_adapter(AdapterRef(digest, str(folder)))


@pytest.mark.parametrize("ids", [(7, 9), IDS])
def test_trials_may_be_short(tmp_path: Path, ids: tuple[int, ...]) -> None:
    folder = random_adapter(tiny_model("llama"), tmp_path / "adapter")
    record(folder, "llama", ids)
    with LocalEngine(tiny_model("llama"), tiny_tokenizer(), CONFIG) as engine:
        engine.load_adapter(AdapterRef("short", str(folder)))


def test_adapters_of_other_trainers_have_no_trial(tmp_path: Path) -> None:
    folder = random_adapter(tiny_model("llama"), tmp_path / "adapter")
    with LocalEngine(tiny_model("llama"), tiny_tokenizer(), CONFIG) as engine:
        engine.load_adapter(AdapterRef("none", str(folder)))
        (folder / "probe.json").write_text('{"token_ids": [[1, 2]], "logprobs": [[-1.0]]}')
        engine.load_adapter(AdapterRef("older", str(folder)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "probe.json").write_text("{"),
        lambda folder: (folder / "probe.json").write_text("[]"),
        edit_trial(logprobs=None),
        edit_trial(logprobs=[-1.0]),
        edit_trial(token_ids=[1, 2, 3, 9999]),
        edit_trial(token_ids=[1, 2, 3, -4]),
        edit_trial(token_ids=[1, 2, 3, 4, 5], logprobs=[-1.0] * 4),
    ],
)
def test_a_damaged_trial_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = random_adapter(tiny_model("llama"), tmp_path / "adapter")
    record(folder, "llama")
    spoil(folder)
    with LocalEngine(tiny_model("llama"), tiny_tokenizer(), CONFIG) as engine:
        with pytest.raises(AdapterRefused) as caught:
            engine.load_adapter(AdapterRef("spoilt", str(folder)))
        assert caught.value.code == "adapter_invalid_probe"

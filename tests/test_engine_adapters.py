"""Adapters are loaded whole or refused with the reason, and a bad one harms nobody else."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, tiny_model, tiny_tokenizer

from data.errors import AdapterRefused
from serve.engine.base import AdapterRef, Delta, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

MIB = 2**20


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    config = EngineConfig(kv_budget_bytes=MIB, max_lora_rows=32)
    with LocalEngine(tiny_model("llama"), tiny_tokenizer(), config, "base-0") as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return random_adapter(tiny_model("llama"), tmp_path / "adapter")


def request(path: Path | None, name: str = "r") -> GenerationRequest:
    ref = None if path is None else AdapterRef(str(path), str(path))
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    return GenerationRequest(name, (10, 20, 30), params, ref)


def change_config(path: Path, **values: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def first(tensors: dict[str, torch.Tensor], half: str = "lora_B") -> str:
    return next(name for name in sorted(tensors) if half in name)


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(path: Path) -> None:
    (path / "adapter_model.safetensors").write_bytes(b"not safetensors at all")


def pickle(path: Path) -> None:
    (path / "adapter_model.safetensors").unlink()
    torch.save({}, path / "adapter_model.bin")


def set_nan(path: Path) -> None:
    change_tensors(path, lambda t: t[first(t)].view(-1)[3:4].fill_(float("nan")))


def set_infinity(path: Path) -> None:
    change_tensors(path, lambda t: t[first(t)].view(-1)[3:4].fill_(float("inf")))


def widen(path: Path) -> None:
    change_tensors(path, lambda t: t.update({first(t): torch.ones(99, 4)}))


def other_rank(path: Path) -> None:
    change_config(path, r=5)


def add_stranger(path: Path) -> None:
    name = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    change_tensors(path, lambda t: t.update({name: torch.ones(4, 32)}))


def rename_all(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("layers", "blocks")] = tensors.pop(name)

    change_tensors(path, change)


def lose_half(path: Path) -> None:
    change_tensors(path, lambda t: t.pop(first(t)))


def lose_module(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
            del tensors[name]

    change_tensors(path, change)


def lose_everything(path: Path) -> None:
    change_tensors(path, lambda t: t.clear())


def name_other_base(path: Path) -> None:
    (path / "hone.json").write_text('{"base_fingerprint": "base-1"}')


def overflow(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(1e30)

    change_tensors(path, change)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (truncate, "adapter_truncated", "adapter_model.safetensors"),
        (garbage, "adapter_truncated", "not safetensors"),
        (pickle, "adapter_pickle", "adapter_model.bin is a pickle"),
        (set_nan, "adapter_not_finite", "lora_B holds NaN"),
        (set_infinity, "adapter_not_finite", "infinity"),
        (overflow, "adapter_not_finite", "probe is not finite"),
        (widen, "adapter_wrong_shape", "has shape [99, 4]; expected"),
        (other_rank, "adapter_wrong_shape", "expected [5, 48]"),
        (add_stranger, "adapter_unmatched_tensors", "layers.7.mlp.up_proj.lora_A"),
        (rename_all, "adapter_wrong_base", "belongs to another base"),
        (name_other_base, "adapter_wrong_base", "trained on base-1; this base is base-0"),
        (lambda p: (p / "hone.json").write_text("{}"), "adapter_wrong_base", "which base"),
        (lose_everything, "adapter_wrong_base", "holds no tensors"),
        (lose_half, "adapter_missing_tensors", "lacks lora_B"),
        (lose_module, "adapter_missing_tensors", "layers.1.self_attn.q_proj"),
        (lambda p: change_config(p, use_dora=True), "adapter_unsupported", "use_dora"),
        (lambda p: change_config(p, bias="all"), "adapter_unsupported", "biases"),
        (
            lambda p: change_config(p, modules_to_save=["lm_head"]),
            "adapter_unsupported",
            "modules_to_save",
        ),
        (lambda p: change_config(p, some_future_field=3), "adapter_unsupported", "some_future"),
        (
            lambda p: change_config(p, init_lora_weights="pissa"),
            "adapter_unsupported",
            "changes the base",
        ),
        (lambda p: change_config(p, peft_type="IA3"), "adapter_unsupported", "IA3"),
        (lambda p: change_config(p, r="eight"), "adapter_invalid_config", "eight"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "adapter_invalid_config", "read"),
        (lambda p: (p / "adapter_config.json").unlink(), "adapter_missing", "is missing"),
        (shutil.rmtree, "adapter_missing", "is missing"),
    ],
)
def test_refused_with_the_reason(
    engine: LocalEngine, adapter: Path, damage: Callable[[Path], object], code: str, said: str
) -> None:
    damage(adapter)
    resident = engine.stats()["adapters_in_memory"]
    with pytest.raises(AdapterRefused) as caught:
        engine.load_adapter(AdapterRef(str(adapter), str(adapter)))
    assert caught.value.code == code
    assert said in caught.value.message
    assert engine.stats()["adapters_in_memory"] == resident


def test_a_bad_adapter_fails_its_own_request_only(engine: LocalEngine, adapter: Path) -> None:
    good = random_adapter(tiny_model("llama"), adapter.parent / "good", seed=5)
    expected = engine.generate([request(good, "alone")])
    set_nan(adapter)
    outcomes: dict[str, str] = {}
    done = threading.Semaphore(0)

    def note(delta: Delta) -> None:
        if delta.finish_reason:
            outcomes[delta.request_id] = delta.finish_reason
            done.release()

    for name, path in (("bad", adapter), ("good", good), ("base", None)):
        engine.submit(request(path, name), note)
    assert all(done.acquire(timeout=30) for _ in range(3))
    assert outcomes == {"bad": "error", "good": "length", "base": "length"}
    assert engine.generate([request(good, "again")]) == expected


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_that_overflows_on_real_tokens_harms_nobody(
    engine: LocalEngine, adapter: Path
) -> None:
    """Finite on the probe's tokens, infinite on token 30: only its own request fails."""
    random_adapter(tiny_model("llama"), adapter, targets=["embed_tokens"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first(tensors, "lora_embedding_A")][:, 30] = 1e38
        tensors[first(tensors, "lora_embedding_B")].fill_(1e4)

    change_tensors(adapter, change)
    expected = engine.generate([request(None, "alone")])
    outcomes: dict[str, object] = {}
    done = threading.Semaphore(0)

    def note(delta: Delta) -> None:
        if delta.finish_reason:
            outcomes[delta.request_id] = getattr(delta.error, "code", None) or delta.token_ids
            done.release()

    for name, path in (("bad", adapter), ("base", None)):
        engine.submit(request(path, name), note)
    assert all(done.acquire(timeout=30) for _ in range(2))
    assert outcomes["bad"] == "non_finite_logits"
    for _ in range(3):  # its cache block is used again
        assert engine.generate([request(None, "after")]) == expected


def test_rank_above_the_limit_is_refused(engine: LocalEngine, adapter: Path) -> None:
    random_adapter(tiny_model("llama"), adapter, r=33, targets=["q_proj"])
    with pytest.raises(AdapterRefused) as caught:
        engine.load_adapter(AdapterRef("big", str(adapter)))
    assert caught.value.code == "adapter_rank_too_large"


def test_another_architecture_is_refused(engine: LocalEngine, adapter: Path) -> None:
    random_adapter(tiny_model("gpt2"), adapter, targets=["c_attn"])
    with pytest.raises(AdapterRefused) as caught:
        engine.load_adapter(AdapterRef("other", str(adapter)))
    assert caught.value.code == "adapter_wrong_base"


def test_loading_is_idempotent_and_survives_deletion(engine: LocalEngine, adapter: Path) -> None:
    ref = AdapterRef(str(adapter), str(adapter))
    engine.load_adapter(ref)
    loads = engine.stats()["adapter_loads_total"]
    before = engine.generate([request(adapter)])
    shutil.rmtree(adapter)
    engine.load_adapter(ref)
    assert engine.generate([request(adapter)]) == before
    assert engine.stats()["adapter_loads_total"] == loads
    engine.unload_adapter(ref.digest)
    engine.generate([request(None)])
    with pytest.raises(AdapterRefused):
        engine.generate([request(adapter)])


def test_a_mended_adapter_loads_after_a_refusal(engine: LocalEngine, adapter: Path) -> None:
    kept = (adapter / "adapter_model.safetensors").read_bytes()
    truncate(adapter)
    with pytest.raises(AdapterRefused):
        engine.generate([request(adapter)])
    (adapter / "adapter_model.safetensors").write_bytes(kept)
    [done] = engine.generate([request(adapter)])
    assert len(done.token_ids) == 5

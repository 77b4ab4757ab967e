"""Where adapters are, who makes room, what is handed over in memory, how much of one is added."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from tiny_models import VOCAB_SIZE, random_adapter, tiny_model, tiny_tokenizer

from data.errors import AdapterRefused, DeadlineExceeded, InvalidInput, StateConflict
from serve.engine.adapter_files import memory_adapter
from serve.engine.base import (
    Adapter,
    AdapterRef,
    AdapterState,
    Delta,
    GenerationRequest,
    SamplingParams,
)
from serve.engine.local import EngineConfig, LocalEngine

MIB = 2**20
PROMPT = tuple(range(30, 110))


def make(**config: Any) -> LocalEngine:
    limits = EngineConfig(**{"kv_budget_bytes": MIB, **config})
    return LocalEngine(tiny_model("llama"), tiny_tokenizer(), limits)


def request(
    adapter: Adapter | None, name: str = "r", num_tokens: int = 5, **fields: Any
) -> GenerationRequest:
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=0)
    return GenerationRequest(name, PROMPT, params, adapter, **fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    scratch, model = tmp_path_factory.mktemp("adapters"), tiny_model("llama")
    return [random_adapter(model, scratch / str(n), seed=n) for n in range(6)]


@pytest.fixture(scope="module")
def num_bytes(folders: list[Path]) -> int:
    """Memory of one adapter, all alike: counted from its tensors."""
    state = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_model("llama"), folders[0]))
    return sum(tensor.nbytes for tensor in state.values())


def ref(folder: Path, owner: str = "") -> AdapterRef:
    return AdapterRef(folder.name, str(folder), owner)


def states(engine: LocalEngine) -> dict[str, AdapterState]:
    return {state.digest: state for state in engine.adapters()}


def in_memory(engine: LocalEngine) -> set[str]:
    return {digest for digest, state in states(engine).items() if state.tier != "disk"}


# ---- tiers ----


def test_memory_is_bounded_in_bytes_and_the_last_used_stay(
    folders: list[Path], num_bytes: int
) -> None:
    with make(adapter_cache_bytes=3 * num_bytes) as engine:
        for index in (0, 1, 2, 0, 3):  # 1 goes
            engine.generate([request(ref(folders[index]))])
        assert in_memory(engine) == {"0", "2", "3"}
        assert [state.digest for state in engine.adapters()] == ["3", "0", "2", "1"]
        assert engine.stats()["adapters_bytes"] == 3 * num_bytes
        known = states(engine)
        assert (known["0"].num_uses, known["0"].num_loads) == (2, 1)
        assert known["1"].last_used is not None
        engine.generate([request(ref(folders[1]))])
        assert states(engine)["1"].num_loads == 2


def test_a_read_that_is_done_at_once_wakes_without_the_lock(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is woken asks the store under its own lock: two threads could wait for each other."""

    def at_once(function: Any, *args: Any) -> Future[Any]:
        found: Future[Any] = Future()
        found.set_result(function(*args))
        return found

    with make() as engine:
        store, free = engine._adapters, []
        plain = store._wake

        def wake() -> None:
            free.append(store._lock.acquire(timeout=5))
            if free[-1]:
                store._lock.release()
            plain()

        monkeypatch.setattr(store, "_wake", wake)
        monkeypatch.setattr(store._reader, "submit", at_once)
        assert engine.generate([request(ref(folders[0]))])[0].token_ids
    assert free
    assert all(free)


def test_the_stacks_hold_fewer_than_the_memory(folders: list[Path]) -> None:
    with make(max_lora_rows=8) as engine:  # two of rank 4
        for folder in folders[:4]:
            engine.generate([request(ref(folder))])
        tiers = [state.tier for state in engine.adapters()]
        assert tiers == ["resident", "resident", "memory", "memory"]


def test_an_account_makes_room_among_its_own(folders: list[Path]) -> None:
    with make(max_adapters_per_account=2) as engine:
        engine.generate([request(ref(folders[0], "quiet"))])
        for folder in folders[1:]:
            engine.generate([request(ref(folder, "busy"))])
        assert in_memory(engine) == {"0", "4", "5"}


def test_an_account_over_its_share_waits_for_itself_alone(folders: list[Path]) -> None:
    """Requests of three adapters, where one may be in memory, still all end."""
    with make(max_adapters_per_account=1) as engine:
        requests = [request(ref(folders[n % 3], "a"), f"r{n}") for n in range(9)]
        assert len(engine.generate(requests)) == 9


def test_a_pinned_adapter_stays(folders: list[Path], num_bytes: int) -> None:
    with make(adapter_cache_bytes=3 * num_bytes) as engine:
        engine.pin_adapter(ref(folders[0]))
        for folder in folders[1:]:
            engine.generate([request(ref(folder))])
        assert states(engine)["0"].pinned
        assert "0" in in_memory(engine)
        engine.unpin_adapter("0")
        engine.generate([request(ref(folder)) for folder in folders[1:2]])
        assert "0" not in in_memory(engine)


def test_pins_leave_room(folders: list[Path], num_bytes: int) -> None:
    with make(adapter_cache_bytes=5 * num_bytes) as engine:
        engine.pin_adapter(ref(folders[0]))
        engine.pin_adapter(ref(folders[1]))
        with pytest.raises(StateConflict, match="more than half"):
            engine.pin_adapter(ref(folders[2]))
        assert engine.stats()["adapters_pinned"] == 2
    with make(max_adapters_per_account=2) as engine:
        engine.pin_adapter(ref(folders[0], "a"))
        engine.pin_adapter(ref(folders[1], "b"))
        with pytest.raises(StateConflict, match="max_adapters_per_account"):
            engine.pin_adapter(ref(folders[2], "a"))


def test_unloading_ends_a_pin(folders: list[Path]) -> None:
    with make() as engine:
        engine.pin_adapter(ref(folders[0]))
        engine.unload_adapter("0")
        engine.generate([request(None)])
        assert states(engine)["0"].tier == "disk"
        assert not states(engine)["0"].pinned


def test_an_adapter_beyond_the_budget_is_refused(folders: list[Path], num_bytes: int) -> None:
    with make(adapter_cache_bytes=num_bytes) as engine:
        with pytest.raises(AdapterRefused, match="adapter_cache_mb") as caught:
            engine.generate([request(ref(folders[0]))])
        assert caught.value.code == "adapter_too_large"
        assert engine.generate([request(None)])


def test_deleted_from_disk_while_resident_and_while_cold(
    folders: list[Path], tmp_path: Path
) -> None:
    mine = shutil.copytree(folders[0], tmp_path / "mine")
    with make() as engine:
        [before] = engine.generate([request(ref(mine))])
        shutil.rmtree(mine)
        [after] = engine.generate([request(ref(mine))])
        assert after.token_ids == before.token_ids
        engine.unload_adapter("mine")
        engine.generate([request(None)])
        with pytest.raises(AdapterRefused) as caught:
            engine.generate([request(ref(mine))])
        assert caught.value.code == "adapter_missing"
        others = [request(None, "base"), request(ref(folders[1]), "other")]
        assert len(engine.generate(others)) == 2


# ---- handed over in memory ----


def peft_model(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny_model("llama"), str(folder)).eval()


def handed_over(model: PeftModel) -> Adapter:
    return memory_adapter(model.peft_config["default"].to_dict(), get_peft_model_state_dict(model))


def test_an_adapter_in_memory_is_the_same_as_from_disk(folders: list[Path]) -> None:
    with make() as engine:
        [from_disk] = engine.generate([request(ref(folders[0]))])
        [from_memory] = engine.generate([request(handed_over(peft_model(folders[0])))])
    assert from_memory.token_ids == from_disk.token_ids
    assert from_memory.logprobs == from_disk.logprobs


def test_training_goes_on_beside_it(folders: list[Path], num_bytes: int) -> None:
    """Each step's weights are a version of their own, and are read again after making room."""
    model = peft_model(folders[0])
    steps = []
    with make(adapter_cache_bytes=2 * num_bytes) as engine:
        for _ in range(4):
            adapter = handed_over(model)
            [got] = engine.generate([request(adapter)])
            steps.append((adapter, got, expected_tokens(model)))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        again = [engine.generate([request(adapter)])[0] for adapter, _, _ in steps]
    assert len({adapter.digest for adapter, _, _ in steps}) == 4
    for (_, got, expected), later in zip(steps, again, strict=True):
        assert list(got.token_ids) == expected
        assert later.token_ids == got.token_ids


def expected_tokens(model: torch.nn.Module, num_tokens: int = 5) -> list[int]:
    made = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=VOCAB_SIZE + 5,
    )
    return list(made[0, len(PROMPT) :].tolist())


def test_a_wrong_one_in_memory_is_refused(folders: list[Path]) -> None:
    model = peft_model(folders[0])
    config, tensors = model.peft_config["default"].to_dict(), get_peft_model_state_dict(model)
    name = next(iter(tensors))
    wrong = [
        memory_adapter({**config, "use_dora": True}, tensors),
        memory_adapter(config, {**tensors, name: tensors[name] * float("nan")}),
        memory_adapter(config, {k: v for k, v in tensors.items() if k != name}),
    ]
    with make() as engine:
        for adapter in wrong:
            with pytest.raises(AdapterRefused):
                engine.generate([request(adapter)])


# ---- scale ----


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_scale_is_pefts(folders: list[Path], scale: float) -> None:
    model = peft_model(folders[0])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= scale
    with make() as engine:
        mates = [request(ref(folders[0]), "whole"), request(None, "base")]
        half = request(ref(folders[0]), "scaled", adapter_scale=scale)
        whole, base, got = engine.generate([*mates, half])
    assert list(got.token_ids) == expected_tokens(model)
    sequence = torch.tensor([[*PROMPT, *got.token_ids]])
    exact = torch.log_softmax(model(input_ids=sequence).logits[0].float(), -1)
    for place, entry in enumerate(got.logprobs, len(PROMPT) - 1):
        assert abs(entry.logprob - exact[place, entry.token_id].item()) < 1e-4
    assert list(whole.token_ids) == expected_tokens(peft_model(folders[0]))
    assert list(base.token_ids) == expected_tokens(tiny_model("llama"))


def test_scales_share_no_cached_prefix(folders: list[Path]) -> None:
    with make() as engine:
        first = [request(ref(folders[0]), f"a{s}", adapter_scale=s) for s in (0.2, 0.9)]
        apart = [engine.generate([r])[0] for r in first]
        assert [done.num_cached for done in apart] == [0, 0]
        again = [engine.generate([r])[0] for r in first]
        assert all(done.num_cached > 0 for done in again)
        assert [done.token_ids for done in again] == [done.token_ids for done in apart]


@pytest.mark.parametrize("fields", [{"adapter_scale": 1.5}, {"timeout_s": 0}])
def test_wrong_fields(fields: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        request(None, **fields)
    assert caught.value.param in fields


# ---- deadlines ----


@pytest.fixture
def slow() -> Iterator[LocalEngine]:
    with make(max_batch=1) as engine:
        yield engine


def test_a_running_request_ends_at_its_deadline(slow: LocalEngine) -> None:
    with pytest.raises(DeadlineExceeded, match=r"ran until its time limit of 0\.02 s"):
        slow.generate([request(None, num_tokens=400, timeout_s=0.02)])
    assert slow.generate([request(None)])


def test_a_waiting_request_ends_at_its_deadline(slow: LocalEngine) -> None:
    outcomes: dict[str, Delta] = {}
    ended = threading.Semaphore(0)

    def note(delta: Delta) -> None:
        if delta.finish_reason:
            outcomes[delta.request_id] = delta
            ended.release()

    slow.submit(request(None, "first", num_tokens=400), note)
    slow.submit(request(None, "second", timeout_s=0.01), note)
    for _ in range(2):
        assert ended.acquire(timeout=30)
    assert outcomes["first"].finish_reason == "length"
    assert "waited for its turn" in str(outcomes["second"].error)


def test_the_engine_has_a_limit_of_its_own() -> None:
    with make(request_timeout_s=0.02) as engine, pytest.raises(DeadlineExceeded, match=r"0\.02 s"):
        engine.generate([request(None, num_tokens=400, timeout_s=50)])

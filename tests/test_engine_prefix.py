"""The prefix cache: what it copies is what would have been computed, and only for its owner."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_engine_exact import MIB, TOLERANCE, engine_for, greedy, truth
from tiny_models import ARCHS, VOCAB_SIZE, random_adapter, tiny_model

from serve.engine.base import GenerationRequest
from serve.engine.local import LocalEngine


def ids(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(count))


def request(
    index: int, prompt: tuple[int, ...], adapter: Path | None = None, account: str = "a"
) -> GenerationRequest:
    made = greedy(index, prompt, adapter)
    return replace(made, params=replace(made.params, prompt_logprobs=None), account=account)


def reused(engine: LocalEngine) -> float:
    return engine.stats()["prompt_tokens_reused_total"]


def assert_true(arch: str, engine: LocalEngine, requests: list[GenerationRequest]) -> None:
    for asked, got in zip(requests, engine.generate(requests), strict=True):
        adapter = None if asked.adapter is None else Path(asked.adapter.path)
        tokens, logprobs = truth(arch, adapter, asked.prompt_ids)
        assert list(got.token_ids) == tokens
        for place, entry in enumerate(got.logprobs, start=len(asked.prompt_ids) - 1):
            assert abs(entry.logprob - logprobs[place, entry.token_id].item()) < TOLERANCE


@pytest.mark.parametrize("arch", ARCHS)
def test_what_follows_a_shared_beginning_is_exact(arch: str, tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model(arch), tmp_path / "a", 4, seed=1)
    shared = ids(150, seed=0)
    with engine_for(arch, max_batch=4, prefill_chunk=40) as engine:
        for which in (None, adapter):
            before = reused(engine)
            asked = [request(n, shared + ids(n, seed=n + 1), which) for n in range(9)]
            assert_true(arch, engine, asked)
            copied = reused(engine) - before  # nine grains of 16 each, but for the first
            assert 8 * 144 - 40 <= copied <= 8 * 144  # the second began in what the first left
        assert_true(arch, engine, [request(0, shared)])  # the same again: its last token is left


def test_those_that_come_together_wait_for_the_first() -> None:
    shared = ids(200, seed=0)
    asked = [request(n, shared + ids(30, seed=n + 1)) for n in range(6)]
    with engine_for("llama", max_batch=8, prefill_chunk=64) as engine:
        assert_true("llama", engine, asked)
        assert 5 * 192 - 64 <= reused(engine) <= 5 * 192


def test_a_conversation_goes_on_from_its_own_answer() -> None:
    opening = ids(100, seed=0)
    with engine_for("llama") as engine:
        [answer] = engine.generate([request(0, opening)])
        assert_true("llama", engine, [request(1, opening + answer.token_ids + ids(20, seed=1))])
        assert reused(engine) == 112  # of 115 whose keys are known: the last was never fed back


def test_nothing_is_shared_between_accounts_or_versions(tmp_path: Path) -> None:
    adapter = random_adapter(tiny_model("llama"), tmp_path / "a", 4, seed=1)
    prompt = ids(150, seed=0)
    with engine_for("llama") as engine:
        asked = [request(0, prompt), request(1, prompt, adapter), request(2, prompt, account="b")]
        for one in asked:
            assert_true("llama", engine, [one])
        assert reused(engine) == 0


def test_prompt_logprobs_are_computed_whole() -> None:
    prompt = ids(150, seed=0)
    with engine_for("llama") as engine:
        engine.generate([request(0, prompt)])
        [scored] = engine.generate([greedy(1, prompt)])
        assert scored.prompt_logprobs is not None
        assert len(scored.prompt_logprobs) == 150


def test_kept_prefixes_make_room_and_never_mislead(tmp_path: Path) -> None:
    """Random conversations in an arena that holds few: every answer is the model's own."""
    adapter = random_adapter(tiny_model("mistral"), tmp_path / "a", 3, seed=2)
    draw = random.Random(3)
    known = [ids(draw.randint(20, 180), seed=n) for n in range(5)]
    with engine_for("mistral", kv_budget_bytes=MIB // 2, max_batch=3, prefill_chunk=48) as engine:
        for turn in range(12):
            asked = []
            for index in range(4):
                start = draw.choice(known)
                prompt = start[: draw.randint(1, len(start))] + ids(draw.randint(0, 60), turn)
                which = draw.choice((None, adapter))
                asked.append(request(index, prompt or (5,), which, draw.choice("ab")))
            assert_true("mistral", engine, asked)
            known[draw.randrange(5)] = asked[0].prompt_ids[:200]
        stats = engine.stats()
        assert stats["prompt_tokens_reused_total"] > 0
        assert stats["kv_tokens_reserved"] <= stats["kv_tokens"]

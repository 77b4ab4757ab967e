"""The engine as a service: streams, stops, seeds, cancellation, overload, failure, closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import EOS_ID, VOCAB_SIZE, tiny_model, tiny_tokenizer

from data.errors import (
    ContextTooLong,
    EngineFailure,
    InvalidInput,
    ModelUnavailable,
    Overloaded,
    ToolkitError,
)
from serve.engine.base import Completion, Delta, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

MIB = 2**20
TOKENIZER = tiny_tokenizer()


def make(**config: Any) -> LocalEngine:
    return LocalEngine(
        tiny_model("llama"), TOKENIZER, EngineConfig(**{"kv_budget_bytes": MIB, **config}), "base-0"
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with make() as running:
        yield running


def request(
    name: str = "r", prompt: tuple[int, ...] = (40, 50, 60), **params: Any
) -> GenerationRequest:
    defaults: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return GenerationRequest(name, prompt, SamplingParams(**{**defaults, **params}))


def one(engine: LocalEngine, **params: Any) -> Completion:
    return engine.generate([request(**params)])[0]


def assert_all_taken_back(engine: LocalEngine) -> None:
    """The cache is free again; the last delta comes a moment before."""
    deadline = time.monotonic() + 10
    while engine.stats()["kv_tokens_reserved"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["kv_tokens_reserved"] == 0


class Recorder:
    """Keeps deltas; `done` is set by the last."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.first = threading.Event()
        self.done = threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.first.set()
        if delta.finish_reason:
            self.done.set()

    @property
    def reason(self) -> str | None:
        assert self.done.wait(30)
        assert sum(delta.finish_reason is not None for delta in self.deltas) == 1
        return self.deltas[-1].finish_reason


def test_deltas_come_one_token_at_a_time_and_make_the_completion(engine: LocalEngine) -> None:
    recorder = Recorder()
    engine.submit(request(logprobs=1), recorder)
    assert recorder.reason == "length"
    whole = one(engine, logprobs=1)
    assert [len(delta.token_ids) for delta in recorder.deltas] == [1] * 24
    assert "".join(delta.text for delta in recorder.deltas) == whole.text
    assert whole.text == TOKENIZER.decode(whole.token_ids, skip_special_tokens=True)
    assert tuple(entry for delta in recorder.deltas for entry in delta.logprobs) == whole.logprobs


def test_stop_string_is_excluded_from_text_and_ends(engine: LocalEngine) -> None:
    text = one(engine).text
    middle = next(text[n : n + 2] for n in range(2, 20) if text.find(text[n : n + 2]) == n)
    done = one(engine, stop=(middle, "never there"))
    assert done.finish_reason == "stop"
    assert done.text == text[: text.find(middle)]


def test_eos_and_stop_tokens_end_and_add_no_text(engine: LocalEngine) -> None:
    whole = one(engine)
    place = next(n for n in range(3, 24) if whole.token_ids[n] not in whole.token_ids[:n])
    done = one(engine, stop_token_ids=frozenset({whole.token_ids[place]}))
    assert done.finish_reason == "stop"
    assert done.token_ids == whole.token_ids[: place + 1]
    assert done.text == TOKENIZER.decode(whole.token_ids[:place], skip_special_tokens=True)
    ended = one(engine, ignore_eos=False, logit_bias={EOS_ID: 100.0})
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((EOS_ID,), "", "stop")


def test_min_tokens_keeps_eos_away(engine: LocalEngine) -> None:
    done = one(engine, ignore_eos=False, logit_bias={EOS_ID: 100.0}, min_tokens=7)
    assert done.token_ids.index(EOS_ID) == 7


def test_seeds_do_not_depend_on_batch_mates(engine: LocalEngine) -> None:
    wanted = request("s", temperature=1.0, seed=11, top_p=0.95)
    [alone] = engine.generate([wanted])
    mates = [request(f"m{n}", (n + 9,) * (n + 1), temperature=1.5) for n in range(9)]
    crowd = engine.generate([*mates[:4], wanted, *mates[4:]])
    assert crowd[4] == alone
    assert one(engine, temperature=1.0, seed=12).token_ids != alone.token_ids
    free = [one(engine, temperature=1.0).token_ids for _ in range(2)]
    assert free[0] != free[1]


def test_zero_tokens_score_the_prompt(engine: LocalEngine) -> None:
    done = one(engine, max_tokens=0, prompt_logprobs=1)
    assert (done.token_ids, done.text, done.finish_reason) == ((), "", "length")
    assert done.prompt_logprobs is not None
    assert len(done.prompt_logprobs) == 3


def test_frequency_penalty_avoids_repeats(engine: LocalEngine) -> None:
    plain = one(engine, max_tokens=40, frequency_penalty=-2.0)
    varied = one(engine, max_tokens=40, frequency_penalty=2.0)
    assert len(set(varied.token_ids)) > len(set(plain.token_ids))


def test_wrong_requests_are_refused_at_once(engine: LocalEngine) -> None:
    for wrong, param in (
        (request(prompt=()), "prompt"),
        (request(prompt=(1, VOCAB_SIZE)), "prompt"),
        (request(prompt=(-1,)), "prompt"),
        (request(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
    ):
        with pytest.raises(InvalidInput) as caught:
            engine.submit(wrong, Recorder())
        assert caught.value.param == param
    with pytest.raises(ContextTooLong, match=r"maximum context length is 512 tokens"):
        engine.submit(request(prompt=(9,) * 500), Recorder())
    assert len(one(engine, prompt=(9,) * 488).token_ids) == 24


def test_an_id_is_used_once_at_a_time() -> None:
    with make() as engine:
        recorder = Recorder()
        engine.submit(request(max_tokens=400), recorder)
        with pytest.raises(InvalidInput, match="in use"):
            engine.submit(request(), Recorder())
        engine.cancel("r")
        assert recorder.reason == "cancelled"


def test_cancel_while_running_waiting_and_unknown() -> None:
    with make(max_batch=1) as engine:
        running, waiting = Recorder(), Recorder()
        engine.submit(request("run", max_tokens=480), running)
        engine.submit(request("wait", max_tokens=480), waiting)
        assert running.first.wait(30)
        engine.cancel("wait")
        assert waiting.reason == "cancelled"
        engine.cancel("run")
        assert running.reason == "cancelled"
        engine.cancel("nobody")
        assert engine.generate([request()])[0].finish_reason == "length"
        assert_all_taken_back(engine)
        assert engine.stats()["requests_cancelled_total"] == 2


def test_overload_is_told_at_once_and_passes() -> None:
    with make(max_batch=1, queue_size=2) as engine:
        recorders = [Recorder() for _ in range(3)]
        for n, recorder in enumerate(recorders):
            engine.submit(request(f"r{n}", max_tokens=200), recorder)
        with pytest.raises(Overloaded) as caught:
            engine.submit(request("more"), Recorder())
        assert caught.value.retry_after_s >= 1
        assert [recorder.reason for recorder in recorders] == ["length"] * 3
        done = engine.generate([request(f"g{n}", max_tokens=3) for n in range(12)])
        assert len(done) == 12


def test_a_burst_of_one_account_does_not_starve_another() -> None:
    order: list[str] = []
    with make(max_batch=2) as engine:
        recorders = []
        for n in range(12):
            recorders.append(Recorder())
            engine.submit(replace(request(f"burst{n}"), account="loud"), recorders[-1])
        quiet = Recorder()
        engine.submit(replace(request("quiet"), account="calm"), quiet)
        for name, recorder in [("quiet", quiet), *((f"b{n}", r) for n, r in enumerate(recorders))]:
            threading.Thread(
                target=lambda n=name, r=recorder: (r.done.wait(30), order.append(n))
            ).start()
        assert all(recorder.reason == "length" for recorder in [*recorders, quiet])
        deadline = time.monotonic() + 10
        while len(order) < 13 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert order.index("quiet") < 6


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", lambda works: 1 / 0)
            recorder = Recorder()
            engine.submit(request(), recorder)
            assert recorder.reason == "error"
            assert isinstance(recorder.deltas[-1].error, EngineFailure)
            with pytest.raises(EngineFailure, match="ZeroDivisionError"):
                engine.generate([request()])
        assert one(engine).finish_reason == "length"
        assert_all_taken_back(engine)


def test_a_step_that_hangs_fails_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with make(watchdog_s=0.2) as engine:
        run = engine._runner.run
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", lambda works: (release.wait(20), run(works))[1])
            recorder = Recorder()
            engine.submit(request(), recorder)
            assert recorder.reason == "error"
            error = recorder.deltas[-1].error
            assert isinstance(error, ToolkitError)
            assert error.code == "engine_stalled"
            release.set()
        assert one(engine).finish_reason == "length"
        assert len(recorder.deltas) == 1


def test_output_that_is_not_finite_fails_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as engine:
        expected = one(engine)
        run = engine._runner.run

        def poison(works: Any) -> Any:
            output = run(works)
            for work, rows in output.rows:
                if work.stream.request.id == "bad":
                    output.logits[rows, 0] = torch.nan
            return output

        monkeypatch.setattr(engine._runner, "run", poison)
        recorders = {name: Recorder() for name in ("bad", "good")}
        for name, recorder in recorders.items():
            engine.submit(request(name), recorder)
        assert recorders["bad"].reason == "error"
        assert recorders["good"].reason == "length"
        assert tuple(t for d in recorders["good"].deltas for t in d.token_ids) == expected.token_ids


def test_a_receiver_that_raises_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    with make() as engine:
        engine.submit(request("bad"), lambda delta: 1 / 0)
        assert one(engine).finish_reason == "length"
        assert engine.stats()["requests_cancelled_total"] == 1
    assert "on_delta of request bad failed" in caplog.text


def test_closing_tells_everyone() -> None:
    engine = make(max_batch=1).start()
    recorders = [Recorder() for _ in range(3)]
    for n, recorder in enumerate(recorders):
        engine.submit(request(f"r{n}", max_tokens=480), recorder)
    assert recorders[0].first.wait(30)
    engine.close()
    engine.close()
    assert [recorder.reason for recorder in recorders] == ["error"] * 3
    with pytest.raises(EngineFailure, match="not running"):
        engine.submit(request(), Recorder())


def test_a_closed_engine_leaves_memory_at_once() -> None:
    gc.collect()
    gc.disable()  # it looks for circles when many objects were made, not when memory is short
    try:
        with make() as engine:
            one(engine)
            model = weakref.ref(engine._runner.model)
        del engine
        assert model() is None
    finally:
        gc.enable()


def test_what_it_says_of_itself(engine: LocalEngine) -> None:
    assert engine.fingerprint == "base-0+engine3.float32"
    assert engine.eos_token_ids == {EOS_ID}
    assert engine.max_context == 512
    stats = engine.stats()
    assert stats["kv_bytes"] <= MIB
    assert all(isinstance(value, int | float) for value in stats.values())


def test_a_budget_bounds_the_context() -> None:
    # One token: 2 layers x 2 heads x 8 wide x keys and values x 4 bytes = 256 bytes.
    engine = make(kv_budget_bytes=256 * 200)
    assert engine.max_context == 128
    engine.close()
    with pytest.raises(InvalidInput, match="KV budget"):
        make(kv_budget_bytes=1000)
    with pytest.raises(InvalidInput, match="max_batch"):
        EngineConfig(max_batch=0)


def test_many_long_requests_wait_for_room() -> None:
    with make(kv_budget_bytes=256 * 512) as engine:
        done = engine.generate([request(f"r{n}", max_tokens=200) for n in range(5)])
    assert {completion.token_ids for completion in done} == {done[0].token_ids}


def test_other_layer_types_are_refused() -> None:
    model = tiny_model("gemma3")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ModelUnavailable, match="chunked_attention"):
        LocalEngine(model, TOKENIZER)

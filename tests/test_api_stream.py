"""Generation and streaming over a scripted engine: order, errors, silence, disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from data.errors import EngineFailure, Overloaded
from serve.api import generation as generation_module
from serve.api import inbox
from serve.api.generation import Generator, unless_disconnected
from serve.api.stream import EventStream
from serve.engine.base import Delta, GenerationRequest, SamplingParams


class ScriptedEngine:
    """Takes requests and does what the test says; deltas come from another thread's call."""

    max_context = 100
    eos_token_ids = frozenset({2})
    fingerprint = "scripted"

    def __init__(self, room: int = 1000):
        self.room = room
        self.listeners: dict[str, Callable[[Delta], None]] = {}
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest, on_delta: Callable[[Delta], None]) -> None:
        if len(self.listeners) >= self.room:
            raise Overloaded("The queue is full.")
        self.listeners[request.id] = on_delta

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def say(self, request_id: str, text: str, **fields: Any) -> None:
        self.listeners[request_id](Delta(request_id, text=text, **fields))

    def end(self, request_id: str, text: str = "", reason: str = "stop", **fields: Any) -> None:
        listener = self.listeners.pop(request_id)
        listener(Delta(request_id, text=text, finish_reason=reason, **fields))


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(str(i), (1,), SamplingParams()) for i in range(count)]


def asgi(messages: asyncio.Queue[dict[str, Any]]) -> Request:
    return Request({"type": "http", "state": {"request_id": "req_1"}}, messages.get)


async def play(frames: AsyncGenerator[Any, None], messages: asyncio.Queue[Any]) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    request = asgi(messages)
    response = await EventStream.begin(request, frames)
    await response(request.scope, request.receive, send)
    return sent


def text_of(sent: list[Any]) -> str:
    return b"".join(message.get("body", b"") for message in sent).decode()


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 10))


def test_answers_keep_their_order() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(Generator(engine).answer(requests(2)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        engine.say("1", "b")
        engine.end("1", "B", token_ids=(7, 8))
        engine.end("0", "a", reason="length")
        first, second = await task
        assert (first.text, first.finish_reason) == ("a", "length")
        assert (second.text, second.token_ids) == ("bB", [7, 8])
        assert engine.cancelled == []

    run(work())


def test_many_candidates_pass_through_a_small_queue() -> None:
    async def work() -> None:
        engine = ScriptedEngine(room=2)
        task = asyncio.ensure_future(Generator(engine).answer(requests(5)))  # type: ignore[arg-type]
        for i in range(5):
            await asyncio.sleep(0.01)
            assert len(engine.listeners) == min(2, 5 - i)
            engine.end(str(i), str(i))
        assert [answer.text for answer in await task] == list("01234")

    run(work())


def test_one_request_holds_a_bounded_share_of_the_engine() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        Generator(engine).start(requests(100))  # type: ignore[arg-type]
        assert len(engine.listeners) == generation_module.IN_FLIGHT

    run(work())


def test_a_full_engine_is_told_at_once() -> None:
    async def work() -> None:
        with pytest.raises(Overloaded):
            await Generator(ScriptedEngine(room=0)).answer(requests(1))  # type: ignore[arg-type]

    run(work())


def test_a_failing_sequence_cancels_its_sisters() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(Generator(engine).answer(requests(3)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        engine.end("1", reason="error", error=EngineFailure("the engine died"))
        with pytest.raises(EngineFailure, match="the engine died"):
            await task
        assert sorted(engine.cancelled) == ["0", "2"]

    run(work())


def test_a_client_that_leaves_cancels_its_request() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        answering = unless_disconnected(asgi(messages), Generator(engine).answer(requests(2)))  # type: ignore[arg-type]
        task = asyncio.ensure_future(answering)
        await asyncio.sleep(0.01)
        messages.put_nowait({"type": "http.disconnect"})
        with pytest.raises(ClientDisconnect):
            await task
        assert engine.cancelled == ["0", "1"]

    run(work())


async def frames_of(generator: Generator, count: int, idle_s: float = 5.0) -> Any:
    async for told in generator.start(requests(count)).events(idle_s=idle_s):
        yield [{"index": index, "text": delta.text} for index, delta in told]


def test_a_stream_ends_with_done() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 1), asyncio.Queue()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.say("0", "é\n")
        engine.end("0", "!")
        sent = await task
        assert sent[0]["status"] == 200
        headers = dict(sent[0]["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert headers[b"cache-control"] == b"no-cache"
        assert headers[b"x-accel-buffering"] == b"no"
        assert text_of(sent) == (
            'data: {"index":0,"text":"é\\n"}\n\ndata: {"index":0,"text":"!"}\n\ndata: [DONE]\n\n'
        )
        assert [message.get("more_body") for message in sent] == [None, True, False]
        assert sent[-1]["body"] == b"data: [DONE]\n\n"

    run(work())


def test_an_engine_that_dies_mid_stream_sends_an_error_and_no_done() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 1), asyncio.Queue()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.say("0", "a")
        engine.end("0", reason="error", error=EngineFailure("the engine died"))
        text = text_of(await task)
        assert '"message": "the engine died"' in text or '"message":"the engine died"' in text
        assert "[DONE]" not in text
        assert "event:" not in text

    run(work())


def test_an_error_before_the_first_token_is_an_ordinary_response() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 1), asyncio.Queue()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.end("0", reason="error", error=EngineFailure("no such luck"))
        with pytest.raises(EngineFailure, match="no such luck"):
            await task

    run(work())


def test_silence_is_filled_with_comments() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        frames = frames_of(Generator(engine), 1, idle_s=0.02)  # type: ignore[arg-type]
        task = asyncio.ensure_future(play(frames, asyncio.Queue()))
        await asyncio.sleep(0.1)
        engine.end("0", "x")
        text = text_of(await task)
        assert text.startswith(": ping\n\n: ping\n\n")
        assert text.endswith('data: {"index":0,"text":"x"}\n\ndata: [DONE]\n\n')

    run(work())


def test_a_client_that_leaves_a_stream_cancels_it() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 2), messages))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.say("0", "a")
        await asyncio.sleep(0.01)
        messages.put_nowait({"type": "http.disconnect"})
        assert "[DONE]" not in text_of(await task)
        assert sorted(engine.cancelled) == ["0", "1"]

    run(work())


def test_a_bug_mid_stream_names_the_request_and_hides_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def frames() -> Any:
        yield [{"a": 1}]
        raise ZeroDivisionError("secret")

    async def work() -> None:
        text = text_of(await play(frames(), asyncio.Queue()))
        assert "req_1" in text
        assert "secret" not in text
        assert "[DONE]" not in text

    run(work())
    assert "secret" in caplog.text


def test_tokens_that_come_close_together_are_sent_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first at once, an event each; the end does not wait for the others' turn."""
    monkeypatch.setattr(inbox, "PAUSE_S", 0.3)

    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 1), asyncio.Queue()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.say("0", "a")
        await asyncio.sleep(0.05)  # sent
        for text in "bc":
            engine.say("0", text)
            await asyncio.sleep(0.01)
        started = asyncio.get_running_loop().time()
        engine.end("0", "d")
        bodies = [message.get("body", b"").decode() for message in await task]
        assert asyncio.get_running_loop().time() - started < 0.2
        assert [body.count("data: ") for body in bodies] == [0, 1, 3, 1]
        assert [text for text in "abcd" if f'"text":"{text}"' in "".join(bodies)] == list("abcd")

    run(work())


def test_what_came_before_a_failure_is_told() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        task = asyncio.ensure_future(play(frames_of(Generator(engine), 1), asyncio.Queue()))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        engine.say("0", "a")
        engine.end("0", reason="error", error=EngineFailure("the engine died"))
        text = text_of(await task)
        assert text.index('"text":"a"') < text.index("the engine died")

    run(work())


def test_who_wants_whole_answers_is_woken_by_endings_alone() -> None:
    async def work() -> None:
        engine = ScriptedEngine()
        generation = Generator(engine).start(requests(2))  # type: ignore[arg-type]
        seen = []

        async def read() -> None:
            async for told in generation.events(ends_only=True):
                seen.append("".join(delta.text for _, delta in told))

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0)
        for text in "abc":
            engine.say("0", text)
            await asyncio.sleep(0.03)
        assert seen == []
        engine.end("0", "d")
        await asyncio.sleep(0.03)
        assert seen == ["abcd"]
        engine.end("1", "e")
        await task
        assert seen == ["abcd", "e"]

    run(work())


def test_threads_that_ring_at_any_moment_are_all_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "PAUSE_S", 0.001)

    async def work() -> None:
        mailbox = inbox.Mailbox()
        boxes = [inbox.Inbox(mailbox) for _ in range(4)]

        def tell(box: inbox.Inbox) -> None:
            for number in range(2000):
                box.put(number, Delta("0"))
                if number % 100 == 0:
                    time.sleep(0.001)

        async def hear(box: inbox.Inbox) -> list[int]:
            heard: list[int] = []
            while len(heard) < 2000:
                heard += [index for index, _ in await box.take()]
            return heard

        telling = [asyncio.to_thread(tell, box) for box in boxes]
        heard = await asyncio.gather(*telling, *map(hear, boxes))
        assert heard[4:] == [list(range(2000))] * 4

    run(work())

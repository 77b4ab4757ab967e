"""What is counted when sequences fail, are cancelled late, or never begin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from api_server import MODEL, running, tiny_settings
from sqlalchemy import select

from data.db import Database
from data.errors import EngineFailure, Overloaded
from data.tables_metering import UsageRecord
from serve.api.generation import Generator
from serve.api.metered import Metered, Tally
from serve.api.prompts import Prompt
from serve.engine.base import Delta, GenerationRequest, SamplingParams

PROMPTS = [Prompt((1, 2, 3), "abc"), Prompt((1, 2, 3, 4, 5), "abcde")]


class SlowToStop:
    """An engine whose cancelled sequences still report what their last step made."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.listeners: dict[str, Callable[[Delta], None]] = {}
        self.cancelled: list[str] = []

    def submit(self, request: GenerationRequest, on_delta: Callable[[Delta], None]) -> None:
        if len(self.listeners) >= self.room:
            raise Overloaded("The queue is full.")
        self.listeners[request.id] = on_delta

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def say(self, request_id: str, token_ids: tuple[int, ...] = (), **fields: Any) -> None:
        self.listeners[request_id](Delta(request_id, token_ids=token_ids, **fields))


def started(engine: SlowToStop, settled: list[Any]) -> Metered:
    def admit(requests: Any) -> Tally:
        return Tally(PROMPTS, len(requests), lambda *told: settled.append(told))

    return Metered(Generator(engine), admit)  # type: ignore[arg-type]


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(str(i), (1,), SamplingParams()) for i in range(count)]


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def test_an_error_after_the_first_tokens_costs_what_was_made() -> None:
    async def work() -> None:
        engine, settled = SlowToStop(), []
        task = asyncio.ensure_future(started(engine, settled).answer(requests(4)))
        await asyncio.sleep(0)
        engine.say("0", (7, 8), num_cached=2)
        engine.say("1", (7,), num_cached=1)
        engine.say("1", finish_reason="error", error=EngineFailure("broken"), num_cached=1)
        with pytest.raises(EngineFailure):
            await task
        assert settled == []  # the others still run
        assert engine.cancelled == ["0", "2", "3"]
        engine.say("0", (9,), num_cached=2)  # of the step that was under way
        for name in ("0", "2", "3"):
            engine.say(name, finish_reason="cancelled", num_cached=2 if name == "0" else 0)
        # 4 tokens in all; the first prompt was computed, with 1 token cached; the second never was.
        assert settled == [(3, 1, 4, "error")]

    run(work())


def test_a_client_that_leaves_is_settled_once_all_have_stopped() -> None:
    async def work() -> None:
        engine, settled = SlowToStop(), []
        generation = started(engine, settled).start(requests(2))
        async with aclosing(generation.events()) as events:
            engine.say("0", (1,))
            engine.say("1", (1,))
            await anext(events)
        engine.say("0", (2,), finish_reason="stop")  # ended by itself meanwhile
        assert settled == []
        engine.say("1", finish_reason="cancelled")
        assert settled == [(8, 0, 3, "aborted")]

    run(work())


def test_what_the_engine_does_not_take_costs_nothing() -> None:
    async def work() -> None:
        settled: list[Any] = []
        with pytest.raises(Overloaded):
            started(SlowToStop(room=0), settled).start(requests(2))
        assert settled == [(0, 0, 0, "error")]

    run(work())


def test_closing_the_server_writes_what_is_pending(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with running(settings) as server:
        server.runtime.meter._stopped.set()  # its thread writes no more
        answer = server.client().completions.create(model=MODEL, prompt="abc", max_tokens=3)
    database = Database(settings.effective_database_url)
    with database.read() as session:
        (row,) = session.scalars(select(UsageRecord)).all()
    database.close()
    assert answer.usage is not None
    assert row.prompt_tokens + row.completion_tokens == answer.usage.total_tokens

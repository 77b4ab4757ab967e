"""From a request's event loop to the engine's thread and back.

One API request may need many sequences (several prompts, `n`, `best_of`). They are handed to the
engine a few at a time, so that one client's hundred candidates neither fill the queue nor fail
because it is full, and they are all cancelled when the client goes away.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakSet

from starlette.requests import ClientDisconnect, Request

from data.errors import EngineFailure, Overloaded, ToolkitError
from serve.api.errors import stopping
from serve.api.inbox import Event, Inbox, LazyTimer, Mailbox
from serve.engine.base import Delta, Engine, GenerationRequest, TokenLogprob

IN_FLIGHT = 32  # sequences of one API request that wait or run in the engine at a time

T = TypeVar("T")


class Watcher(Protocol):
    """Learns of all that the engine does for one API request; see `serve.api.metered.Tally`."""

    def submitted(self, index: int) -> None:
        """A sequence goes to the engine."""

    def refused(self, index: int) -> None:
        """The engine did not take it."""

    def saw(self, index: int, delta: Delta) -> None:
        """The engine reports; called on its thread."""

    def ended(self, status: Literal["complete", "aborted", "error"]) -> None:
        """The API request is over, though cancelled sequences may still report."""


class Screen(Protocol):
    """Decides what may leave of each sequence; see `serve.api.screening.Screening`."""

    @property
    def sees_output(self) -> bool:
        """Whether it decides anything."""

    async def take(self, generation: Generation, index: int, delta: Delta) -> Sequence[Delta]:
        """Return what may leave, now that the engine tells more."""


@dataclass(slots=True)
class Answer:
    """One finished sequence."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: str = ""
    num_tokens: int = 0  # sampled, also those that are not told
    num_cached: int = 0
    embedding: Sequence[float] = ()

    def add(self, delta: Delta) -> None:
        """Append what the engine reports."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.num_tokens += delta.num_tokens
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or ""
        self.num_cached = delta.num_cached
        self.embedding = delta.embedding or ()


class Generator:
    """The engine, seen from the event loop."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.last_answer_s = float("-inf")  # on time.monotonic(): the newest sign of life
        self.closed: Mapping[str, ToolkitError] = {}  # accounts that are not served, and why
        self._stopping: ToolkitError | None = None
        self._live: WeakSet[Generation] = WeakSet()

    @cached_property
    def mailbox(self) -> Mailbox:
        """Where the engine's thread leaves what it tells."""
        return Mailbox()

    def start(
        self,
        requests: Sequence[GenerationRequest],
        watcher: Watcher | None = None,
        screen: Screen | None = None,
    ) -> Generation:
        """Submit the requests; a watcher learns of all that becomes of them.

        Args:
            screen: Decides what of it is told; None tells all.

        Raises:
            Forbidden: The account is closed.
            Overloaded: The engine's queue is full.
            ContextTooLong: A prompt does not fit.
        """
        self.check(requests[0].account)
        generation = Generation(self, requests, watcher, screen)
        self._live.add(generation)
        generation.fill()
        return generation

    @property
    def is_stopping(self) -> bool:
        """Whether nothing more is answered."""
        return self._stopping is not None

    def check(self, account: str) -> None:
        """Refuse the requests of a closed account, and all when the server stops."""
        if self._stopping is not None:
            raise copy(self._stopping)
        if account in self.closed:
            raise copy(self.closed[account])

    def close_accounts(self, closed: Mapping[str, ToolkitError]) -> None:
        """Refuse accounts from now on, and end what runs for them with their error."""
        self.closed = closed
        for generation in list(self._live):
            if generation.account in closed:
                generation.end(copy(closed[generation.account]))

    def note(self, delta: Delta) -> None:
        """Take a delta for a sign of life, or of a failure that /health is to look at."""
        if delta.finish_reason != "error":
            self.last_answer_s = time.monotonic()
        elif isinstance(delta.error, EngineFailure):
            self.last_answer_s = float("-inf")

    def stop(self) -> None:
        """Refuse all from now on, and end what runs with an error."""
        self._stopping = stopping()
        for generation in list(self._live):
            generation.end(copy(self._stopping))

    async def answer(self, requests: Sequence[GenerationRequest]) -> list[Answer]:
        """Run the requests to their end and return their answers in order."""
        answers = [Answer() for _ in requests]
        async with aclosing(self.start(requests).events(ends_only=True)) as events:
            async for told in events:
                for index, delta in told:
                    answers[index].add(delta)
        return answers


class Generation:
    """The sequences of one API request."""

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[GenerationRequest],
        watcher: Watcher | None = None,
        screen: Screen | None = None,
    ):
        self._screen = screen
        self._stopped: set[int] = set()
        self.account = requests[0].account
        self._ended_by: ToolkitError | None = None
        self._generator = generator
        self._watcher = watcher
        self._waiting = deque(enumerate(requests))
        self._running: dict[int, str] = {}
        self._inbox = Inbox(generator.mailbox)

    def fill(self) -> None:
        """Hand waiting sequences to the engine while it takes them."""
        while self._waiting and len(self._running) < IN_FLIGHT:
            index, request = self._waiting[0]
            if self._watcher:
                self._watcher.submitted(index)
            try:
                self._generator.engine.submit(request, self._listener(index))
            except BaseException as error:
                if self._watcher:
                    self._watcher.refused(index)
                if isinstance(error, Overloaded) and self._running:
                    return  # tried again when one of ours has finished
                self.cancel()
                raise
            self._waiting.popleft()
            self._running[index] = request.id

    async def events(
        self, *, idle_s: float | None = None, ends_only: bool = False
    ) -> AsyncGenerator[list[Event], None]:
        """Yield what happens until every sequence has ended; nothing after `idle_s` of silence.

        Args:
            ends_only: Yield only when a sequence ends, with all that came before. Without effect
                if a screen has to see the text while it comes.

        Raises:
            ToolkitError: The engine could not go on with one of them; the others are cancelled.
        """
        self._inbox.ends_only = ends_only and self._screen is None
        silence = None if idle_s is None else LazyTimer(idle_s, self._inbox.wake)
        status: Literal["complete", "aborted", "error"] = "aborted"
        try:
            while self._running or self._waiting:
                told = await self._inbox.take()
                if self._ended_by is not None:
                    raise self._ended_by
                shown: list[Event] = []
                failure: ToolkitError | None = None
                for index, delta in told:
                    failure = self._failure(index, delta)
                    if failure is not None:
                        break
                    if self._screen is None:
                        shown.append((index, delta))
                    else:
                        passed = await self._screen.take(self, index, delta)
                        shown += [(index, one) for one in passed]
                if shown or not told:
                    yield shown
                    if silence is not None:
                        silence.renew()
                if failure is not None:
                    raise failure
            status = "complete"
        except ToolkitError:
            status = "error"
            raise
        finally:
            if silence is not None:
                silence.cancel()
            self.cancel()
            if self._watcher:
                self._watcher.ended(status)

    def _failure(self, index: int, delta: Delta) -> ToolkitError | None:
        """Look whether a sequence has ended, and return why if it should not have."""
        if delta.finish_reason is None:
            return None
        del self._running[index]
        cancelled = delta.finish_reason == "cancelled" and index not in self._stopped
        if delta.finish_reason == "error" or cancelled:
            return delta.error or EngineFailure(
                "The server stopped before the answer was complete; ask again."
            )
        self.fill()
        return None

    def end(self, error: ToolkitError) -> None:
        """Make `events` raise an error as soon as it looks; what runs is cancelled then."""
        self._ended_by = error
        self._inbox.wake()

    def stop(self, index: int) -> None:
        """End one sequence; its last delta, with what was produced meanwhile, still comes."""
        self._stopped.add(index)
        if index in self._running:
            self._generator.engine.cancel(self._running[index])

    def cancel(self) -> None:
        """Stop whatever still runs."""
        self._waiting.clear()
        for request_id in self._running.values():
            self._generator.engine.cancel(request_id)
        self._running.clear()

    def _listener(self, index: int) -> Any:
        def on_delta(delta: Delta) -> None:  # on the engine's thread
            if self._watcher:
                self._watcher.saw(index, delta)
            self._generator.note(delta)
            self._inbox.put(index, delta)

        return on_delta


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but stop it when the client closes the connection.

    Raises:
        ClientDisconnect: It did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

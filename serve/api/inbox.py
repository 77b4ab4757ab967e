"""From the engine's thread to the tasks of an event loop, with few wake-ups.

To wake a thread, a task and a socket costs several times what a token's text costs. So the loop is
woken once for all requests that the engine tells of, and not again for PAUSE_S: on a fast engine
the tokens of those 20 ms travel together. Who only wants the end is not woken before it, and an
end never waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from serve.engine.base import Delta

GATHER_S = 0.001  # from the first news to the look at it: the rest of an engine's step comes too
PAUSE_S = 0.02  # between two looks at what is no ending; nobody reads faster

Event = tuple[int, Delta]  # which of the request's sequences, and what happened to it


class Mailbox:
    """Wakes the inboxes of one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: deque[Inbox] = deque()
        self._listens = True  # news are told to the loop; else a timer runs that will see them
        self._hurries = False
        self._timer: asyncio.TimerHandle | None = None

    def ring(self, inbox: Inbox, *, now: bool) -> None:
        """Wake an inbox, at once or soon; called from any thread."""
        if not inbox.is_rung:
            inbox.is_rung = True
            self._rung.append(inbox)
        if now:
            if not self._hurries:
                self._hurries = True
                self._loop.call_soon_threadsafe(self._deliver)
        elif self._listens:
            self._listens = False
            self._loop.call_soon_threadsafe(self._gather)

    def _gather(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(GATHER_S, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._rung:
            self._deliver()
            self._timer = self._loop.call_later(PAUSE_S, self._look)
            return
        self._listens = True
        if self._rung:  # rung by a thread that still saw the timer
            self._gather()

    def _deliver(self) -> None:
        self._hurries = False
        while self._rung:
            inbox = self._rung.popleft()
            inbox.is_rung = False  # before its events are taken: what comes later rings again
            inbox.wake()


class Inbox:
    """What the engine told of one API request; one task takes it.

    Args:
        ends_only: Wake the task only when a sequence ends.
    """

    def __init__(self, mailbox: Mailbox, *, ends_only: bool = False):
        self.ends_only = ends_only
        self.is_rung = False
        self._mailbox = mailbox
        self._events: deque[Event] = deque()
        self._is_awake = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, delta: Delta) -> None:
        """Add an event; called from any thread."""
        self._events.append((index, delta))
        ends = delta.finish_reason is not None
        if ends or not self.ends_only:
            self._mailbox.ring(self, now=ends)

    def wake(self) -> None:
        """Let `take` return what there is; called by the loop."""
        self._is_awake = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """Wait until woken; returns all events since the last time, perhaps none."""
        if not self._is_awake:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_awake = False
        return [self._events.popleft() for _ in range(len(self._events))]


class LazyTimer:
    """Calls back whenever `limit_s` have passed since the last `renew`, which costs almost nothing.

    A timer that is cancelled and set for each token would cost as much as the token.
    """

    def __init__(self, limit_s: float, passed: Callable[[], None]):
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._passed = passed
        self._since = self._loop.time()
        self._handle = self._loop.call_later(limit_s, self._look)

    def renew(self) -> None:
        """Start again."""
        self._since = self._loop.time()

    def cancel(self) -> None:
        """Call no more."""
        self._handle.cancel()

    def _look(self) -> None:
        left = self._since + self._limit_s - self._loop.time()
        if left <= 0:
            left = self._limit_s
            self.renew()
            self._passed()
        self._handle = self._loop.call_later(left, self._look)

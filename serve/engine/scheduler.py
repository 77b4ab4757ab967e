"""Who runs in the next step: fair admission, then one token each and chunks of prompts.

Accounts take turns: a burst of one waits behind its own requests, not in front of another's. The
request whose turn it is is never overtaken, so a long one cannot starve. Prompts are computed in
chunks: at most `prefill_chunk` prompt tokens a step, or `prefill_beside` in a step in which streams
decode, so that a long prompt does not stall them. Knows no torch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from serve.engine.sequence import Stream

LONG_STALL = 4  # steps at full budget; a prompt that takes more goes at a quarter, to stall less
FAR = 600  # tokens to look back on at which a token's attention costs as much as its products


class Admission(Enum):
    """What became of the request whose turn it is."""

    RUN = auto()  # it has all it needs
    PARK = auto()  # it waits for its adapter elsewhere; the next one's turn
    FULL = auto()  # no room now; nobody overtakes it


class Work(NamedTuple):
    """Tokens of one stream to compute in a step."""

    stream: Stream
    start: int
    num_tokens: int


class Scheduler:
    """The waiting and the running."""

    def __init__(self, max_batch: int, prefill_chunk: int, prefill_beside: int | None = None):
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.prefill_beside = min(prefill_beside or prefill_chunk, prefill_chunk)
        self.running: list[Stream] = []
        self._waiting: OrderedDict[str, deque[Stream]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self._waiting)

    def add(self, stream: Stream, first: bool = False) -> None:
        """Queue a stream behind, or before, those of its account."""
        queue = self._waiting.setdefault(stream.request.account, deque())
        if first:
            queue.appendleft(stream)
        else:
            queue.append(stream)

    def admit(self, try_admit: Callable[[Stream], Admission]) -> None:
        """Let waiting streams run, account by account, while there is room."""
        while self._waiting and len(self.running) < self.max_batch:
            account, queue = next(iter(self._waiting.items()))
            outcome = try_admit(queue[0])
            if outcome is Admission.FULL:
                return
            stream = queue.popleft()
            if outcome is Admission.RUN:
                self.running.append(stream)
            if queue:
                self._waiting.move_to_end(account)
            else:
                del self._waiting[account]

    def remove_finished(self) -> list[Stream]:
        """Forget the streams that have ended, wherever they are, and return them."""
        gone = [stream for stream in self.running if stream.finished]
        self.running = [stream for stream in self.running if not stream.finished]
        for account, queue in list(self._waiting.items()):
            gone += [stream for stream in queue if stream.finished]
            self._waiting[account] = deque(stream for stream in queue if not stream.finished)
            if not self._waiting[account]:
                del self._waiting[account]
        return gone

    def plan(self, reads_prompts: bool = True) -> list[Work]:
        """Return the next step's work: a token of each stream, then prompts by admission.

        Args:
            reads_prompts: False leaves prompts to a later step, if streams decode meanwhile.
        """
        works = [Work(s, s.num_computed, 1) for s in self.running if not s.in_prompt]
        if works and not reads_prompts:
            return works
        budget = self.prefill_beside if works else self.prefill_chunk
        for stream in self.running:
            if stream.in_prompt and budget:
                length = len(stream.request.prompt_ids)
                left = length - stream.num_computed
                if works and length > LONG_STALL * self.prefill_beside:
                    share = self.prefill_beside // 4 * FAR // (FAR + stream.num_computed)
                    budget = min(budget, max(share, 1))
                count = min(left, budget)
                works.append(Work(stream, stream.num_computed, count))
                budget -= count
        return works

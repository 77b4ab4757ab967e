"""The engine's thread: take what came in, admit what fits, compute a step, say what came of it.

Whatever goes wrong ends in an error delta of the requests concerned, never in a hang: a step that
raises fails those in flight and the engine goes on; one that takes too long is failed by the
watchdog; logits that are not finite fail their own request alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from data.errors import DeadlineExceeded, EngineFailure, InvalidInput, Overloaded, ToolkitError
from serve.engine import sampling
from serve.engine.adapter_weights import LoadedAdapter
from serve.engine.adapters import AdapterStore
from serve.engine.base import (
    FINISH_CANCELLED,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    Delta,
    TokenLogprob,
)
from serve.engine.config import EngineConfig
from serve.engine.prefix_cache import PrefixCache
from serve.engine.runner import ModelRunner
from serve.engine.scheduler import Admission, Scheduler, Work
from serve.engine.sequence import Stream

COUNTERS = (
    *("steps", "prompt_tokens", "generated_tokens", "requests_stop", "requests_length"),
    *("requests_cancelled", "requests_error"),
)
CLEAN = {FINISH_STOP, FINISH_LENGTH}  # endings after which the cache block is known to be finite
logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs streams to their end on a thread of its own."""

    def __init__(self, runner: ModelRunner, adapters: AdapterStore, config: EngineConfig):
        self._runner = runner
        self._adapters = adapters
        self._config = config
        self._scheduler = Scheduler(config.max_batch, config.prefill_chunk, config.prefill_beside)
        self._prefixes = PrefixCache(runner.pool, runner.cache)
        self._streams: dict[str, Stream] = {}  # every unfinished one, by request id
        self._parked: dict[str, list[Stream]] = {}  # by digest of the adapter that they wait for
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition(threading.RLock())
        self._roused = False
        self._closing = False
        self._turn_began: float | None = None
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="hone-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="hone-watchdog", daemon=True)

    # ---- called from any thread ----

    def start(self) -> None:
        """Start the thread and its watchdog."""
        self._thread.start()
        self._watchdog.start()

    def check_running(self) -> None:
        """Raise EngineFailure unless the thread runs."""
        if self._closing or not self._thread.is_alive():
            raise EngineFailure("The engine is not running.", code="engine_closed")

    def submit(self, stream: Stream) -> None:
        """Queue a stream; raises EngineFailure, InvalidInput or Overloaded."""
        limit = self._config.max_batch + self._config.queue_size
        with self._wake:
            self.check_running()
            if stream.request.id in self._streams:
                raise InvalidInput(f'Request id "{stream.request.id}" is in use.', param="id")
            if len(self._streams) >= limit:
                raise Overloaded(f"{limit} requests run or wait already; try again in a moment.")
            limit_s = stream.request.timeout_s or self._config.request_timeout_s
            stream.limit_s = min(limit_s, self._config.request_timeout_s)
            stream.deadline = time.monotonic() + stream.limit_s
            self._streams[stream.request.id] = stream
            self._inbox.append(lambda: self._scheduler.add(stream))
            self._wake.notify_all()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have what is submitted in a block begin in the same step; the thread waits meanwhile."""
        with self._wake:
            yield

    def configure(self, config: EngineConfig) -> None:
        """Take over queue size and time limit for the requests to come."""
        self._config = config

    def cancel(self, request_id: str) -> None:
        """End a stream before the next step; unknown ids are ignored."""
        with self._wake:
            stream = self._streams.get(request_id)
            if stream is not None:
                self._inbox.append(lambda: self._finish(stream, stream.end(FINISH_CANCELLED)))
                self._wake.notify_all()

    def rouse(self) -> None:
        """Make the thread look at its adapters, and at the clock."""
        with self._wake:
            self._roused = True
            self._wake.notify_all()

    def stats(self) -> dict[str, float]:
        """Return the numbers of requests, steps and tokens."""
        with self._wake:
            unfinished, running = len(self._streams), len(self._scheduler.running)
            counts = {f"{name}_total": self._counts[name] for name in COUNTERS}
        counts["prompt_tokens_reused_total"] = self._prefixes.num_reused
        return {
            "requests_running": running,
            "requests_waiting": max(unfinished - running, 0),
            **counts,
        }

    def close(self) -> bool:
        """Stop and fail what is in flight; False if the thread is stuck or was stopped before."""
        with self._wake:
            if self._closing:
                return False
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(self._config.watchdog_s)
        self._adapters.close()
        self._fail_all(EngineFailure("The engine was stopped.", code="engine_closed"))
        return not self._thread.is_alive()

    # ---- the thread ----

    def _run(self) -> None:
        with torch.inference_mode(), self._runner.own_threads():
            while self._wait_for_work():
                self._turn_began = time.monotonic()
                try:
                    self._turn()
                except Exception as error:  # whatever it was, nobody may wait for ever
                    logger.exception("an engine step failed")
                    cause = f"{type(error).__name__}: {error}"
                    self._fail_all(EngineFailure(f"The engine failed in a step ({cause})."))
                    self._runner.bank.clear()
                    self._take_back()
                self._turn_began = None

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._closing
                    or self._roused
                    or self._inbox
                    or self._scheduler.has_work
                    or self._adapters.has_ready
                )
            )
            self._roused = False
            return not self._closing

    def _turn(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        self._expire()
        self._take_back()
        has_probed = self._settle_adapters()
        self._scheduler.admit(self._try_admit)
        for stream in self._scheduler.running:
            if stream.in_prompt and not stream.needs_all_rows:
                self._prefixes.reuse(stream)
        works = self._scheduler.plan(reads_prompts=not has_probed)
        if works:
            self._step(works)
            self._take_back()

    def _expire(self) -> None:
        """Fail what has waited or run for too long."""
        now = time.monotonic()
        with self._wake:
            late = [stream for stream in self._streams.values() if stream.deadline < now]
        for stream in late:
            state = "waited for its turn" if stream.block is None else "ran"
            error = DeadlineExceeded(
                f"The request {state} until its time limit of {stream.limit_s:g} s."
            )
            self._finish(stream, stream.end(FINISH_ERROR, error))

    def _in_use(self) -> set[str]:
        return {s.digest for s in self._scheduler.running if s.digest is not None}

    def _variants_in_use(self) -> set[str]:
        return {s.variant for s in self._scheduler.running if s.variant is not None}

    def _settle_adapters(self) -> bool:
        """Let in the adapters that were read; tells whether that took a forward pass."""
        in_use, variants = self._in_use(), self._variants_in_use()
        for digest in self._adapters.sweep(in_use):
            self._runner.bank.deactivate(digest)
        outcomes = self._adapters.settle(
            lambda adapter: self._runner.probe(adapter, variants), in_use, self._config.watchdog_s
        )
        for digest, error in outcomes.items():
            for stream in reversed(self._parked.pop(digest, [])):
                if error is not None:
                    self._finish(stream, stream.end(FINISH_ERROR, error))
                elif not stream.finished:
                    self._scheduler.add(stream, first=True)
        return bool(outcomes)

    def _try_admit(self, stream: Stream) -> Admission:
        ref = stream.request.adapter
        adapter: LoadedAdapter | None = None
        if ref is not None:
            adapter = self._adapters.get(ref.digest)
            if adapter is None:
                self._adapters.start(ref)
                self._parked.setdefault(ref.digest, []).append(stream)
                return Admission.PARK
        block = self._prefixes.allocate(stream.max_length)
        if block is None:
            return Admission.FULL
        if adapter is not None:
            scaled = adapter.scaled(stream.request.adapter_scale)
            if not self._runner.bank.activate(scaled, self._variants_in_use()):
                self._runner.pool.release(block)
                return Admission.FULL
            self._adapters.note_use(adapter.digest)
        stream.block = block
        return Admission.RUN

    def _step(self, works: list[Work]) -> None:
        output = self._runner.run(works)
        highest, likeliest = output.logits.max(dim=-1)
        finite, greedy = highest.isfinite().tolist(), likeliest.tolist()  # NaN and inf surface
        self._counts["steps"] += 1
        for work, rows in output.rows:
            stream, logits = work.stream, output.logits[rows]
            if not all(finite[rows]):
                self._finish(stream, stream.end(FINISH_ERROR, _not_finite()))
                continue
            if stream.in_prompt:
                self._counts["prompt_tokens"] += work.num_tokens
                if stream.request.params.prompt_logprobs is not None:
                    _note_prompt(work, logits)
                if stream.request.params.embed:
                    _note_hidden(work, output.hidden[rows])
            ends_prompt = stream.in_prompt
            stream.num_computed += work.num_tokens
            if not stream.in_prompt:
                if ends_prompt:
                    self._prefixes.offer(stream)
                self._emit(stream, logits[-1], greedy[rows][-1])

    def _emit(self, stream: Stream, logits: torch.Tensor, likeliest: int) -> None:
        """Choose a token, send it, and end the stream if it is the last."""
        params = stream.request.params
        if params.max_tokens == 0:
            self._finish(stream, stream.end(FINISH_LENGTH))
            return
        token, banned = likeliest, stream.banned
        if params.temperature > 0 or banned or stream.parser or sampling.adjusts(params):
            prompt = stream.request.prompt_ids
            adjusted = sampling.adjust(logits, params, prompt, stream.counts, banned)
            if stream.parser is not None:
                try:
                    adjusted = stream.parser.mask(adjusted, stream.stop_ids)
                except EngineFailure as error:
                    self._finish(stream, stream.end(FINISH_ERROR, error))
                    return
            token = sampling.choose(adjusted, params, stream.seed, len(stream.output_ids))
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = tuple(sampling.logprobs_of(logits[None], [token], params.logprobs))
        self._counts["generated_tokens"] += 1
        delta = stream.accept(token, logprobs)
        if delta.finish_reason is not None:
            self._finish(stream, delta)
        elif not stream.finished and not _call(stream, delta):
            self._finish(stream, stream.end(FINISH_CANCELLED))

    def _take_back(self) -> None:
        """Take back what finished streams hold."""
        for stream in self._scheduler.remove_finished():
            self._prefixes.release(stream, stream.finish_reason in CLEAN)

    # ---- endings: on the thread, the watchdog's, or that of `close` ----

    def _finish(self, stream: Stream, last: Delta) -> None:
        """Send the last delta, once; the thread takes the resources back after its step."""
        with self._wake:
            if stream.finished:
                return
            stream.finish_reason = last.finish_reason
            self._streams.pop(stream.request.id, None)
            self._counts[f"requests_{last.finish_reason}"] += 1
        _call(stream, last)

    def _fail_all(self, error: ToolkitError) -> None:
        with self._wake:
            streams = list(self._streams.values())
        for stream in streams:
            self._finish(stream, stream.end(FINISH_ERROR, error))

    def _watch(self) -> None:
        """Fail everybody when a turn takes too long; it cannot be interrupted, only told."""
        limit = self._config.watchdog_s
        while not self._closing:
            began = self._turn_began
            if began is not None and time.monotonic() - began > limit:
                self._fail_all(
                    EngineFailure(f"A step takes more than {limit:g} s.", code="engine_stalled")
                )
            if self._adapters.is_loading:
                self.rouse()  # so that a read that hangs, or a deadline, is noticed
            with self._wake:
                self._wake.wait_for(lambda: self._closing, timeout=min(limit / 4, 1.0))


def _call(stream: Stream, delta: Delta) -> bool:
    try:
        stream.on_delta(delta)
    except Exception:  # the receiver's mistake must not harm other requests
        logger.exception("on_delta of request %s failed", stream.request.id)
        return False
    return True


def _note_prompt(work: Work, logits: torch.Tensor) -> None:
    """Keep the log-probabilities of the prompt tokens that these rows predict."""
    stream = work.stream
    targets = stream.request.prompt_ids[work.start + 1 : work.start + 1 + len(logits)]
    if targets:
        num_top = stream.request.params.prompt_logprobs or 0
        stream.prompt_logprobs += sampling.logprobs_of(logits[: len(targets)], targets, num_top)


def _note_hidden(work: Work, hidden: torch.Tensor) -> None:
    """Add what the head was given for these tokens: all of the prompt's, or the last alone."""
    added = hidden.float().sum(dim=0).cpu()
    known = work.stream.hidden_sum
    work.stream.hidden_sum = added if known is None else known + added


def _not_finite() -> EngineFailure:
    return EngineFailure(
        "The model's output for this request is not finite: the adapter or the model is damaged.",
        code="non_finite_logits",
    )

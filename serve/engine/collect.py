"""Putting the deltas of requests together again, for callers who want to wait for the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from data.errors import Overloaded
from serve.engine.base import Completion, Delta, Engine, GenerationRequest

RETRY_S = 0.02


class Collector:
    """Receives one request's deltas; `result` waits for the last."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._done = threading.Event()

    @property
    def finished(self) -> bool:
        """Whether the last delta has come."""
        return self._done.is_set()

    def __call__(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._done.set()

    def result(self) -> Completion:
        """Wait for the end; raises the request's error if it had one."""
        self._done.wait()
        last = self._deltas[-1]
        if last.error is not None:
            raise last.error
        told = [d.prompt_logprobs for d in self._deltas if d.prompt_logprobs is not None]
        return Completion(
            token_ids=tuple(token for d in self._deltas for token in d.token_ids),
            text="".join(d.text for d in self._deltas),
            logprobs=tuple(entry for d in self._deltas for entry in d.logprobs),
            prompt_logprobs=told[0] if told else None,
            finish_reason=str(last.finish_reason),
            num_cached=last.num_cached,
            embedding=last.embedding,
        )


def generate(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    together: AbstractContextManager[None] | None = None,
) -> list[Completion]:
    """Run any number of requests, more than the queue holds, and return them in order.

    Args:
        together: Entered while the requests are submitted.

    Raises:
        ToolkitError: The first error; the other requests are cancelled.
    """
    collectors: list[Collector] = []
    try:
        with together or nullcontext():
            for request in requests:
                collectors.append(_submit_patiently(engine, request))
        return [collector.result() for collector in collectors]
    except BaseException:
        for request, collector in zip(requests, collectors, strict=False):
            if not collector.finished:
                engine.cancel(request.id)
        raise


def _submit_patiently(engine: Engine, request: GenerationRequest) -> Collector:
    collector = Collector()
    while True:
        try:
            engine.submit(request, collector)
            return collector
        except Overloaded:
            time.sleep(RETRY_S)

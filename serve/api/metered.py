"""What one completion or chat request uses: admitted, watched, and told to the ledger.

Whole and streamed answers pass here alike. Admission takes the request's tokens from the account's
limits; when its last sequence has ended, also one that was cancelled, the ledger gets what was
really produced and the limits get back the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from data.accounts import Principal
from data.errors import RateLimited
from data.metering import Status, Usage
from serve.api.adapters import RewardModel, ServedModel
from serve.api.deps import is_batch
from serve.api.generation import Generation, Generator, Screen, Watcher
from serve.api.prompts import Prompt
from serve.api.sampling import usage
from serve.engine.base import Delta, GenerationRequest
from serve.limiter import Reservation
from serve.runtime import Runtime


class Tally:
    """Counts what the engine does for one API request; a `serve.api.generation.Watcher`.

    Args:
        prompts: Sequence `i` continues prompt `i * len(prompts) // count`.
        settle: Called once, when the request is over and no sequence of it runs any more, with
            prompt, cached and completion tokens and the status.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        count: int,
        settle: Callable[[int, int, int, Status], None],
    ):
        self._prompts = prompts
        self._samples = count // len(prompts)
        self._settle = settle
        self._lock = threading.Lock()  # the event loop and the engine's thread meet here
        self._running: set[int] = set()
        self._cached: dict[int, int] = {}  # of the sequences whose prompt was computed
        self._generated = 0
        self._status: Status | None = None

    def submitted(self, index: int) -> None:
        """A sequence goes to the engine."""
        with self._lock:
            self._running.add(index)

    def refused(self, index: int) -> None:
        """The engine did not take it."""
        with self._lock:
            self._running.discard(index)

    def saw(self, index: int, delta: Delta) -> None:
        """Count what the engine reports."""
        with self._lock:
            self._generated += len(delta.token_ids)
            failed = delta.finish_reason in ("cancelled", "error")
            if delta.token_ids or delta.prompt_logprobs or (delta.finish_reason and not failed):
                self._cached[index] = delta.num_cached
            if delta.finish_reason is not None:
                self._running.discard(index)
            done = self._status is not None and not self._running
        if done:
            self._finish()

    def ended(self, status: Status) -> None:
        """The request is over; sequences that were cancelled may still report."""
        with self._lock:
            if self._status is not None:
                return
            self._status = status
            done = not self._running
        if done:
            self._finish()

    def _finish(self) -> None:
        prompts, cached = [], []
        for i, prompt in enumerate(self._prompts):
            own = range(i * self._samples, (i + 1) * self._samples)
            known = [self._cached[index] for index in own if index in self._cached]
            if known:  # a prompt that was never computed costs nothing
                prompts.append(prompt)
                cached.append(min(known))
        counted = usage(prompts, self._generated, cached)
        num_cached = counted["prompt_tokens_details"]["cached_tokens"]
        status = self._status or "error"
        self._settle(counted["prompt_tokens"], num_cached, counted["completion_tokens"], status)


class Metered(Generator):
    """The engine for one API request, which is admitted when it starts and settled at its end."""

    def __init__(
        self,
        generator: Generator,
        admit: Callable[[Sequence[GenerationRequest]], Tally],
        screen: Screen | None = None,
    ):
        self._screen = screen if screen is not None and screen.sees_output else None
        super().__init__(generator.engine)
        self._generator = generator
        self._admit = admit

    def start(
        self,
        requests: Sequence[GenerationRequest],
        watcher: Watcher | None = None,
        screen: Screen | None = None,
    ) -> Generation:
        """Submit the requests, if the account's limits allow; the tally is their watcher.

        Raises:
            Forbidden: The account is closed.
            RateLimited: The account has used up what it may use in this time.
            QuotaExceeded: It has spent what it may spend this month.
            Overloaded: The engine's queue is full.
        """
        self._generator.check(requests[0].account)
        tally = self._admit(requests)
        try:
            return self._generator.start(requests, tally, self._screen)
        except BaseException:
            tally.ended("error")
            raise


@dataclass(frozen=True, slots=True)
class Payer:
    """Whose usage something is.

    Attributes:
        end_user: Whom the request names as its end user.
        is_batch: It is a line of a batch.
    """

    account: str
    request_id: str
    key_id: str | None = None
    end_user: str | None = None
    is_batch: bool = False


def metered(
    runtime: Runtime,
    request: Request,
    end_user: str | None,
    served: ServedModel | RewardModel,
    prompts: Sequence[Prompt],
    screen: Screen | None = None,
    kind: str = "completions",
    *,
    is_part: bool = False,
) -> Metered:
    """Return the engine for this request, whose usage goes to its account.

    Args:
        end_user: Whom the request names as its end user.
        screen: Decides what of the answer is told.
        kind: What the ledger calls it.
        is_part: It belongs to a request that was admitted: not refused, only counted.
    """
    principal: Principal = request.state.principal
    payer = Payer(
        principal.project_id or "",
        request.state.request_id,
        principal.key_id,
        end_user,
        is_batch(request),
    )

    def tell(headers: dict[str, str]) -> None:
        request.state.rate_headers = headers

    return metered_for(
        runtime, payer, served.name, prompts, screen, kind, tell=tell, is_part=is_part
    )


def metered_for(
    runtime: Runtime,
    payer: Payer,
    model: str,
    prompts: Sequence[Prompt],
    screen: Screen | None = None,
    kind: str = "completions",
    *,
    tell: Callable[[dict[str, str]], None] = lambda headers: None,
    is_part: bool = False,
) -> Metered:
    """Return the engine for what an account is to pay; see `metered`.

    Args:
        tell: Called with the headers that tell what is left.
    """

    def reserve(requests: Sequence[GenerationRequest]) -> Reservation:
        if is_part:
            return runtime.gate.extend(payer.account, model)
        num_prompt = sum(len(prompt.ids) for prompt in prompts)
        most = num_prompt + sum(one.params.max_tokens for one in requests)
        try:
            reservation, left = runtime.gate.admit(payer.account, model, num_prompt, most)
        except RateLimited:
            tell(runtime.gate.headers(payer.account, model))
            raise
        tell(left)
        return reservation

    def admit(requests: Sequence[GenerationRequest]) -> Tally:
        reservation = reserve(requests)

        def settle(prompt: int, cached: int, completion: int, status: Status) -> None:
            reservation.settle(prompt + completion)
            used = Usage(
                project_id=payer.account,
                key_id=payer.key_id,
                model=model,
                request_id=payer.request_id,
                kind=kind,
                prompt_tokens=prompt,
                cached_tokens=cached,
                completion_tokens=completion,
                end_user=payer.end_user,
                status=status,
                batch=payer.is_batch,
            )
            runtime.gate.record(used)

        return Tally(prompts, len(requests), settle)

    return Metered(runtime.generator, admit, screen)

"""Several runs on one frozen base in one process: their steps go through the base together.

Each run has a seat: a thread in which it prepares, steps, evaluates, saves and ends by the code of
a run that is alone. Seats take turns, so one of them works at a time, each with random numbers of
its own. Where a seat is about to compute part of a step it waits; when all wait, parts that fit
together go through the layers as one (`fused_layers.run_layer`), and back by one backward pass. A
run meets the others nowhere else: what is learned, the order, the schedule and the files are its
own, and what ends a run ends its seat alone.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from train.base_model import Base
from train.fused_layers import Segment, can_join, meeting, run_layer

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Part:
    """A seat waits to compute part of a step, of so many tokens with padding."""

    tokens: int
    joins: bool


@dataclass(frozen=True)
class _Layer:
    """A seat waits for its rows of a layer."""

    segment: Segment


@dataclass(frozen=True)
class _Backward:
    """A seat waits for its gradients."""

    loss: torch.Tensor


class _JoinFailed(Exception):
    """A joint pass failed before anything was learned from it."""


class Seat:
    """One run's place; `work` is done in it, by `Together`.

    Attributes:
        passes: How many parts of steps were computed together with others', and alone.
    """

    def __init__(self, name: str, work: Callable[[Seat], Any]):
        self.request: Any = None
        self.result: Any = None
        self.ended = False
        self.passes = {"joint": 0, "alone": 0}
        self._model: Any = None
        self._joins: bool | None = None  # not known before the first step
        self._in_joint_pass = False
        self._answer: Any = None
        self._random = _random_state()
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._work = work
        # A daemon: a process that is told to end before training does not wait for it.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def take(self, trainer: Any) -> None:
        """Have a trainer's model and backward passes meet those of other seats."""
        self._model = trainer.model
        backward = trainer.accelerator.backward

        def meet_or_go(loss: torch.Tensor, **kwargs: Any) -> None:
            if self._in_joint_pass:
                self._ask(_Backward(loss))
            else:
                backward(loss, **kwargs)

        trainer.accelerator.backward = meet_or_go

    def compute(self, tokens: int, work: Callable[[], Result]) -> Result:
        """Do part of a step, forward and backward, when it is this seat's turn."""
        if self._joins is None:
            self._model.train()  # dropout shows itself only so
            self._joins = can_join(self._model)
        if self._ask(_Part(tokens, self._joins)):
            self._in_joint_pass = True
            try:
                with meeting(lambda segment: self._ask(_Layer(segment))):
                    found = work()
                self.passes["joint"] += 1
                return found
            except _JoinFailed:
                pass
            finally:
                self._in_joint_pass = False
        self.passes["alone"] += 1
        return work()

    def go_on(self, answer: Any = None) -> None:
        """Let the seat work until it waits again, or ends; an exception as answer is raised."""
        inside = isinstance(self.request, _Layer)  # no random numbers are drawn within a pass
        if not inside:
            before = _random_state()
            _set_random_state(self._random)
        self._answer = answer
        self._go.release()
        self._waits.acquire()
        if not inside:
            self._random = _random_state()
            _set_random_state(before)

    def _ask(self, request: Any) -> Any:
        self.request = request
        self._waits.release()
        self._go.acquire()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.result = self._work(self)
        except Exception as error:  # noqa: BLE001 - handed to whoever asked for the work
            self.result = error
        finally:
            self.ended, self.request = True, None
            self._waits.release()


class Together:
    """Does the work of several seats.

    Args:
        max_tokens: Most tokens, padding included, of a joint pass; 0 computes each part alone.
    """

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens

    def run(self, seats: Sequence[Seat]) -> list[Any]:
        """Work until all seats have ended; returns the result of each, or what it raised."""
        for seat in seats:
            seat.go_on()
        while waiting := [seat for seat in seats if not seat.ended]:
            for group in self._groups(waiting):
                if len(group) == 1:
                    group[0].go_on(False)
                else:
                    _pass(group)
        return [seat.result for seat in seats]

    def _groups(self, waiting: Sequence[Seat]) -> Iterator[list[Seat]]:
        """Part those that wait into passes: what joins, in order, up to the limit."""
        group: list[Seat] = []
        tokens = 0
        for seat in waiting:
            part: _Part = seat.request
            if not part.joins or part.tokens > self._max_tokens:
                yield [seat]
                continue
            if group and tokens + part.tokens > self._max_tokens:
                yield group
                group, tokens = [], 0
            group.append(seat)
            tokens += part.tokens
        if group:
            yield group


def _pass(group: Sequence[Seat]) -> None:
    """Take the parts of several seats through the model together."""
    for seat in group:
        seat.go_on(True)
    while meeting_here := _waiting_for(group, _Layer):
        try:
            answers: list[Any] = run_layer([seat.request.segment for seat in meeting_here])
        except RuntimeError:  # of memory, say: each computes its part alone, and tells for itself
            answers = [_JoinFailed() for _ in meeting_here]
        for seat, answer in zip(meeting_here, answers, strict=True):
            seat.go_on(answer)
    ready = _waiting_for(group, _Backward)
    failure: Exception | None = None
    try:
        if ready:
            torch.autograd.backward([seat.request.loss for seat in ready])
    except RuntimeError as error:  # gradients are half summed: none of them goes on from here
        failure = error
    for seat in ready:
        seat.go_on(failure)


def _waiting_for(group: Sequence[Seat], kind: type) -> list[Seat]:
    return [seat for seat in group if isinstance(seat.request, kind)]


def share(base: Base) -> Base:
    """Return the base with modules of its own over the same weights, which no copy may change."""
    model = base.model
    tensors = [*model.parameters(), *model.buffers()]
    return replace(base, model=copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}))


def _random_state() -> tuple[Any, ...]:
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, gpu = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state_all(gpu)

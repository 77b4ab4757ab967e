"""`POST /v1/completions`: every form of prompt, whole or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import stored_completions
from data.errors import InvalidInput
from data.tables import new_id, now
from serve.api import content_filter
from serve.api.adapters import ServedModel
from serve.api.deps import Caller, Running, json_response
from serve.api.generation import Answer, Generator, unless_disconnected
from serve.api.json_route import StrictJsonRoute
from serve.api.logprobs import CompletionLogprobs, joined, prompt_logprobs
from serve.api.metered import metered
from serve.api.prompts import Prompt, between, read_prompts, room_for
from serve.api.rewards import Ranking, best, ranking_of, reward_of
from serve.api.sampling import engine_requests, num_generated, sampling_params, usage
from serve.api.schemas import CompletionRequest
from serve.api.screening import Screening
from serve.api.stream import KEEP_ALIVE_S, EventStream, Frames
from serve.engine.base import Delta, GenerationRequest
from serve.runtime import Runtime

DEFAULT_MAX_TOKENS = 16
STORED_FIELDS = (
    *("temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty"),
    *("seed", "stop"),
)

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


@router.post("/completions")
async def create_completion(
    body: CompletionRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Continue each prompt `n` times."""
    if body.model == content_filter.MODEL:
        return await content_filter.answer(body, request, caller, runtime)
    served = await runtime.models.resolve_for(caller.id, body, caller.models)
    plan = await run_in_threadpool(_plan, body, served, runtime.engine.max_context, caller.id)
    ranking = await ranking_of(runtime, request, caller.id, body.reward_model, served)
    screening = Screening(runtime, request, caller.id, body, served.name)
    texts = [prompt.text for prompt in plan.prompts] + ([body.suffix] if body.suffix else [])
    await screening.admit(texts, "prompt")
    generator = metered(runtime, request, body.user, served, plan.prompts, screening)
    if body.stream:
        return await EventStream.begin(request, _frames(plan, generator, screening))
    answer = _answer(plan, generator, ranking, runtime, caller.id)
    return json_response(await unless_disconnected(request, answer) | screening.results())


async def _answer(
    plan: _Plan,
    generator: Generator,
    ranking: Ranking | None,
    runtime: Runtime,
    account: str,
) -> dict[str, Any]:
    answers = await generator.answer(plan.requests)
    scores = None if ranking is None else await ranking.score(plan.prompts, answers)
    chosen = _chosen(plan, answers, scores)
    whole = _whole(plan, answers, scores, chosen)
    if plan.body.store:
        ids = [answers[index].token_ids for _, index in chosen]
        await run_in_threadpool(_store, plan, whole, ids, runtime, account)
    return whole


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request, read: what to run and how to write the answer."""

    id: str
    created: int
    body: CompletionRequest
    served: ServedModel
    prompts: list[Prompt]
    samples: int  # candidates a prompt, `best_of` or `n`
    requests: list[GenerationRequest]

    def head(self) -> dict[str, Any]:
        """Return what all chunks and the whole answer have in common."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


def _plan(body: CompletionRequest, served: ServedModel, max_context: int, account: str) -> _Plan:
    completion_id = new_id("cmpl-")
    prompts = read_prompts(body.prompt, served.tokens, body.add_special_tokens)
    if body.suffix:
        prompts = between(prompts, body.suffix, served.tokens)
    if body.store and len(prompts) > 1:
        raise InvalidInput(
            f"Invalid 'store': {len(prompts)} prompts were sent; send one to store its answer.",
            param="store",
        )
    samples, scored = body.candidates, body.logprobs
    if scored is None and samples > body.n and body.reward_model is None:
        scored = 0  # best_of compares by them
    of_prompt = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        of_prompt = max(body.logprobs, of_prompt or 0)
    planned = []
    for prompt in prompts:
        room = room_for(prompt, body.max_tokens, DEFAULT_MAX_TOKENS, max_context, "prompt")
        planned.append((prompt, sampling_params(body, served, room, scored, of_prompt)))
    requests = engine_requests(completion_id, planned, samples, served, account)
    return _Plan(completion_id, now(), body, served, prompts, samples, requests)


def _chosen(
    plan: _Plan, answers: Sequence[Answer], scores: Sequence[float] | None
) -> list[tuple[Prompt, int]]:
    """Return the choices to tell: their prompts, and their places among the answers."""
    chosen = []
    for i, prompt in enumerate(plan.prompts):
        candidates = range(i * plan.samples, (i + 1) * plan.samples)
        chosen += [(prompt, index) for index in best(plan.body, answers, scores, candidates)]
    return chosen


def _whole(
    plan: _Plan,
    answers: Sequence[Answer],
    scores: Sequence[float] | None,
    chosen: Sequence[tuple[Prompt, int]],
) -> dict[str, Any]:
    choices = [
        _ChoiceWriter(plan, prompt, place).write(answers[index]) | reward_of(scores, index)
        for place, (prompt, index) in enumerate(chosen)
    ]
    cached = [answer.num_cached for answer in answers]
    counted = usage(plan.prompts, num_generated(answers), cached)
    return {**plan.head(), "choices": choices, "usage": counted}


def _store(
    plan: _Plan,
    whole: dict[str, Any],
    token_ids: Sequence[Sequence[int]],
    runtime: Runtime,
    account: str,
) -> None:
    """Keep an answer, so that it can be judged."""
    body = plan.body
    request: dict[str, Any] = {name: getattr(body, name) for name in STORED_FIELDS}
    request["token_ids"] = list(token_ids)
    stored_completions.save(
        runtime.database,
        account,
        whole,
        request,
        plan.prompts[0].text,
        body.safety_identifier or body.user,
    )


async def _frames(plan: _Plan, generator: Generator, screening: Screening) -> Frames:
    writers = [
        _ChoiceWriter(plan, plan.prompts[index // plan.samples], index)
        for index in range(len(plan.requests))
    ]
    options = plan.body.stream_options
    with_usage = options is not None and options.include_usage
    head, tail = plan.head(), {"usage": None} if with_usage else {}
    total, cached = 0, [0] * len(plan.requests)
    async with aclosing(generator.start(plan.requests).events(idle_s=KEEP_ALIVE_S)) as events:
        async for told in events:
            chunks = []
            for index, delta in told:
                total += delta.num_tokens
                cached[index] = delta.num_cached
                if writers[index].has_news(delta):
                    chunks.append({**head, "choices": [writers[index].write(delta)], **tail})
            if chunks or not told:
                yield chunks
    if screening.results():
        yield [{**head, "choices": [], **screening.results(), **tail}]
    if with_usage:
        yield [{**head, "choices": [], "usage": usage(plan.prompts, total, cached)}]


class _ChoiceWriter:
    """Writes one choice, at once from its answer or in pieces from deltas: both look alike."""

    def __init__(self, plan: _Plan, prompt: Prompt, index: int):
        self.body = plan.body
        self.tokens = plan.served.tokens
        self.prompt = prompt
        self.index = index
        self.begun = False
        self.logprobs = CompletionLogprobs(self.tokens, prompt, self.body.logprobs or 0)

    def has_news(self, delta: Delta) -> bool:
        """Tell whether a client would see anything: half a character is not text yet."""
        shown = delta.text or delta.logprobs or delta.finish_reason or self.body.return_token_ids
        return bool(shown) or not self.begun

    def write(self, piece: Answer | Delta) -> dict[str, Any]:
        """Return the choice for the next piece."""
        first, self.begun = not self.begun, True
        echoed = first and self.body.echo
        choice: dict[str, Any] = {
            "index": self.index,
            "text": self.prompt.text + piece.text if echoed else piece.text,
            "logprobs": self._logprobs(piece, echoed),
            "finish_reason": piece.finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
            if first:
                choice["prompt_token_ids"] = list(self.prompt.ids)
        if first and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                piece.prompt_logprobs or (), self.tokens, self.body.prompt_logprobs
            )
        return choice

    def _logprobs(self, piece: Answer | Delta, echoed: bool) -> dict[str, list[Any]] | None:
        if self.body.logprobs is None:
            return None
        parts = [self.logprobs.of_tokens(piece.logprobs)]
        if echoed:
            parts.insert(0, self.logprobs.of_prompt(piece.prompt_logprobs or ()))
        return joined(parts)

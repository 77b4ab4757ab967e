"""`POST /v1/chat/completions`: a conversation rendered by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import stored_chats
from data.tables import new_id, now
from serve.api.adapters import ServedModel
from serve.api.deps import Caller, Running, json_response
from serve.api.generation import Answer, Generator, unless_disconnected
from serve.api.json_route import StrictJsonRoute
from serve.api.logprobs import chat_logprobs, prompt_logprobs
from serve.api.metered import metered
from serve.api.prompts import Prompt, read_messages, room_for
from serve.api.rewards import Ranking, best, ranking_of, reward_of
from serve.api.sampling import engine_requests, num_generated, sampling_params, usage
from serve.api.schemas import ChatRequest
from serve.api.screening import Screening
from serve.api.stream import KEEP_ALIVE_S, EventStream, Frames
from serve.engine.base import Delta, GenerationRequest, TokenLogprob
from serve.runtime import Runtime

STORED_FIELDS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


@router.post("/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Answer a conversation `n` times."""
    served = await runtime.models.resolve_for(caller.id, body, caller.models)
    plan = await run_in_threadpool(_plan, body, served, runtime.engine.max_context, caller.id)
    ranking = await ranking_of(runtime, request, caller.id, body.reward_model, served)
    screening = Screening(runtime, request, caller.id, body, served.name)
    await screening.admit([message.content for message in body.messages], "messages")
    generator = metered(runtime, request, body.user, served, [plan.prompt], screening)
    if body.stream:
        frames = _frames(plan, generator, screening, runtime, caller.id)
        return await EventStream.begin(request, frames)
    answer = _answer(plan, generator, ranking, runtime, caller.id)
    return json_response(await unless_disconnected(request, answer) | screening.results())


async def _answer(
    plan: _Plan,
    generator: Generator,
    ranking: Ranking | None,
    runtime: Runtime,
    account_id: str,
) -> dict[str, Any]:
    answers = await generator.answer(plan.requests)
    scores = None if ranking is None else await ranking.score([plan.prompt], answers)
    whole = _whole(plan, answers, scores)
    await _store(plan, whole, answers, runtime, account_id, scores)
    return whole


async def _store(
    plan: _Plan,
    whole: dict[str, Any],
    answers: Sequence[Answer],
    runtime: Runtime,
    account_id: str,
    scores: Sequence[float] | None = None,
) -> None:
    """Keep an answer if its client asked for it."""
    body = plan.body
    if body.store:
        request: dict[str, Any] = {name: getattr(body, name) for name in STORED_FIELDS}
        told = best(body, answers, scores, range(len(answers)))
        request["token_ids"] = [answers[index].token_ids for index in told]
        request["user"] = body.safety_identifier or body.user
        messages = [{"role": m.role, "content": m.content} for m in body.messages]
        await run_in_threadpool(
            stored_chats.save,
            *(runtime.database, account_id, whole, request, messages, body.metadata),
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request, read: what to run and how to write the answer."""

    id: str
    created: int
    body: ChatRequest
    served: ServedModel
    prompt: Prompt
    requests: list[GenerationRequest]

    def head(self, kind: str) -> dict[str, Any]:
        """Return what all chunks, or the whole answer, begin with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def logprobs(self, scored: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Return the choice's log-probabilities, without the token that only ended it."""
        if not self.body.logprobs:
            return None
        shown = [entry for entry in scored if entry.token_id not in self.served.eos_token_ids]
        return chat_logprobs(shown, self.served.tokens, self.body.top_logprobs or 0)

    def of_prompt(self, scored: Sequence[TokenLogprob | None] | None) -> dict[str, Any]:
        """Return the extension `prompt_logprobs` of a choice, if it was asked for."""
        if self.body.prompt_logprobs is None:
            return {}
        told = prompt_logprobs(scored or (), self.served.tokens, self.body.prompt_logprobs)
        return {"prompt_logprobs": told}


def _plan(body: ChatRequest, served: ServedModel, max_context: int, account: str) -> _Plan:
    completion_id = new_id("chatcmpl-")
    prompt = read_messages(body.messages, served.tokens, body.add_special_tokens)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    room = room_for(prompt, wanted, max_context, max_context, "messages")
    scored = (body.top_logprobs or 0) if body.logprobs else None
    if scored is None and body.candidates > body.n and body.reward_model is None:
        scored = 0  # best_of compares by them
    params = sampling_params(body, served, room, scored, body.prompt_logprobs)
    if body.response_format is not None:
        params = replace(params, json_schema=body.response_format.schema_text)
    requests = engine_requests(completion_id, [(prompt, params)], body.candidates, served, account)
    return _Plan(completion_id, now(), body, served, prompt, requests)


def _whole(
    plan: _Plan, answers: Sequence[Answer], scores: Sequence[float] | None = None
) -> dict[str, Any]:
    told = best(plan.body, answers, scores, range(len(answers)))
    choices = [
        _choice(plan, place, answers[index]) | reward_of(scores, index)
        for place, index in enumerate(told)
    ]
    cached = [answer.num_cached for answer in answers]
    counted = usage([plan.prompt], num_generated(answers), cached)
    return {**plan.head("chat.completion"), "choices": choices, "usage": counted}


def _choice(plan: _Plan, index: int, answer: Answer) -> dict[str, Any]:
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": plan.logprobs(answer.logprobs),
        "finish_reason": answer.finish_reason,
    }
    if plan.body.return_token_ids:
        choice["token_ids"] = answer.token_ids
        choice["prompt_token_ids"] = list(plan.prompt.ids)
    return choice | plan.of_prompt(answer.prompt_logprobs)


async def _frames(
    plan: _Plan, generator: Generator, screening: Screening, runtime: Runtime, account_id: str
) -> Frames:
    options = plan.body.stream_options
    with_usage = options is not None and options.include_usage
    head = plan.head("chat.completion.chunk")
    if with_usage:
        head["usage"] = None
    begun: set[int] = set()
    answers = [Answer() for _ in plan.requests]
    generation = generator.start(plan.requests)
    async with aclosing(generation.events(idle_s=KEEP_ALIVE_S)) as events:
        async for told in events:
            pieces = []
            for index, delta in told:
                answers[index].add(delta)
                if index not in begun:
                    begun.add(index)
                    start = _piece(index, {"role": "assistant", "content": ""})
                    pieces.append(start | plan.of_prompt(delta.prompt_logprobs))
                if delta.text or delta.logprobs or plan.body.return_token_ids:
                    pieces.append(_content(plan, index, delta))
                if delta.finish_reason is not None:
                    pieces.append(_piece(index, {}) | {"finish_reason": delta.finish_reason})
            if pieces or not told:
                yield [{**head, "choices": [piece]} for piece in pieces]
    whole = _whole(plan, answers)
    await _store(plan, whole, answers, runtime, account_id)
    if screening.results():
        yield [{**head, "choices": [], **screening.results()}]
    if with_usage:
        yield [{**head, "choices": [], "usage": whole["usage"]}]


def _content(plan: _Plan, index: int, delta: Delta) -> dict[str, Any]:
    piece = _piece(index, {"content": delta.text}) | {"logprobs": plan.logprobs(delta.logprobs)}
    if plan.body.return_token_ids:
        piece["token_ids"] = list(delta.token_ids)
    return piece


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

"""Answers drawn from the account's models, as tasks for labelers.

They are made under the account's limits and content policy and go on its bill, like completions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from data.errors import InvalidInput
from data.feedback import projects, tasks
from data.feedback.draws import as_tasks, check_draw
from data.feedback.tasks import CandidateSpec
from data.tables import new_id
from serve.api.adapters import ServedModel
from serve.api.generation import Answer
from serve.api.metered import metered
from serve.api.prompts import Prompt, read_messages, read_prompts, room_for
from serve.api.sampling import SMALLEST_TOP_P, engine_requests
from serve.api.schemas import INT64, ChatMessage, RequestModel
from serve.api.screening import Screening
from serve.engine.base import SamplingParams
from serve.runtime import Runtime


class SampleTasks(RequestModel):
    """Prompts, and `count` answers to each of every model."""

    prompts: list[str | list[ChatMessage]]
    models: list[str] = Field(min_length=1, max_length=9)
    count: int = Field(2, ge=1, le=18)
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    user: str | None = Field(None, max_length=128)  # whose prompts they are


@dataclass(frozen=True, slots=True)
class Sampled:
    """How many tasks were added, and what was left out: answers that are the same, or empty."""

    added: int
    left_out: dict[str, int]


async def sample(
    runtime: Runtime, request: Request, account: str, label_project_id: str, body: SampleTasks
) -> Sampled:
    """Draw the answers, and add the tasks that they make, all or none.

    Raises:
        NotFound: No such labeling project.
        ModelNotFound: The account has no such model.
        InvalidInput: The answers make no tasks of the project's kind.
        ContextTooLong: A prompt leaves no room for an answer.
        RateLimited, QuotaExceeded, ContentBlocked: As for completions.
    """
    database = runtime.database
    project = await run_in_threadpool(projects.get, database, account, label_project_id)
    check_draw(project.kind, len(body.prompts), len(body.models), body.count)
    served = [await runtime.models.resolve(account, name) for name in body.models]
    drawn = [await _answers(runtime, request, account, body, model) for model in served]
    left_out: Counter[str] = Counter(same=0, empty=0)
    made = []
    for place, prompt in enumerate(body.prompts):
        mine = range(place * body.count, (place + 1) * body.count)
        answers = [
            CandidateSpec(found[i].text, model.name, _origin(body, found[i]))
            for i in mine
            for model, found in zip(served, drawn, strict=True)
        ]
        told = (
            prompt
            if isinstance(prompt, str)
            else [{"role": m.role, "content": m.content} for m in prompt]
        )
        made += as_tasks(project.kind, told, answers, left_out, body.user)
    if not made:
        raise InvalidInput(
            f"No task came of it: {left_out['same']} answers or pairs were the same, "
            f"{left_out['empty']} empty. Raise 'temperature', or name different models.",
            param="models",
        )
    added = await run_in_threadpool(tasks.add, database, account, label_project_id, made)
    return Sampled(added, dict(left_out))


async def _answers(
    runtime: Runtime, request: Request, account: str, body: SampleTasks, served: ServedModel
) -> list[Answer]:
    """Return `count` answers of a model to each prompt."""
    prompts = await run_in_threadpool(
        lambda: [_read(prompt, served) for prompt in body.prompts],
    )
    screening = Screening(runtime, request, account, body, served.name)
    await screening.admit([prompt.text for prompt in prompts], "prompts")
    context = runtime.engine.max_context
    planned = [(prompt, _params(body, served, prompt, context)) for prompt in prompts]
    requests = engine_requests(new_id("draw-"), planned, body.count, served, account)
    generator = metered(runtime, request, None, served, prompts, screening)
    return await generator.answer(requests)


def _read(prompt: str | list[ChatMessage], served: ServedModel) -> Prompt:
    if isinstance(prompt, str):
        return read_prompts(prompt, served.tokens, add_special_tokens=True)[0]
    return read_messages(prompt, served.tokens)


def _params(body: SampleTasks, served: ServedModel, prompt: Prompt, context: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=room_for(prompt, body.max_tokens, body.max_tokens, context, "prompts"),
        temperature=body.temperature,
        top_p=max(body.top_p, SMALLEST_TOP_P),
        seed=body.seed,
        stop_token_ids=served.eos_token_ids,
    )


def _origin(body: SampleTasks, answer: Answer) -> dict[str, Any]:
    """Return how an answer came about, which is kept with it."""
    fields = {name: getattr(body, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    return fields | {"token_ids": list(answer.token_ids), "finish_reason": answer.finish_reason}

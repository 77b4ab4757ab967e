"""Moves rounds of feedback on in the background, and asks both models of one when it is time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.concurrency import run_in_threadpool

from data.errors import ToolkitError
from data.feedback import round_steps, rounds
from data.metering import Usage
from data.render import render_prompt
from data.rows import Message
from data.tables_feedback import LabelRound
from serve.engine.base import GenerationRequest, SamplingParams
from serve.runtime import Runtime

POLL_S = 2.0
LEASE_S = 600  # after a crash, that another server waits before it samples
ANSWER_TOKENS = 256

log = logging.getLogger("hone.rounds")


async def run(runtime: Runtime) -> None:
    """Look after rounds until cancelled."""
    while True:
        try:
            await step(runtime)
        except Exception:
            log.exception("rounds of feedback could not be looked after; trying again")
        await asyncio.sleep(POLL_S)


async def step(runtime: Runtime) -> None:
    """Move every round on by one step, if what it waits for has come."""
    for found in await run_in_threadpool(rounds.under_way, runtime.database):
        if found.status == "sampling":
            await _sample(runtime, found)
            continue
        bases = await runtime.models.bases(found.project_id)
        limits = runtime.settings.limits
        await run_in_threadpool(round_steps.advance, runtime.database, found, bases, limits)


async def _sample(runtime: Runtime, found: LabelRound) -> None:
    """Have the old and the new model answer the prompts held out, the likeliest token each time."""
    if not await run_in_threadpool(round_steps.lease, runtime.database, found, LEASE_S):
        return
    try:
        old = await _answers(runtime, found, found.model)
        new = await _answers(runtime, found, str(found.candidate))
        await run_in_threadpool(round_steps.compare, runtime.database, found, old, new)
    except ToolkitError as error:
        if runtime.generator.is_stopping:
            return  # another server, or the next one, goes on
        await run_in_threadpool(round_steps.fail, runtime.database, found, error.public)
    finally:
        await run_in_threadpool(round_steps.lease, runtime.database, found, 0)


async def _answers(runtime: Runtime, found: LabelRound, name: str) -> list[str]:
    served = await runtime.models.resolve(found.project_id, name)
    tokenizer = served.tokens.tokenizer
    room = runtime.engine.max_context - ANSWER_TOKENS
    requests = []
    for number, prompt in enumerate(found.prompts):
        ids = tuple(render_prompt(tokenizer, _content(prompt)))[-max(room, 1) :]
        length = min(ANSWER_TOKENS, runtime.engine.max_context - len(ids))
        params = SamplingParams(
            max_tokens=length, temperature=0, stop_token_ids=served.eos_token_ids
        )
        name_of = f"{found.id}-{number}-{served.name}"
        requests.append(GenerationRequest(name_of, ids, params, served.adapter, found.project_id))
    answers = await runtime.generator.answer(requests)
    runtime.gate.record(
        Usage(
            project_id=found.project_id,
            model=served.name,
            request_id=found.id,
            prompt_tokens=sum(len(request.prompt_ids) for request in requests),
            completion_tokens=sum(len(answer.token_ids) for answer in answers),
            requests=len(requests),
        )
    )
    return [answer.text for answer in answers]


def _content(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(message["role"], message["content"]) for message in prompt)

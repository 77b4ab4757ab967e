"""Moves rounds of feedback on in the background, and asks both models of one when it is time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.concurrency import run_in_threadpool

from data.errors import (
    DeadlineExceeded,
    Forbidden,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    ToolkitError,
)
from data.feedback import round_steps, rounds
from data.render import render_prompt
from data.rows import Message
from data.tables_feedback import LabelRound
from serve.api.adapters import ServedModel
from serve.api.metered import Payer, metered_for
from serve.api.prompts import Prompt
from serve.engine.base import GenerationRequest, SamplingParams
from serve.runtime import Runtime

POLL_S = 2.0
LEASE_S = 600  # after a crash, that another server waits before it samples
ANSWER_TOKENS = 256
AT_ONCE = 16  # prompts of a round that wait or run at a time
LATER = (DeadlineExceeded, Forbidden, Overloaded, QuotaExceeded, RateLimited)  # as time helps
Kept = dict[str, dict[tuple[str, int], str]]  # by round; then by model and number of the prompt

log = logging.getLogger("hone.rounds")


async def run(runtime: Runtime) -> None:
    """Look after rounds until cancelled."""
    kept: Kept = {}
    while True:
        try:
            await step(runtime, kept)
        except Exception:
            log.exception("rounds of feedback could not be looked after; trying again")
        await asyncio.sleep(POLL_S)


async def step(runtime: Runtime, kept: Kept) -> None:
    """Move every round on by one step, if what it waits for has come.

    Args:
        kept: Answers of rounds whose sampling goes on later.
    """
    found = await run_in_threadpool(rounds.under_way, runtime.database)
    for gone in kept.keys() - {one.id for one in found if one.status == "sampling"}:
        del kept[gone]
    for one in found:
        if one.status == "sampling":
            await _sample(runtime, one, kept.setdefault(one.id, {}))
            continue
        bases = await runtime.models.bases(one.project_id)
        limits = runtime.settings.limits
        await run_in_threadpool(round_steps.advance, runtime.database, one, bases, limits)


async def _sample(runtime: Runtime, found: LabelRound, kept: dict[tuple[str, int], str]) -> None:
    """Have the old and the new model answer the prompts held out, the likeliest token each time."""
    if not await run_in_threadpool(round_steps.lease, runtime.database, found, LEASE_S):
        return
    try:
        old = await _answers(runtime, found, found.model, kept)
        new = await _answers(runtime, found, str(found.candidate), kept)
        await run_in_threadpool(round_steps.compare, runtime.database, found, old, new)
    except LATER:
        return  # this server, or another, goes on
    except ToolkitError as error:
        await run_in_threadpool(round_steps.fail, runtime.database, found, error.public)
    finally:
        await run_in_threadpool(round_steps.lease, runtime.database, found, 0)


async def _answers(
    runtime: Runtime, found: LabelRound, name: str, kept: dict[tuple[str, int], str]
) -> list[str]:
    """Ask each prompt, as a request of the account, unless its answer is kept already."""
    served = await runtime.models.resolve(found.project_id, name)
    payer = Payer(found.project_id, found.id)
    room, failed = asyncio.Semaphore(AT_ONCE), list[ToolkitError]()

    async def ask(number: int, prompt: Any) -> None:
        async with room:
            if failed or (served.name, number) in kept:
                return
            read, request = _request(runtime, found, served, number, prompt)
            generator = metered_for(runtime, payer, served.name, [read])
            try:
                [answer] = await generator.answer([request])
            except ToolkitError as error:
                failed.append(error)
            else:
                kept[served.name, number] = answer.text

    await asyncio.gather(*(ask(*numbered) for numbered in enumerate(found.prompts)))
    if failed:
        raise failed[0]
    return [kept[served.name, number] for number in range(len(found.prompts))]


def _request(
    runtime: Runtime, found: LabelRound, served: ServedModel, number: int, prompt: Any
) -> tuple[Prompt, GenerationRequest]:
    most = runtime.engine.max_context
    ids = render_prompt(served.tokens.tokenizer, _content(prompt))
    read = Prompt(tuple(ids)[-max(most - ANSWER_TOKENS, 1) :], "")
    params = SamplingParams(
        max_tokens=min(ANSWER_TOKENS, most - len(read.ids)),
        temperature=0,
        stop_token_ids=served.eos_token_ids,
    )
    name = f"{found.id}-{number}-{served.name}"
    return read, GenerationRequest(name, read.ids, params, served.adapter, found.project_id)


def _content(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return tuple(Message(message["role"], message["content"]) for message in prompt)

"""The model `content-filter-alpha` of 2021 on `/v1/completions`, for scripts that still ask it.

A prompt `<|endoftext|>{text}\\n--\\nLabel:` is answered with one token: 0 safe, 1 sensitive, 2
unsafe; with `logprobs`, the other two are told as well. Here 2 has the highest score of an official
category, and 1 has the score of `offensive` among what is left.
"""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.content import Verdict
from data.errors import InvalidInput
from data.moderation.classifier import CATEGORIES
from data.tables import new_id, now
from serve.api.deps import Account, json_response
from serve.api.moderations import meter
from serve.api.schemas import CompletionRequest
from serve.runtime import Runtime

MODEL = "content-filter-alpha"
PROMPT = re.compile(r"(?:<\|endoftext\|>)?(.*)\n--\nLabel:", re.DOTALL)
SENSITIVE = "offensive"
LEAST = 1e-9


async def answer(
    body: CompletionRequest, request: Request, caller: Account, runtime: Runtime
) -> Response:
    """Label each prompt's text.

    Raises:
        InvalidInput: The prompt is not of the form above, or the answer would not be one token.
    """
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    texts = [_text_of(prompt) for prompt in prompts]
    if body.stream or body.n != 1 or body.echo:
        raise InvalidInput(
            f"The model '{MODEL}' answers each prompt once: leave out 'stream', 'n' and 'echo'.",
            param="model",
        )
    counted = await run_in_threadpool(meter, runtime, request, caller.id, prompts, len(prompts))
    choices: list[dict[str, Any]] = []
    for prompt, text in zip(prompts, texts, strict=True):
        verdict = await run_in_threadpool(runtime.moderator.judge, text)
        choices.append(_choice(len(choices), body, len(prompt), verdict))
    return json_response(
        {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": MODEL,
            "choices": choices,
            "usage": {
                "prompt_tokens": counted,
                "completion_tokens": len(choices),
                "total_tokens": counted + len(choices),
            },
        }
    )


def probabilities(verdict: Verdict) -> dict[str, float]:
    """Return how likely each label is."""
    unsafe = max((verdict.scores.get(name, 0.0) for name in CATEGORIES), default=0.0)
    sensitive = (1 - unsafe) * verdict.scores.get(SENSITIVE, 0.0)
    return {"0": 1 - unsafe - sensitive, "1": sensitive, "2": unsafe}


def _choice(index: int, body: CompletionRequest, offset: int, verdict: Verdict) -> dict[str, Any]:
    found = {name: math.log(max(p, LEAST)) for name, p in probabilities(verdict).items()}
    label = max(found, key=lambda name: found[name])
    logprobs = None
    if body.logprobs is not None:
        ranked = sorted(found, key=lambda name: -found[name])[: max(1, body.logprobs)]
        logprobs = {
            "tokens": [label],
            "token_logprobs": [found[label]],
            "top_logprobs": [{name: found[name] for name in ranked}],
            "text_offset": [offset],
        }
    return {"index": index, "text": label, "logprobs": logprobs, "finish_reason": "length"}


def _text_of(prompt: Any) -> str:
    match = PROMPT.fullmatch(prompt) if isinstance(prompt, str) else None
    if match is None:
        raise InvalidInput(
            f"Invalid 'prompt' for the model '{MODEL}': expected "
            '"<|endoftext|>TEXT\\n--\\nLabel:".',
            param="prompt",
        )
    return match[1]

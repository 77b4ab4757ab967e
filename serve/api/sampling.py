"""From the fields of a request to what the engine is told."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from data.errors import InvalidInput
from serve.api.adapters import ServedModel
from serve.api.generation import Answer
from serve.api.prompts import Prompt
from serve.api.schemas import SamplingFields
from serve.engine.base import GenerationRequest, SamplingParams

SMALLEST_TOP_P = 1e-9  # what a request's 0 means: the most likely token alone


def sampling_params(
    body: SamplingFields,
    served: ServedModel,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Translate the request's fields.

    Raises:
        InvalidInput: A biased token does not exist, or `min_tokens` exceeds `max_tokens`.
    """
    size = served.tokens.vocabulary_size
    wrong = next((token_id for token_id in body.logit_bias if token_id >= size), None)
    if wrong is not None:
        raise InvalidInput(
            f"Invalid key in 'logit_bias': token id {wrong} does not exist; the model's ids are 0 "
            f"to {size - 1}.",
            param="logit_bias",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=max(body.top_p, SMALLEST_TOP_P),
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        stop=body.stop,
        stop_token_ids=frozenset() if body.ignore_eos else served.eos_token_ids,
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        seed=body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def engine_requests(
    request_id: str,
    prompts: Sequence[tuple[Prompt, SamplingParams]],
    samples: int,
    served: ServedModel,
    account: str,
) -> list[GenerationRequest]:
    """Return `samples` sequences for each prompt, in order: sequence `i * samples + j`."""
    return [
        GenerationRequest(
            id=f"{request_id}-{i * samples + j}",
            prompt_ids=prompt.ids,
            params=_for_sample(params, j),
            adapter=served.adapter,
            account=account,
            adapter_scale=served.adapter_scale,
        )
        for i, (prompt, params) in enumerate(prompts)
        for j in range(samples)
    ]


def _for_sample(params: SamplingParams, sample: int) -> SamplingParams:
    """Give each sample of one prompt a seed of its own, derived from the request's."""
    if params.seed is None or sample == 0:
        return params
    digest = hashlib.sha256(f"{params.seed}:{sample}".encode()).digest()
    return dataclasses.replace(params, seed=int.from_bytes(digest[:8], "big") >> 1)


def usage(
    prompts: Sequence[Prompt], num_generated: int, num_cached: Sequence[int]
) -> dict[str, Any]:
    """Return the `usage` object: each prompt counts once, each sampled token counts.

    Args:
        num_cached: Of each sequence, in the order of `engine_requests`, the prompt tokens that were
            not computed. A prompt's count is that of its sequence that computed most.
    """
    samples = len(num_cached) // max(1, len(prompts))
    cached = [min(num_cached[i * samples : (i + 1) * samples]) for i in range(len(prompts))]
    num_prompt = sum(len(prompt.ids) for prompt in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
    }


def num_generated(answers: Sequence[Answer]) -> int:
    """Return how many tokens were sampled in all."""
    return sum(answer.num_tokens for answer in answers)

"""Running a grader over one sample; what is wrong with the sample is told in flags."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from data.errors import EngineFailure, InvalidInput
from data.grader_text import MissingVariable, SampleNotJson, fill
from data.similarity import COSINE, MAX_CHARS, MEASURES, compare, cosine
from data.tables import new_id
from serve.api.adapters import ServedModel
from serve.api.grader_schemas import Multi, RunRequest, ScoreModel, StringCheck, TextSimilarity
from serve.api.metered import metered
from serve.api.prompts import read_messages, read_prompts, room_for
from serve.api.rewards import row_of, score_rows
from serve.api.schemas import ChatMessage
from serve.engine.base import GenerationRequest, SamplingParams
from serve.runtime import Runtime

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
ANSWER_KEYS = ("result", "score", "reward")
FLAGS = (
    *("formula_parse_error", "sample_parse_error", "truncated_observation_error"),
    *("unresponsive_reward_error", "invalid_variable_error", "other_error"),
    *("python_grader_server_error", "python_grader_runtime_error"),
    *("model_grader_server_error", "model_grader_refusal_error", "model_grader_parse_error"),
)
DETAILS = (
    *("python_grader_server_error_type", "python_grader_runtime_error_details"),
    "model_grader_server_error_details",
)


@dataclass
class _Run:
    """One sample under one grader."""

    runtime: Runtime
    request: Request
    account: str
    sample: str
    item: dict[str, Any]
    errors: dict[str, Any] = field(
        default_factory=lambda: dict.fromkeys(FLAGS, False) | dict.fromkeys(DETAILS)
    )
    tokens: dict[str, int] = field(default_factory=dict)

    async def score(self, grader: Any) -> float:
        """Return a grader's score; 0, with a flag set, where it has none."""
        try:
            if isinstance(grader, StringCheck):
                texts = self._fill(grader.input), self._fill(grader.reference)
                return float(compare(grader.operation, *texts))
            if isinstance(grader, TextSimilarity):
                return await self._similarity(grader)
            return await self._judge(grader)
        except MissingVariable:
            self.errors["invalid_variable_error"] = True
        except SampleNotJson:
            self.errors["sample_parse_error"] = True
        except EngineFailure as error:
            self.errors["model_grader_server_error"] = True
            self.errors["model_grader_server_error_details"] = error.public
        return 0.0

    def _fill(self, text: str) -> str:
        return fill(text, self.sample, self.item)

    async def _similarity(self, grader: TextSimilarity) -> float:
        texts = [self._fill(grader.input), self._fill(grader.reference)]
        if max(map(len, texts)) > MAX_CHARS:
            raise InvalidInput(
                f"The texts to compare have {len(texts[0])} and {len(texts[1])} characters; at "
                f"most {MAX_CHARS} are compared.",
                param="model_sample",
            )
        if grader.evaluation_metric == COSINE:
            return await self._cosine(texts)
        return await run_in_threadpool(MEASURES[grader.evaluation_metric], *texts)

    async def _cosine(self, texts: list[str]) -> float:
        """Compare the texts' embeddings by the base model, which are the account's usage."""
        if not all(texts):  # nothing to embed
            return float(texts[0] == texts[1])
        name = self.runtime.models.base_model
        served = await self.runtime.models.resolve(self.account, name)
        prompts = await run_in_threadpool(read_prompts, texts, served.tokens, True)
        for prompt in prompts:
            room_for(prompt, 0, 0, self.runtime.engine.max_context, "model_sample")
        generator = metered(self.runtime, self.request, None, served, prompts, kind="embeddings")
        params = SamplingParams(max_tokens=0, embed=True)
        asked = [
            GenerationRequest(new_id("grade-"), prompt.ids, params, served.adapter, self.account)
            for prompt in prompts
        ]
        left, right = await generator.answer(asked)
        used = sum(len(prompt.ids) for prompt in prompts)
        self.tokens[name] = self.tokens.get(name, 0) + used
        return cosine(left.embedding, right.embedding)

    async def _judge(self, grader: ScoreModel) -> float:
        model = await self.runtime.models.resolve_judge(self.account, grader.model)
        if isinstance(model, ServedModel):
            return await self._ask(grader, model)
        check_reward_grader(grader)
        tokenizer = self.runtime.models.base_tokens.tokenizer
        row = await run_in_threadpool(row_of, tokenizer, self.item, self.sample)
        row = row[-self.runtime.engine.max_context :]
        [score] = await score_rows(self.runtime, self.request, model, [row], self.account)
        self.tokens[grader.model] = self.tokens.get(grader.model, 0) + len(row)
        return score

    async def _ask(self, grader: ScoreModel, served: ServedModel) -> float:
        if not grader.input:
            raise InvalidInput(
                f"Missing required parameter: 'grader.input': `{grader.model}` needs messages.",
                param="grader.input",
                code="missing_required_parameter",
            )
        messages = [
            ChatMessage(role=message.role, content=self._fill(message.content))
            for message in grader.input
        ]
        prompt = await run_in_threadpool(read_messages, messages, served.tokens)
        sampling, room = grader.sampling_params, self.runtime.engine.max_context
        params = SamplingParams(
            max_tokens=room_for(prompt, None, sampling.max_completions_tokens, room, "grader"),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_token_ids=served.eos_token_ids,
        )
        request = GenerationRequest(
            new_id("grade-"), prompt.ids, params, served.adapter, self.account
        )
        generator = metered(self.runtime, self.request, None, served, [prompt])
        [answer] = await generator.answer([request])
        used = len(prompt.ids) + len(answer.token_ids)
        self.tokens[grader.model] = self.tokens.get(grader.model, 0) + used
        score = read_score(answer.text)
        if score is None or not grader.range[0] <= score <= grader.range[1]:
            self.errors["model_grader_parse_error"] = True
            return 0.0
        return score


async def run_grader(
    body: RunRequest, request: Request, runtime: Runtime, account: str
) -> dict[str, Any]:
    """Return the API's answer for one sample; what models read and wrote is the account's usage.

    Raises:
        RateLimited: A model grades, and the account has used up what it may use in this time.
        QuotaExceeded: A model grades, and the account has spent what it may.
        ModelNotFound: The account has no such model to grade with.
        InvalidInput: The texts are too long, or the model has no chat template.
    """
    started = time.monotonic()
    grader = body.grader
    run = _Run(runtime, request, account, body.model_sample, body.item)
    parts = grader.graders if isinstance(grader, Multi) else {grader.name: grader}
    scores = {name: await run.score(part) for name, part in parts.items()}
    reward = 0.0
    if not any(run.errors.values()):
        if isinstance(grader, Multi):
            try:
                reward = grader.formula().compute(scores)
            except ArithmeticError:
                run.errors["other_error"] = True
        else:
            [reward] = scores.values()
    models = list(run.tokens)
    return {
        "reward": reward,
        "sub_rewards": scores if isinstance(grader, Multi) else {},
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "errors": run.errors,
            "execution_time": round(time.monotonic() - started, 6),
            "scores": scores,
            "token_usage": sum(run.tokens.values()) if models else None,
            "sampled_model_name": models[0] if len(models) == 1 else None,
        },
        "model_grader_token_usage_per_model": run.tokens,
    }


def check_reward_grader(grader: ScoreModel) -> None:
    """Refuse what only models that are asked in words take; raises InvalidInput."""
    given = grader.model_fields_set & {"input", "range", "sampling_params"}
    if given:
        name = min(given)
        raise InvalidInput(
            f"Unsupported parameter: 'grader.{name}': `{grader.model}` is a reward model, which "
            "scores the sample as the answer to the item's `prompt` or `messages`. Leave it out.",
            param=f"grader.{name}",
            code="unsupported_parameter",
        )


def read_score(text: str) -> float | None:
    """Return the number that a model answered: alone, in a JSON object, or first in its text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = next((value[key] for key in ANSWER_KEYS if key in value), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = NUMBER.search(text)
        value = float(found[0]) if found else math.nan
    return float(value) if math.isfinite(value) else None

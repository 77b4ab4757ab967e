"""Scores by an account's reward models: of candidates, to give the best, and of single answers.

A row, prompt and answer, is read once under the reward model's adapter, beside whatever else the
engine does; the head on its last hidden state is the raw score. Candidates are scored as they were
sampled, the token that ended them included. One that a stop string ended is scored as its text and
EOS: what the stop string cut off is no part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request

from data.errors import EngineFailure, InvalidInput
from data.render import continuation, render_answer
from data.reward_head import RewardHead
from data.rows import Content, Message
from data.tables import new_id
from serve.api.adapters import RewardModel, ServedModel
from serve.api.generation import Answer
from serve.api.logprobs import mean_logprob
from serve.api.metered import metered
from serve.api.prompts import Prompt
from serve.api.schemas import SamplingFields
from serve.engine.base import GenerationRequest, SamplingParams
from serve.runtime import Runtime

LAST = SamplingParams(max_tokens=0, embed=True, pool="last")
Row = Sequence[int]


async def score_rows(
    runtime: Runtime,
    request: Request,
    model: RewardModel,
    rows: Sequence[Row],
    account: str,
    *,
    is_part: bool = False,
) -> list[float]:
    """Return the normalised score of each row; of one beyond the context, of its end.

    Args:
        request: Pays for what is read.
        is_part: The request was admitted before: its rates do not refuse this.

    Raises:
        EngineFailure: A row could not be read.
        RateLimited: The account has used up what it may use in this time.
        QuotaExceeded: It has spent what it may.
    """
    room = runtime.engine.max_context
    prompts = [Prompt(tuple(row[-room:]), "") for row in rows]
    generator = metered(runtime, request, None, model, prompts, kind="scoring", is_part=is_part)
    asked = [
        GenerationRequest(new_id("score-"), prompt.ids, LAST, model.adapter, account)
        for prompt in prompts
    ]
    answers = await generator.answer(asked)
    return [_score(model.head, answer) for answer in answers]


@dataclass(frozen=True, slots=True)
class Ranking:
    """How the candidates of one API request are compared by a reward model.

    Attributes:
        model: Scores them.
        served: Wrote them.
    """

    model: RewardModel
    served: ServedModel
    runtime: Runtime
    request: Request
    account: str

    async def score(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
        """Return a score for each answer; as many belong to each prompt, in order."""
        samples = len(answers) // len(prompts)
        rows = [
            (*prompts[index // samples].ids, *self._tokens(answer))
            for index, answer in enumerate(answers)
        ]
        return await score_rows(
            self.runtime, self.request, self.model, rows, self.account, is_part=True
        )

    def _tokens(self, answer: Answer) -> Row:
        ids, ends = answer.token_ids, self.served.eos_token_ids
        if answer.finish_reason == "length" or (ids and ids[-1] in ends):
            return ids
        tokenizer = self.served.tokens.tokenizer
        return [*continuation(tokenizer, answer.text), tokenizer.eos_token_id]


def best(
    body: SamplingFields,
    answers: Sequence[Answer],
    scores: Sequence[float] | None,
    candidates: Sequence[int],
) -> list[int]:
    """Return which `n` of a prompt's candidates are told: the best first, if there are more.

    Args:
        scores: By the reward model; None compares by the mean log-probability of a token.
    """
    if len(candidates) == body.n:
        return list(candidates)

    def worth(index: int) -> float:
        return mean_logprob(answers[index].logprobs) if scores is None else scores[index]

    return sorted(candidates, key=worth, reverse=True)[: body.n]


def reward_of(scores: Sequence[float] | None, index: int) -> dict[str, float]:
    """Return what a choice tells of its score."""
    return {} if scores is None else {"reward": scores[index]}


async def ranking_of(
    runtime: Runtime, request: Request, account: str, name: str | None, served: ServedModel
) -> Ranking | None:
    """Return how the candidates of a request are ranked; None is by their log-probability.

    Raises:
        InvalidInput: The model is no reward model.
        ModelNotFound: The account has none of that name.
    """
    if name is None:
        return None
    model = await runtime.models.resolve_reward(account, name)
    return Ranking(model, served, runtime, request, account)


def row_of(tokenizer: Any, item: dict[str, Any], answer: str) -> Row:
    """Return the tokens of a row of a dataset with an answer to it, as reward models are trained.

    Args:
        item: Has `prompt`, a text or messages, or `messages` up to the answer.

    Raises:
        InvalidInput: It has neither, or they are not of that form.
    """
    prompt = item.get("prompt", item.get("messages"))
    if isinstance(prompt, str):
        return render_answer(tokenizer, prompt, answer).input_ids
    try:
        messages: Content = msgspec.convert(prompt, tuple[Message, ...])
    except msgspec.ValidationError as error:
        raise InvalidInput(
            "Invalid 'item': a reward model reads a `prompt`, a text or messages, or `messages`, "
            f"and the sample as the answer: {error}.",
            param="item",
        ) from None
    reply = (Message("assistant", answer),)
    return render_answer(tokenizer, messages, reply).input_ids


def _score(head: RewardHead, answer: Answer) -> float:
    if len(answer.embedding) != len(head.weight):
        raise EngineFailure(
            f"The reward model's head reads {len(head.weight)} numbers, but the base gives "
            f"{len(answer.embedding)}; train it again."
        )
    return head.score(answer.embedding)

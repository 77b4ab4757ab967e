"""The API's graders as a source of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data.errors import TrainingFailed
from data.formula import Formula
from data.grader_text import MissingVariable, SampleNotJson, fill
from data.similarity import COSINE, MEASURES, compare, cosine
from rlhf.actor_critic import ActorCritic
from rlhf.grader_rules import check_grader
from rlhf.reward_model import Normalizer
from rlhf.rollout import Sample
from train.base_model import Base


class GraderReward:
    """A grader of the API; `score_model` is the reward model of the run.

    A response that a grader cannot read (no JSON where JSON is asked for) scores 0; a place in a
    grader that no prompt of the file fills is an error.

    Raises:
        ConfigError: The grader is not one that can run here.
    """

    def __init__(
        self,
        grader: Mapping[str, Any],
        roles: ActorCritic,
        normalizer: Normalizer | None,
        base: Base,
    ) -> None:
        self._grader = grader
        self._roles, self._normalizer, self._base = roles, normalizer, base
        check_grader(grader, has_model=normalizer is not None)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        if self._grader["type"] != "multi":
            return self._score_one(self._grader, samples)
        parts = {
            name: self._score_one(part, samples) for name, part in self._grader["graders"].items()
        }
        formula = Formula(self._grader["calculate_output"], list(parts))
        rewards = []
        for index in range(len(samples)):
            try:
                rewards.append(formula.compute({name: part[index] for name, part in parts.items()}))
            except ArithmeticError:
                rewards.append(math.nan)
        return rewards

    def close(self) -> None:
        """Nothing to give back."""

    def _score_one(self, grader: Mapping[str, Any], samples: Sequence[Sample]) -> list[float]:
        if grader["type"] == "score_model" and self._normalizer is not None:
            from rlhf.rewards import ModelReward

            return ModelReward(self._roles, self._normalizer).score(samples)
        if grader.get("evaluation_metric") == COSINE:
            return self._cosines(grader, samples)
        return [_score_text(grader, sample) for sample in samples]

    @torch.no_grad()
    def _cosines(self, grader: Mapping[str, Any], samples: Sequence[Sample]) -> list[float]:
        """Compare texts by the base's embeddings, as the server does."""
        from rlhf.rewards import BATCH_TOKENS, by_length

        pairs = [_texts(grader, sample) for sample in samples]
        places: dict[str, int] = {}
        rows: list[list[int]] = []
        for sample, pair in zip(samples, pairs, strict=True):
            for text in pair or ():
                if text and text not in places:
                    places[text] = len(rows)
                    rows.append(self._tokens(grader, sample, text))
        found: list[list[float]] = [[] for _ in rows]
        for part in by_length([len(row) for row in rows], BATCH_TOKENS) if rows else ():
            vectors = self._roles.embeddings([rows[index] for index in part]).tolist()
            for index, vector in zip(part, vectors, strict=True):
                found[index] = vector
        scores = []
        for pair in pairs:
            if pair is None:  # the response is not what the grader can read
                scores.append(0.0)
            elif not all(pair):  # nothing to embed
                scores.append(float(pair[0] == pair[1]))
            else:
                scores.append(cosine(*(found[places[text]] for text in pair)))
        return scores

    def _tokens(self, grader: Mapping[str, Any], sample: Sample, text: str) -> list[int]:
        ids: list[int] = self._base.tokenizer.encode(text)
        if len(ids) > self._base.context_length:
            raise TrainingFailed(
                f"The grader {grader.get('name')} compares a text of {len(ids)} tokens for line "
                f"{sample.prompt.line} of the prompts' file; {self._base.name} embeds at most "
                f"{self._base.context_length}. Shorten the text, or take another metric",
                code="reward_failed",
            )
        return ids


def _texts(grader: Mapping[str, Any], sample: Sample) -> tuple[str, str] | None:
    """Return a grader's input and reference; None if the response is not the JSON it reads."""
    try:
        left, right = (
            fill(grader[name], sample.text, sample.prompt.item) for name in ("input", "reference")
        )
    except SampleNotJson:
        return None
    except MissingVariable as error:
        raise TrainingFailed(
            f"The grader {grader.get('name')} reads {error}, which line {sample.prompt.line} of "
            "the prompts' file does not have",
            code="reward_failed",
        ) from error
    return left, right


def _score_text(grader: Mapping[str, Any], sample: Sample) -> float:
    texts = _texts(grader, sample)
    if texts is None:
        return 0.0
    if grader["type"] == "string_check":
        return float(compare(grader["operation"], *texts))
    return float(MEASURES[grader["evaluation_metric"]](*texts))

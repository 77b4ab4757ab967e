"""Where the rewards of a run that samples come from, and what is done to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import httpx
from pydantic import Field, field_validator, model_validator

from data.errors import ConfigError
from data.job_methods import score_models
from data.settings import StrictModel
from rlhf.grader_rules import check_grader
from train.config import Auto

AUTO_CLIP = 5.0  # standard deviations of a reward model, whose scores are normalised
URL = "http://127.0.0.1:8001/rewards"  # an example
SHAPING = {"clip", "missing_eos_penalty", "whiten"}  # what is done to scores to learn from them


class PpoRewardSettings(StrictModel):
    """Where rewards come from: one of `model`, `function`, `url`, `grader`; a grader that scores
    with the model needs both."""

    model: Path | None = Field(None, description="Folder of a reward model of the same base.")
    function: str | None = Field(None, description="module:function, takes and returns lists.")
    url: str | None = Field(None, description="Answers a POST of samples with their rewards.")
    grader: dict[str, object] | None = Field(
        None, description="string_check, text_similarity, score_model or multi, as in the API."
    )
    timeout_s: float = Field(60.0, gt=0, description="For a function's or a URL's batch.")
    retries: int = Field(2, ge=0, description="Of a URL that fails or does not answer.")
    clip: float | Auto | None = Field(
        "auto",
        description="Scores beyond this are cut; null: none; auto: 5 of a model's own scores, else "
        "null.",
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Taken from the score of a response that does not end."
    )
    whiten: bool = Field(
        False, description="Scale token rewards to variance 1; of PPO, which has such rewards."
    )

    @field_validator("url")
    @classmethod
    def _can_be_called(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL as error:
            raise ValueError(f"it is no URL ({error}); give one such as {URL}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"only http and https with a host can be called; give one as {URL}")
        return value

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        names = ("model", "function", "url", "grader")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1 and given != ["model", "grader"]:
            raise ValueError(
                "reward needs exactly one of model, function, url and grader (both model and "
                f"grader where that scores with it); got {', '.join(given) or 'none'}"
            )
        waits = {"timeout_s": ("function", "url"), "retries": ("url",)}
        for name, sources in waits.items():
            if name in self.model_fields_set and not set(sources) & set(given):
                raise ValueError(
                    f"{name} is of {' and '.join(sources)} alone, and the source is "
                    f"{' and '.join(given)}; leave it out"
                )
        if self.grader is not None:
            try:
                check_grader(self.grader, self.model is not None, "grader")
            except ConfigError as error:
                raise ValueError("; ".join(error.problems)) from None
            if self.model is not None and not any(score_models(self.grader)):
                raise ValueError(
                    "model is given, but no part of grader is a score_model, which would use it; "
                    "leave one of the two out"
                )
        if not isinstance(self.clip, str | None) and self.clip <= 0:
            raise ValueError(f"clip is {self.clip:g}; give a number above 0, null or auto")
        return self

    @property
    def source_name(self) -> str:
        """The source of rewards as messages call it, such as "the function rules:count"."""
        if self.grader is not None:
            name = self.grader.get("name")
            return f"the {self.grader['type']} grader" + (f" {name}" if name else "")
        for kind in ("function", "url"):
            if getattr(self, kind) is not None:
                return f"the {kind} {getattr(self, kind)}"
        return f"the reward model {self.model}"

    @property
    def by_rule(self) -> bool:
        """Whether rewards are of a rule, which may use a model's scores, not such scores."""
        return self.grader is not None and self.grader["type"] != "score_model"

    @property
    def limit(self) -> float:
        """Beyond which scores are cut: `clip` as a number, infinite where nothing is."""
        if self.clip == "auto":
            return math.inf if self.model is None or self.by_rule else AUTO_CLIP
        return math.inf if self.clip is None else self.clip

"""What a request for a fine-tuning job may say."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from data.errors import InvalidInput
from serve.api.schemas import RequestModel

MAX_METADATA = 16
MAX_INTEGRATIONS = 5
MAX_SEED = 2**31 - 1


def _auto_or(kind: type[int] | type[float], low: float, high: float = math.inf) -> BeforeValidator:
    """Accept "auto" or a number above 0 and within the range."""
    expected = f"'auto' or {'an integer' if kind is int else 'a number'}"
    limits = f"from {low} to {high}" if high < math.inf else "greater than 0"

    def check(value: Any) -> Any:
        number = isinstance(value, int | (float if kind is float else int))
        if value == "auto" or (
            number and not isinstance(value, bool) and _inside(value, low, high)
        ):
            return value
        raise InvalidInput(f"Invalid hyperparameter: expected {expected} {limits}, got {value!r}.")

    return BeforeValidator(check, json_schema_input_type=Literal["auto"] | kind)


def _inside(value: float, low: float, high: float) -> bool:
    return (low <= value <= high) if low else (0 < value < math.inf)


def _check_metadata(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) > MAX_METADATA:
            raise InvalidInput(f"Invalid 'metadata': at most {MAX_METADATA} pairs are allowed.")
        for key, text in value.items():
            if isinstance(text, str) and (len(key) > 64 or len(text) > 512):
                raise InvalidInput(
                    "Invalid 'metadata': keys have at most 64 characters and values at most 512."
                )
    return value


class Hyperparameters(RequestModel):
    """The three numbers that OpenAI lets be set; "auto" leaves the choice to the trainer."""

    n_epochs: Annotated[int | str, _auto_or(int, 1, 50)] = "auto"
    batch_size: Annotated[int | str, _auto_or(int, 1, 256)] = "auto"
    learning_rate_multiplier: Annotated[float | str, _auto_or(float, 0)] = "auto"


class Supervised(RequestModel):
    """Settings of supervised fine-tuning."""

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(RequestModel):
    """How to train."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"dpo", "reinforcement"})

    type: Literal["supervised"]
    supervised: Supervised | None = None


class WandbSettings(RequestModel):
    """Where a run is logged."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] = Field(default_factory=list)


class Integration(RequestModel):
    """A service that follows the run."""

    type: Literal["wandb"]
    wandb: WandbSettings


class JobRequest(RequestModel):
    """`POST /v1/fine_tuning/jobs`."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_check_metadata)] = None
    integrations: list[Integration] = Field(default_factory=list, max_length=MAX_INTEGRATIONS)

    @model_validator(mode="after")
    def _check_combinations(self) -> JobRequest:
        if self.method and self.method.supervised and self.hyperparameters:
            raise InvalidInput(
                "Give 'hyperparameters' in 'method.supervised' or at the top level, not in both.",
                param="hyperparameters",
            )
        return self

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, from wherever they were given."""
        if self.method and self.method.supervised:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

"""What a request for a fine-tuning job may say.

Names and types are checked here; values and their ranges by `data.job_spec`, which the command line
uses too.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from data.job_spec import JobSpec
from serve.api.grader_schemas import Grader
from serve.api.schemas import RequestModel

MAX_INTEGRATIONS = 5
OPTIONS = (
    "classification",
    "early_stopping",
    "from_checkpoint",
    "keep_checkpoints",
    "lora",
    "max_completion_tokens",
    "max_seq_length",
    "n_checkpoints",
    "n_evals",
    "on_long",
    "prompt_loss_weight",
    "reward_model",
)


class Plain(RequestModel):
    """Settings of a method that learns from the rows of its file."""

    hyperparameters: dict[str, Any] | None = None


class Graded(RequestModel):
    """Settings of a method that learns from what a grader says of the model's answers."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"response_format"})

    grader: Grader
    hyperparameters: dict[str, Any] | None = None


class Method(RequestModel):
    """How to train."""

    type: Literal["supervised", "dpo", "reinforcement", "reward_model", "ppo", "kto"]
    supervised: Plain | None = None
    dpo: Plain | None = None
    kto: Plain | None = None
    reward_model: Plain | None = None
    reinforcement: Graded | None = None
    ppo: Graded | None = None


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
    """`POST /v1/fine_tuning/jobs`, hone's extensions last."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Integration] = Field(default_factory=list, max_length=MAX_INTEGRATIONS)

    classification: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    early_stopping: dict[str, Any] | None = None
    from_checkpoint: str | None = None
    keep_checkpoints: int | None = None
    max_completion_tokens: int | None = None
    max_seq_length: int | None = None
    n_checkpoints: int | None = None
    n_evals: int | None = None
    on_long: str | None = None
    prompt_loss_weight: float | None = None
    reward_model: str | None = None  # compares what DPO and KTO make of the held-out prompts

    dry_run: bool = False

    def spec(self) -> JobSpec:
        """Return the checked job; raises InvalidInput that names the field."""
        given = self.model_dump(exclude_none=True, exclude={"dry_run"})
        section = given.get("method", {}).get(given.get("method", {}).get("type"), {})
        if "grader" in section and self.method is not None:
            grader: RequestModel = getattr(self.method, self.method.type).grader
            section["grader"] = grader.model_dump(exclude_none=True, exclude_unset=True)
        options = {name: _given(given.pop(name)) for name in OPTIONS if name in given}
        integrations = tuple(given.pop("integrations"))
        return JobSpec(**given, integrations=integrations, options=options)


def _given(option: Any) -> Any:
    """Return an option without what is null in it, which means absent."""
    if not isinstance(option, dict):
        return option
    return {name: value for name, value in option.items() if value is not None}

"""The configuration of a reward model's run, and what the configurations of `rlhf` share.

Unknown keys are refused by the nearest name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data.errors import ConfigError
from train.config import Auto, LoraSettings, RunConfig

NO_DROPOUT = "lora.dropout must be 0: scores and log-probabilities are compared exactly"
LONGEST = 1024  # tokens of prompt and answer, unless max_length says otherwise


def resolve_length(max_length: int | Auto, base: str, context_length: int) -> int:
    """Return the tokens that prompt and answer may have together.

    Raises:
        ConfigError: `max_length` exceeds what the base reads, or is too small for an answer.
    """
    if max_length == "auto":
        return min(LONGEST, context_length)
    if not 8 <= max_length <= context_length:
        raise ConfigError(
            [
                f"max_length is {max_length}, but {base} reads at most {context_length} tokens; "
                "give 8 to that many, or auto"
            ]
        )
    return max_length


def check_shape(config: Any) -> None:
    """Raise ValueError where an adapter's shape is given beside the adapter, or dropout is."""
    given = config.lora.model_fields_set - {"dropout"}
    if config.start_adapter is not None and given:
        raise ValueError(
            f"start_adapter keeps its adapter's shape; leave out lora.{', lora.'.join(given)}"
        )
    if config.lora.dropout:
        raise ValueError(NO_DROPOUT)


def check_held_out(config: Any) -> None:
    """Raise ValueError where both ways to hold rows out are given."""
    given = "validation_fraction" in config.model_fields_set and config.validation_fraction
    if config.validation_file is not None and given:
        raise ValueError("validation_file and validation_fraction exclude each other; give one")


class RewardConfig(RunConfig):
    """A reward model: an adapter and a score head, trained on comparisons."""

    train_file: Path = Field(description="JSONL of preferences or rankings.")
    validation_file: Path | None = Field(None, description="JSONL of the same kind.")
    validation_fraction: float = Field(
        0.1, ge=0, le=0.5, description="Prompts held out of train_file, if there is no such file."
    )
    min_examples: int = Field(10, ge=1, description="Fewer comparisons than this are refused.")
    max_length: int | Auto = Field(
        "auto", description="Tokens of prompt and answer; auto: 1024, or what the base reads."
    )
    on_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What becomes of longer rows; truncate cuts the prompt's start."
    )
    start_adapter: Path | None = Field(
        None, description="PEFT folder to begin with, such as SFT's."
    )
    num_epochs: int = Field(1, ge=1, le=50, description="Passes; more than one tends to overfit.")
    batch_size: int = Field(
        32, ge=1, le=4096, description="Comparisons a step, about: whole prompts, in eights."
    )
    micro_batch_tokens: int | Auto = Field("auto", description="Most tokens at once on a device.")
    learning_rate: float = Field(1e-4, gt=0, description="At its highest.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Of the steps, with rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Probability that a comparison is the wrong way round."
    )
    center_coefficient: float = Field(
        0.0, ge=0, description="Times the mean squared sum of a pair's scores (arXiv:2312.09244)."
    )
    normalize_samples: int = Field(
        256, ge=2, description="Answers of the start policy that get mean 0 and std 1."
    )
    normalize_on: Literal["samples", "validation"] = Field(
        "samples",
        description="samples: answers sampled now; validation: those of the held-out rows.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Of a sampled answer.")
    gradient_checkpointing: bool = Field(False, description="Slower, smaller.")
    n_evals: int = Field(4, ge=1, description="Evaluations in the run.")
    keep_checkpoints: int = Field(2, ge=1, description="The newest.")
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.bias_report:
            raise ValueError("bias_report is true, but a reward model writes no text: leave it out")
        check_shape(self)
        check_held_out(self)
        return self

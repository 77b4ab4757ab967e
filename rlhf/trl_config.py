"""The configurations of runs by TRL's trainers: DPO, KTO, RLOO, GRPO.

Unknown keys are refused by the nearest name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config import check_held_out
from rlhf.policy_config import PolicyConfig, SampledConfig
from train.config import Auto


class TrlConfig(PolicyConfig):
    """What the runs by TRL's trainers share."""

    batch_size: int = Field(16, ge=1, le=4096, description="Rows a step, all processes.")
    micro_batch_size: int | Auto = Field("auto", description="Rows at once on a device.")
    learning_rate: float = Field(5e-5, gt=0, description="At its highest.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="How the rate falls: linear, cosine or constant."
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Of the steps, with rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")


class OfflineConfig(TrlConfig):
    """What DPO and KTO share: judged answers."""

    train_file: Path = Field(description="JSONL of preferences, rankings or judged answers.")
    validation_file: Path | None = Field(None, description="JSONL of the same kind.")
    validation_fraction: float = Field(
        0.1, ge=0, le=0.5, description="Prompts held out of train_file, if there is no such file."
    )
    min_examples: int = Field(10, ge=1, description="Fewer rows than this are refused.")
    max_length: int | Auto = Field(
        "auto", description="Tokens of prompt and answer; auto: 1024, or what the base reads."
    )
    on_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What becomes of longer rows; truncate cuts the prompt's start."
    )
    num_epochs: int = Field(1, ge=1, le=50, description="Passes over the rows.")
    n_evals: int = Field(4, ge=1, description="Evaluations, and checkpoints, in the run.")
    beta: float = Field(0.1, gt=0, le=2, description="How dear it is to leave the reference.")
    eval_prompts: int = Field(
        32, ge=0, description="Held-out prompts that start and end answer; their answers compared."
    )
    max_new_tokens: int = Field(64, ge=1, description="Of such an answer.")
    reward_model: Path | None = Field(
        None, description="Folder of a reward model of the same base that compares those answers."
    )

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        check_held_out(self)
        if self.reward_model is None:
            return self
        if self.validation_file is None and not self.validation_fraction:
            raise ValueError(
                "reward_model compares answers to held-out prompts, but validation_fraction is 0; "
                "raise it, give a validation_file, or leave reward_model out"
            )
        if not self.eval_prompts:
            raise ValueError("reward_model compares answers, but eval_prompts is 0; raise it")
        return self


class DpoConfig(OfflineConfig):
    """Direct preference optimisation (arXiv:2305.18290), by TRL's DPOTrainer."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = Field(
        "sigmoid", description="TRL's name of the loss."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of wrong labels; of loss_type robust alone."
    )

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"label_smoothing acts in loss_type robust only, not in {self.loss_type}"
            )
        return self


class KtoConfig(OfflineConfig):
    """Kahneman-Tversky optimisation (arXiv:2402.01306) of good and bad answers, by TRL."""

    desirable_weight: float = Field(1.0, gt=0, description="Of good answers.")
    undesirable_weight: float = Field(1.0, gt=0, description="Of bad answers.")
    good_rating: int = Field(4, ge=2, le=5, description="Ratings from this on are good.")


class GroupConfig(TrlConfig, SampledConfig):
    """What RLOO and GRPO share: several responses to a prompt, and no value model."""

    temperature: float = Field(1.0, gt=0, description="Of rollouts.")
    num_generations: int = Field(4, ge=2, description="Responses to one prompt.")
    total_episodes: int = Field(4_000, ge=1, description="Responses in the run.")
    num_iterations: int = Field(1, ge=1, description="Passes over a batch.")
    beta: float = Field(0.05, ge=0, description="Of the KL.")
    clip_range: float = Field(0.2, gt=0, description="Of the policy's ratio.")

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.batch_size % self.num_generations:
            raise ValueError(
                f"num_generations {self.num_generations} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.reward.whiten:
            raise ValueError(
                "reward.whiten scales PPO's rewards of tokens; RLOO and GRPO have one reward a "
                "response, compared within its group: leave it out"
            )
        return self

    @property
    def stop_at_eos(self) -> bool:
        """Responses end at EOS."""
        return True


class RlooConfig(GroupConfig):
    """REINFORCE leave-one-out (arXiv:2402.14740), by TRL's RLOOTrainer."""


class GrpoConfig(GroupConfig):
    """Group relative policy optimisation (arXiv:2402.03300), by TRL's GRPOTrainer."""

    beta: float = Field(0.0, ge=0, description="Of the KL.")
    scale_rewards: bool = Field(True, description="Divide by the standard deviation of a group.")

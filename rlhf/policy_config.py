"""What the configurations of runs that train a policy share."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.settings import StrictModel
from rlhf.config import check_shape
from rlhf.reward_settings import PpoRewardSettings
from train.config import LoraSettings, RunConfig


class PolicyConfig(RunConfig):
    """A policy that begins as an adapter, or as the base."""

    start_adapter: Path | None = Field(
        None, description="The SFT adapter: policy and reference start as it. Default: the base."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this.")
    gradient_checkpointing: bool = Field(False, description="Slower, smaller.")
    keep_checkpoints: int = Field(2, ge=1, description="The newest.")
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        check_shape(self)
        return self


class SampledConfig(StrictModel):
    """A policy that learns from the rewards of its own responses: PPO, RLOO, GRPO."""

    prompts_file: Path = Field(description="JSONL of prompts; answers in it are not used.")
    eval_prompts_file: Path | None = Field(None, description="Default: eval_prompts of the others.")
    eval_prompts: int = Field(32, ge=0, description="Fixed prompts answered at each evaluation.")
    eval_every: int = Field(10, ge=1, description="Updates between evaluations.")
    save_every: int = Field(10, ge=1, description="Updates between checkpoints.")
    max_prompt_length: int = Field(512, ge=1, description="Longer prompts are dropped and counted.")
    max_new_tokens: int = Field(64, ge=1, description="Of a response.")
    reward: PpoRewardSettings

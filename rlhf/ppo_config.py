"""The configuration of a PPO run; unknown keys are refused by the nearest name."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from data.settings import StrictModel
from rlhf.policy_config import PolicyConfig, SampledConfig
from rlhf.reward_settings import SHAPING, PpoRewardSettings
from train.config import Auto

WARMUP_UPDATES = 10  # of a value that starts from zeros


class KlSettings(StrictModel):
    """How the policy is kept near the reference."""

    coef: float = Field(0.05, ge=0, description="Of the KL in the reward.")
    target: float | None = Field(None, gt=0, description="KL a response that coef is steered to.")
    horizon: int = Field(
        10_000, ge=1, description="Episodes in which coef moves by a fifth at most; with target."
    )
    budget: float | None = Field(
        None, gt=0, description="The adapter is the best by reward whose KL is within this."
    )
    stop: float = Field(100.0, gt=0, description="A mean KL beyond this ends the run.")

    @model_validator(mode="after")
    def _check_steering(self) -> Self:
        if self.target is not None and self.coef == 0:
            raise ValueError(
                "target is given, but coef is 0: it is steered by multiplying it, so it stays 0; "
                "give a coef above 0, such as 0.05, or leave target out"
            )
        if self.target is None and "horizon" in self.model_fields_set:
            raise ValueError("horizon is how fast coef is steered to target: give target too")
        return self


class ValueSettings(StrictModel):
    """The value model."""

    trunk: Literal["separate", "shared"] = Field(
        "separate", description="An adapter of its own, or a head on the policy."
    )
    start: Literal["auto", "reward", "zero"] = Field(
        "auto",
        description="A copy of the reward model, or a head of zeros; auto: the first where its "
        "scores are the reward.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="At its highest.")
    coef: float = Field(0.1, gt=0, description="Of the value's loss beside the policy's.")
    clip_range: float = Field(0.2, gt=0, description="A value moves at most this far an update.")
    warmup_updates: int | Auto = Field(
        "auto",
        description="First updates of the value alone; auto: 0 from a reward model, else 10, but "
        "a fifth of a short run.",
    )


class PpoConfig(PolicyConfig, SampledConfig):
    """PPO on one base: policy, reference, value and reward are adapters of it."""

    stop_at_eos: bool = Field(True, description="Off: every response has max_new_tokens.")
    temperature: float = Field(0.7, gt=0, description="Of rollouts, and of all log-probabilities.")
    samples_per_prompt: int = Field(1, ge=1, description="Responses to one prompt in a batch.")

    total_episodes: int = Field(10_000, ge=1, description="Responses in the run.")
    batch_size: int = Field(64, ge=1, description="Responses an update, all processes.")
    num_epochs: int = Field(4, ge=1, description="Passes over an update's responses.")
    num_minibatches: int = Field(1, ge=1, description="Optimizer steps a pass.")
    micro_batch_tokens: int | Auto = Field("auto", description="Most tokens at once on a device.")
    learning_rate: float = Field(3e-5, gt=0, description="Of the policy, at its highest.")
    lr_scheduler: Literal["linear", "constant"] = Field("linear", description="linear falls to 0.")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")

    gold: PpoRewardSettings | None = Field(
        None, description="What is wanted in truth: watched beside the reward, never learned from."
    )
    kl: KlSettings = KlSettings()
    value: ValueSettings = ValueSettings()
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a token.")
    lam: float = Field(0.95, ge=0, le=1, description="Of the generalised advantages.")
    clip_range: float = Field(0.2, gt=0, description="Of the policy's ratio.")
    dual_clip: float | None = Field(None, gt=1, description="Bound of a bad token's loss.")
    whiten_advantages: bool = Field(True, description="Mean 0, variance 1 over the batch.")
    entropy_coef: float = Field(0.0, ge=0, description="Of an entropy bonus.")
    target_kl: float | None = Field(
        None, gt=0, description="An update's passes end when old and new policy differ by 1.5 x."
    )

    keep_checkpoints: int = Field(2, ge=1, description="The newest, and the best.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = []
        if self.batch_size % self.num_minibatches:
            problems.append(
                f"num_minibatches {self.num_minibatches} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.batch_size % self.samples_per_prompt:
            problems.append(
                f"samples_per_prompt {self.samples_per_prompt} does not divide batch_size "
                f"{self.batch_size}"
            )
        if self.total_episodes < self.batch_size:
            problems.append(
                f"total_episodes {self.total_episodes} is less than batch_size {self.batch_size}"
            )
        if self.kl.target is not None and self.batch_size >= 5 * self.kl.horizon:
            problems.append(
                f"kl.horizon {self.kl.horizon} is at most a fifth of batch_size "
                f"{self.batch_size}, so that one update could steer kl.coef to 0 or below; give "
                f"batch_size or more"
            )
        if self.gold is not None and self.gold.model is not None:
            problems.append("gold takes function, url or grader; the reward model is the proxy")
        ignored = self.gold.model_fields_set & SHAPING if self.gold is not None else set()
        problems += [
            f"gold.{name} does nothing: gold is watched as it is, and never shaped; leave it out"
            for name in sorted(ignored)
        ]
        if self.value.start == "reward" and self.value.trunk == "shared":
            problems.append(
                "value.start is reward, but value.trunk is shared: a head on the policy cannot be "
                "a copy of the reward model; set value.trunk to separate, or leave start out"
            )
        if self.num_updates and self.value_warmup >= self.num_updates:
            problems.append(
                f"value.warmup_updates {self.value_warmup} leaves no update to the policy: "
                f"total_episodes {self.total_episodes} are {self.num_updates} updates; lower it, "
                "or give more episodes"
            )
        if self.value.start == "reward" and self.reward.model is None:
            problems.append("value.start is reward, but reward.model names no reward model")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def num_updates(self) -> int:
        """Whole batches in the run."""
        return self.total_episodes // self.batch_size

    @property
    def value_warmup(self) -> int:
        """Updates that train the value alone."""
        if self.value.warmup_updates != "auto":
            return self.value.warmup_updates
        return 0 if self.value_starts_as_reward else min(WARMUP_UPDATES, self.num_updates // 5)

    @property
    def value_starts_as_reward(self) -> bool:
        """Whether the value begins as a copy of the reward model."""
        if self.value.trunk != "separate" or self.reward.model is None:
            return False
        return self.value.start == "reward" or (
            self.value.start == "auto" and not self.reward.by_rule
        )

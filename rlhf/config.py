"""The configurations of reward-model and PPO runs; unknown keys are refused by the nearest name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

import httpx
from pydantic import Field, field_validator, model_validator

from data.errors import ConfigError
from data.job_methods import score_models
from data.settings import StrictModel
from rlhf.grader_rules import check_grader
from train.config import Auto, LoraSettings, RunConfig

NO_DROPOUT = "lora.dropout must be 0: scores and log-probabilities are compared exactly"
LONGEST = 1024  # tokens of prompt and answer, unless max_length says otherwise
AUTO_CLIP = 5.0  # standard deviations of a reward model, whose scores are normalised
URL = "http://127.0.0.1:8001/rewards"  # an example
SHAPING = {"clip", "missing_eos_penalty", "whiten"}  # what is done to scores to learn from them


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
        if self.lora.dropout:
            raise ValueError(NO_DROPOUT)
        _check_held_out(self)
        return self


def _check_held_out(config: RewardConfig | OfflineConfig) -> None:
    given = "validation_fraction" in config.model_fields_set and config.validation_fraction
    if config.validation_file is not None and given:
        raise ValueError("validation_file and validation_fraction exclude each other; give one")


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
        description="Scores beyond this are cut; null: none; auto: 5 with a model, else null.",
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
                f"reward needs exactly one of model, function, url and grader; got "
                f"{', '.join(given) or 'none'}"
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
    def limit(self) -> float:
        """Beyond which scores are cut: `clip` as a number, infinite where nothing is."""
        if self.clip == "auto":
            return math.inf if self.model is None else AUTO_CLIP
        return math.inf if self.clip is None else self.clip


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
        description="A copy of the reward model, or a head of zeros; auto: the first if any.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="At its highest.")
    coef: float = Field(0.1, gt=0, description="Of the value's loss beside the policy's.")
    clip_range: float = Field(0.2, gt=0, description="A value moves at most this far an update.")
    warmup_updates: int | Auto = Field(
        "auto",
        description="First updates of the value alone; auto: 0 from a reward model, else 10.",
    )


class PpoConfig(RunConfig):
    """PPO on one base: policy, reference, value and reward are adapters of it."""

    prompts_file: Path = Field(description="JSONL of prompts; answers in it are not used.")
    eval_prompts_file: Path | None = Field(None, description="Default: eval_prompts of the others.")
    eval_prompts: int = Field(32, ge=0, description="Fixed prompts answered at each evaluation.")
    start_adapter: Path | None = Field(
        None, description="The SFT adapter: policy and reference start as it. Default: the base."
    )
    max_prompt_length: int = Field(512, ge=1, description="Longer prompts are dropped and counted.")
    max_new_tokens: int = Field(64, ge=1, description="Of a response.")
    stop_at_eos: bool = Field(True, description="Off: every response has max_new_tokens.")
    temperature: float = Field(0.7, gt=0, description="Of rollouts, and of all log-probabilities.")
    samples_per_prompt: int = Field(1, ge=1, description="Responses to one prompt in a batch.")

    total_episodes: int = Field(10_000, ge=1, description="Responses in the run.")
    batch_size: int = Field(64, ge=1, description="Responses an update, all processes.")
    num_epochs: int = Field(4, ge=1, description="Passes over an update's responses.")
    num_minibatches: int = Field(1, ge=1, description="Optimizer steps a pass.")
    micro_batch_tokens: int | Auto = Field("auto", description="Most tokens at once on a device.")
    gradient_checkpointing: bool = Field(False, description="Slower, smaller.")
    learning_rate: float = Field(3e-5, gt=0, description="Of the policy, at its highest.")
    lr_scheduler: Literal["linear", "constant"] = Field("linear", description="linear falls to 0.")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Of each adapter's gradient.")

    reward: PpoRewardSettings
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

    eval_every: int = Field(10, ge=1, description="Updates between evaluations.")
    save_every: int = Field(10, ge=1, description="Updates between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="The newest, and the best.")
    lora: LoraSettings = LoraSettings()

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
        if self.lora.dropout:
            problems.append(NO_DROPOUT)
        given = self.lora.model_fields_set - {"dropout"}
        if self.start_adapter is not None and given:
            problems.append(
                f"start_adapter keeps its adapter's shape; leave out lora.{', lora.'.join(given)}"
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
        return 0 if self.value_starts_as_reward else 10

    @property
    def value_starts_as_reward(self) -> bool:
        """Whether the value begins as a copy of the reward model."""
        separate = self.value.trunk == "separate"
        return separate and self.reward.model is not None and self.value.start != "zero"


class TrlConfig(RunConfig):
    """What the runs by TRL's trainers share."""

    start_adapter: Path | None = Field(
        None, description="The SFT adapter: policy and reference start as it. Default: the base."
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Rows a step, all processes.")
    micro_batch_size: int | Auto = Field("auto", description="Rows at once on a device.")
    learning_rate: float = Field(5e-5, gt=0, description="At its highest.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="How the rate falls: linear, cosine or constant."
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Of the steps, with rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this.")
    gradient_checkpointing: bool = Field(False, description="Slower, smaller.")
    keep_checkpoints: int = Field(2, ge=1, description="The newest.")
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        given = self.lora.model_fields_set - {"dropout"}
        if self.start_adapter is not None and given:
            raise ValueError(
                f"start_adapter keeps its adapter's shape; leave out lora.{', lora.'.join(given)}"
            )
        if self.lora.dropout:
            raise ValueError(NO_DROPOUT)
        return self


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
        _check_held_out(self)
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


class GroupConfig(TrlConfig):
    """What RLOO and GRPO share: several responses to a prompt, and no value model."""

    prompts_file: Path = Field(description="JSONL of prompts; answers in it are not used.")
    eval_prompts_file: Path | None = Field(None, description="Default: eval_prompts of the others.")
    eval_prompts: int = Field(32, ge=0, description="Fixed prompts answered at each evaluation.")
    eval_every: int = Field(10, ge=1, description="Steps between evaluations.")
    save_every: int = Field(10, ge=1, description="Steps between checkpoints.")
    max_prompt_length: int = Field(512, ge=1, description="Longer prompts are dropped and counted.")
    max_new_tokens: int = Field(64, ge=1, description="Of a response.")
    temperature: float = Field(1.0, gt=0, description="Of rollouts.")
    num_generations: int = Field(4, ge=2, description="Responses to one prompt.")
    total_episodes: int = Field(4_000, ge=1, description="Responses in the run.")
    num_iterations: int = Field(1, ge=1, description="Passes over a batch.")
    beta: float = Field(0.05, ge=0, description="Of the KL.")
    clip_range: float = Field(0.2, gt=0, description="Of the policy's ratio.")
    reward: PpoRewardSettings

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

"""The configuration of a training run, and the rules that turn its `auto` into numbers.

A run reads YAML plus `key=value` words (`data.settings.read_config`): unknown keys are refused with
the nearest name, and impossible combinations are told all at once. `resolve` applies the rules to
what the dataset turned out to be; the numbers are saved beside the adapter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from data.errors import ConfigError
from data.estimate import MAX_AUTO_LENGTH
from data.job_spec import auto_epochs
from data.settings import StrictModel

Auto = Literal["auto"]
Number = TypeVar("Number", int, float)
# Activations of a 135M model take 3 MB a token in float32; a CPU gains nothing beyond this.
CPU_MICRO_BATCH_TOKENS = 1024
GPU_MICRO_BATCH_TOKENS = 8192


class LoraSettings(StrictModel):
    """The adapter's shape, by PEFT's names."""

    r: int = Field(16, ge=1, le=256, description="Rank.")
    alpha: float | None = Field(
        None, gt=0, description="Scale is alpha / r; default 2 r, or 2 sqrt(r) with rsLoRA."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapter's input, in training.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of linear layers of the base, such as q_proj."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (arXiv:2312.03732).")


class SftLora(LoraSettings):
    """What supervised fine-tuning adds to it."""

    r: Annotated[int, Field(ge=1, le=256)] | Auto = Field(  # type: ignore[assignment]
        "auto", description="Rank."
    )
    lr_ratio: float = Field(
        1.0, ge=1, le=64, description="Learning rate of B over A's; LoRA+ uses 16 (2402.12354)."
    )
    use_dora: bool = Field(
        False, description="Learn magnitudes too (arXiv:2402.09353); the result is a merged model."
    )


class EarlyStopping(StrictModel):
    """Stop when the validation loss no longer falls; the best checkpoint becomes the adapter."""

    enabled: bool = Field(False, description="Needs validation rows.")
    patience: int = Field(2, ge=1, description="Evaluations without improvement.")
    min_delta: float = Field(0.0, ge=0, description="Smallest fall that counts.")
    warmup_evals: int = Field(0, ge=0, description="First evaluations that never stop a run.")


class ClassSettings(StrictModel):
    """Validate as a classification too; its classes are the completions (`train.class_metrics`)."""

    enabled: bool = Field(False, description="Needs validation rows and scikit-learn.")
    n_classes: int | None = Field(None, ge=2, description="Different completions; 2 needs none.")
    positive_class: str | None = Field(
        None, description="Of two classes, the one that precision and recall are of."
    )
    betas: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list, description="Of F-scores beside F1; with positive_class."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.enabled:
            return self
        if self.n_classes is None and self.positive_class is None:
            raise ValueError("give n_classes, or the positive_class of two")
        if self.positive_class is not None and (self.n_classes or 2) > 2:
            raise ValueError(f"positive_class is of two classes, n_classes is {self.n_classes}")
        if self.betas and self.positive_class is None:
            raise ValueError("betas need a positive_class")
        return self


class WandbSettings(StrictModel):
    """Logging to Weights & Biases; nothing is sent unless a project is named."""

    project: str | None = Field(None, description="The project; without one nothing is sent.")
    name: str | None = Field(None, description="Of the run; default: the folder's name.")


class RunConfig(StrictModel):
    """What every training run has: a base, a folder, a device."""

    base_model: str = Field("smollm2-135m-instruct", description="Name, YAML, folder or hub id.")
    models_dir: Path = Field(Path(".hone/models"), description="Where fetched bases are kept.")
    output_dir: Path = Field(description="The run's folder; an unfinished run in it is resumed.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of the start, the order and dropout.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the base; auto is bfloat16 where the hardware is fast in it."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores.")
    bias_report: bool = Field(
        False, description="Measure the adapter's bias beside the base's: bias_report.json."
    )
    wandb: WandbSettings = WandbSettings()


class SftConfig(RunConfig):
    """Supervised fine-tuning of one LoRA adapter."""

    load_in_4bit: bool = Field(
        False, description="Keep the base in 4 bits (NF4, bitsandbytes) in training; a CUDA GPU."
    )
    train_file: Path = Field(description="JSONL: prompt and completion, messages, or text.")
    validation_file: Path | None = Field(None, description="JSONL of the same kind.")
    validation_fraction: float = Field(
        0.0, ge=0, le=0.5, description="Held out of train_file, equal rows together."
    )
    min_examples: int = Field(10, ge=1, description="Fewer rows than this are refused.")
    max_length: int | Auto = Field("auto", description="Tokens of a row; auto: of the longest.")
    on_long: Literal["truncate", "error", "drop"] = Field(
        "truncate", description="What becomes of longer rows: truncate, error or drop."
    )

    prompt_loss_weight: float = Field(
        0.0, ge=0, le=1, description="Of a prompt's tokens in the loss; a completion's have 1."
    )
    num_epochs: int | Auto = Field("auto", description="Passes over the rows, 1 to 50.")
    batch_size: int | Auto = Field("auto", description="Rows per optimizer step, all processes.")
    micro_batch_size: int | Auto = Field("auto", description="Most rows at once on a device.")
    micro_batch_tokens: int | Auto = Field("auto", description="Most tokens at once on a device.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice rather than keep them: slower, smaller."
    )
    learning_rate: float | Auto = Field("auto", description="At its highest.")
    learning_rate_multiplier: float | Auto = Field("auto", description="Times learning_rate.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="How the rate falls: linear, cosine or constant."
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Of the steps, with rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_grad_norm: float = Field(1.0, gt=0, description="Longer gradients are cut to this.")

    lora: SftLora = SftLora()
    max_auto_rank: int = Field(256, ge=1, description="The highest rank that lora.r=auto becomes.")
    early_stopping: EarlyStopping = EarlyStopping()
    classification: ClassSettings = ClassSettings()
    n_evals: int | None = Field(
        None, ge=1, description="Evaluations, evenly over the steps; default 4."
    )
    n_checkpoints: int | None = Field(
        None, ge=1, description="Checkpoints; default one an epoch, and at least 4."
    )
    keep_checkpoints: int = Field(3, ge=1, description="The newest, and the best.")
    start_adapter: Path | None = Field(
        None, description="PEFT folder of an adapter to go on from; its shape is kept."
    )
    compare_with: Path | None = Field(
        None, description="PEFT folder that validation compares with; default: the base itself."
    )
    compare_base: str | None = Field(
        None, description="Base of compare_with, where that is another: name, YAML, folder, hub id."
    )
    score_examples: int = Field(
        0, ge=0, description="Tell each training row's loss at the end, if there are no more rows."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = list(self._contradictions())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> list[str]:
        problems = []
        if self.validation_file is not None and self.validation_fraction:
            problems.append("validation_file and validation_fraction exclude each other")
        has_validation = self.validation_file is not None or self.validation_fraction > 0
        if self.early_stopping.enabled and not has_validation:
            problems.append("early_stopping needs validation_file or validation_fraction")
        if self.classification.enabled and not has_validation:
            problems.append("classification needs validation_file or validation_fraction")
        if self.compare_with is not None and not has_validation:
            problems.append("compare_with needs validation_file or validation_fraction")
        if self.compare_base is not None and self.compare_with is None:
            problems.append("compare_base needs compare_with, an adapter of that base")
        if self.n_evals is not None and not has_validation:
            problems.append("n_evals needs validation_file or validation_fraction")
        if self.early_stopping.enabled and self.n_checkpoints is not None:
            problems.append(
                "early_stopping saves at every evaluation; set n_evals, not n_checkpoints"
            )
        given = self.lora.model_fields_set - {"dropout", "lr_ratio"}
        if self.start_adapter is not None and given:
            problems.append(
                f"start_adapter keeps its adapter's shape; leave out lora.{', lora.'.join(given)}"
            )
        batch, micro = self.batch_size, self.micro_batch_size
        if isinstance(batch, int) and isinstance(micro, int) and micro > batch:
            problems.append(f"micro_batch_size {micro} is more than batch_size {batch}")
        for name, low, high in (
            ("num_epochs", 1, 50),
            ("batch_size", 1, 256),
            ("micro_batch_size", 1, 256),
            ("micro_batch_tokens", 8, 1 << 20),
            ("max_length", 8, 1 << 20),
        ):
            value = getattr(self, name)
            if isinstance(value, int) and not low <= value <= high:
                problems.append(f"{name} is {value}; expected {low} to {high}, or auto")
        for name in ("learning_rate", "learning_rate_multiplier"):
            value = getattr(self, name)
            if not isinstance(value, str) and not 0 < value < math.inf:
                problems.append(f"{name} is {value}; expected a number above 0, or auto")
        return problems


class Plan(StrictModel):
    """The numbers that `auto` became."""

    num_epochs: int
    batch_size: int
    micro_batch_size: int
    micro_batch_tokens: int
    learning_rate: float
    learning_rate_multiplier: float
    max_length: int
    lora_r: int | None = None  # of a fresh adapter
    steps_per_epoch: int
    total_steps: int


def resolve_length(config: SftConfig, longest: int, context_length: int) -> int:
    """Return the tokens that a row may have: by `auto` those of the longest row, within
    MAX_AUTO_LENGTH and the base's context.

    Raises:
        ConfigError: `max_length` exceeds the base's context.
    """
    if config.max_length == "auto":
        return min(longest, MAX_AUTO_LENGTH, context_length)
    if config.max_length > context_length:
        raise ConfigError(
            [
                f"max_length is {config.max_length}, but {config.base_model} reads at most "
                f"{context_length} tokens; give that or less, or auto"
            ]
        )
    return config.max_length


def resolve(
    config: SftConfig,
    *,
    num_rows: int,
    max_length: int,
    num_parameters: int,
    on_gpu: bool = False,
    num_processes: int = 1,
) -> Plan:
    """Turn every `auto` into a number.

    Rules: epochs fall with the number of rows (10 under 100, 8 under 500, 5 under 2,000, 3 under
    20,000, 2 under 50,000, then 1); 8 rows a step under 20,000 rows, 16 under 100,000, then 32,
    rounded up to a multiple of the processes; the learning rate falls with the model's size (1e-3
    to 0.3 billion parameters, 5e-4 to 1.5, then 2e-4: what LoRA at a scale of 2 bears); a device
    takes a step's rows in parts of up to 1,024 tokens on a CPU, 8,192 on a GPU. The adapter's rank
    grows with the rows that it has to hold: 16 under 20,000, 32 under 100,000, then 64, at most
    `max_auto_rank`; one to go on from keeps its own.

    Args:
        num_rows: Training rows.
        max_length: From `resolve_length`.
        num_parameters: Of the base model.
        num_processes: That share a step's rows.

    Raises:
        ConfigError: The processes cannot share the rows of a given batch_size evenly.
    """
    batch = _by_size(num_rows, ((20_000, 8), (100_000, 16)), 32)
    rate = auto_learning_rate(num_parameters)
    rank = min(_by_size(num_rows, ((20_000, 16), (100_000, 32)), 64), config.max_auto_rank)
    tokens = GPU_MICRO_BATCH_TOKENS if on_gpu else CPU_MICRO_BATCH_TOKENS
    num_epochs = _number(config.num_epochs, auto_epochs(num_rows))
    batch_size = _number(config.batch_size, math.ceil(batch / num_processes) * num_processes)
    if batch_size % num_processes:
        raise ConfigError(
            [
                f"batch_size is {batch_size}, which {num_processes} processes cannot share; give a "
                f"multiple of {num_processes}"
            ]
        )
    steps = math.ceil(num_rows / batch_size)
    return Plan(
        num_epochs=num_epochs,
        batch_size=batch_size,
        micro_batch_size=_number(config.micro_batch_size, batch_size // num_processes),
        micro_batch_tokens=_number(config.micro_batch_tokens, tokens),
        learning_rate=_number(config.learning_rate, rate),
        learning_rate_multiplier=_number(config.learning_rate_multiplier, 1.0),
        max_length=max_length,
        lora_r=None if config.start_adapter else _number(config.lora.r, rank),
        steps_per_epoch=steps,
        total_steps=steps * num_epochs,
    )


def auto_learning_rate(num_parameters: int) -> float:
    """Return the learning rate that `auto` takes for a base of that size."""
    return _by_size(num_parameters, ((300_000_000, 1e-3), (1_500_000_000, 5e-4)), 2e-4)


def _number(asked: Number | Auto, by_rule: Number) -> Number:
    return by_rule if isinstance(asked, str) else asked


def _by_size(size: int, table: tuple[tuple[int, Number], ...], above: Number) -> Number:
    return next((value for limit, value in table if size < limit), above)

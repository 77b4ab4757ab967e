"""What the runs by TRL's trainers share: a policy on a base, arguments, logs, and the end."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from data.errors import ConfigError, TrainingFailed
from rlhf.actor_critic import POLICY, with_policy
from rlhf.trl_config import GroupConfig, OfflineConfig, TrlConfig
from train.base_model import Base
from train.callbacks import ProgressBar, RunLog, SaveAt, Stopper
from train.lora import lora_config
from train.publish import write_adapter
from train.run import RunFolder
from train.start import read_shape, set_weights

NESTED = ("held_out", "comparison", "gate")  # of an outcome; the model card leaves them out
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}  # at once on a device


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps a run has, and rows of each device at once and in turn."""

    total: int
    micro_rows: int
    accumulation: int


def num_processes() -> int:
    """Return how many processes `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_steps(
    config: TrlConfig, total: int, tokens_a_row: float, device: str, least: int = 1
) -> Steps:
    """Cut a step's rows into parts that fit a device; every part has as many rows.

    Args:
        total: Optimizer steps.
        tokens_a_row: About so many go through the model for a row.
        least: Fewest rows of a part.

    Raises:
        ConfigError: The processes cannot share a step's rows evenly.
    """
    share, rest = divmod(config.batch_size, num_processes())
    if rest or share < least:
        raise ConfigError(
            [
                f"batch_size is {config.batch_size}, which {num_processes()} processes cannot "
                f"share in parts of at least {least}"
            ]
        )
    if config.micro_batch_size != "auto":
        micro = config.micro_batch_size
        if share % micro or micro < least:
            raise ConfigError(
                [
                    f"micro_batch_size {micro} does not divide the {share} rows of a process, or "
                    f"is less than {least}"
                ]
            )
        return Steps(total, micro, share // micro)
    most = max(least, int(MICRO_TOKENS[device] // max(tokens_a_row, 1)))
    fitting = [rows for rows in range(least, share + 1) if share % rows == 0]
    micro = max((rows for rows in fitting if rows <= most), default=fitting[0])
    return Steps(total, micro, share // micro)


def start_policy(config: TrlConfig, base: Base) -> PeftModel:
    """Put the policy's adapter on the base: the start adapter, or a fresh one."""
    set_seed(config.seed)
    if config.start_adapter is None:
        return with_policy(base.model, lora_config(config.lora, base.model))
    shape = read_shape(config.start_adapter, base, config.lora.dropout)
    model = with_policy(base.model, shape)
    set_weights(model, config.start_adapter)
    return model


def checkpoint_every(config: TrlConfig, total: int) -> int:
    """Return the steps between checkpoints of a run of `total`; DPO and KTO evaluate at each."""
    if isinstance(config, GroupConfig):
        passes = config.num_iterations  # a batch is learned from whole, then saved
        return math.ceil(config.save_every / passes) * passes
    if isinstance(config, OfflineConfig):
        return max(1, math.ceil(total / config.n_evals))
    raise TypeError(f"{type(config).__name__} says nothing of checkpoints")


def arguments(
    config: TrlConfig, base: Base, run: RunFolder, steps: Steps, evaluates: bool
) -> dict[str, Any]:
    """Return the settings that all of TRL's trainers take."""
    every = checkpoint_every(config, steps.total)
    if config.wandb.project:
        os.environ["WANDB_PROJECT"] = config.wandb.project
    return {
        "output_dir": str(run.checkpoints),
        "max_steps": steps.total,
        "per_device_train_batch_size": steps.micro_rows,
        "gradient_accumulation_steps": steps.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": math.ceil(config.warmup_fraction * steps.total),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.seed,
        "activation_checkpointing": config.gradient_checkpointing,
        "bf16": False,  # the base has its dtype; adapters are float32 over it
        "use_cpu": base.model.device.type == "cpu",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": every if evaluates else None,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": None,  # RunLog removes old ones, once a new one is whole
        "logging_steps": max(1, steps.total // 200),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": ["wandb"] if config.wandb.project else [],
        "run_name": config.wandb.name or run.path.name,
        "dataloader_pin_memory": base.model.device.type != "cpu",
        "disable_tqdm": True,
    }


def callbacks(
    run: RunFolder, base: Base, config: TrlConfig, stopper: Stopper, steps: Steps
) -> list[Any]:
    """Return what watches a run; every checkpoint becomes a model."""
    log = RunLog(run, lambda step: True, base.origin, config.keep_checkpoints)
    return [stopper, SaveAt({steps.total}), Finite(), log]


class Finite(TrainerCallback):
    """Ends a run whose loss or gradient is not finite, before the step is saved."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save:  # the log comes before the checkpoint
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise TrainingFailed where a number is not finite."""
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise TrainingFailed(
                    f"{name} is {value} at step {state.global_step}; the last whole checkpoint is "
                    "kept. Lower learning_rate",
                    code="loss_not_finite",
                )


def train_policy(
    trainer: Trainer,
    config: TrlConfig,
    base: Base,
    run: RunFolder,
    stopper: Stopper,
    checkpoint: Path | None,
    method: str,
    rows: Sequence[Sequence[int]],
    judge: Callable[[], dict[str, Any]] = dict,
    curves: Sequence[tuple[str, str]] = (("train_loss", "training"), ("valid_loss", "validation")),
) -> dict[str, Any] | None:
    """Train, and write the adapter; returns the outcome, or None when told to stop.

    Args:
        rows: Token ids on which the adapter is tried.
        judge: Says more of the trained policy.

    Raises:
        TrainingFailed: A number is not finite, or the adapter does not serve as trained.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty() and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(Console(stderr=True)))
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopper.asked.is_set():
        return None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    valid = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    result: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else outcome.training_loss,
        "valid_loss": valid[-1] if valid else None,
        "trained_tokens": int(trainer.state.num_input_tokens_seen) or None,
    }
    if trainer.is_world_process_zero():
        model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        model.eval()
        result |= judge()

        def save(folder: Path) -> None:
            model.peft_config[POLICY].base_model_name_or_path = base.name
            model.save_pretrained(
                str(folder), selected_adapters=[POLICY], save_embedding_layers=False
            )

        summary = {
            "method": method,
            **{name: value for name, value in result.items() if name not in NESTED},
        }
        write_adapter(run, model, base, config, rows, summary, save=save, curves=curves)
    return result

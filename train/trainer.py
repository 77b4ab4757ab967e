"""The run itself: TRL's SFTTrainer on rendered rows, with hone's order, head, log and signals."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from data.errors import TrainingFailed
from data.render import IGNORED
from train.base_model import Base, load_base
from train.batches import (
    LengthGroupedSampler,
    Rendered,
    as_dataset,
    limit_length,
    load_file,
    name_lines,
    split,
)
from train.callbacks import ProgressBar, RunLog, Stopper
from train.config import Plan, SftConfig, resolve
from train.loss_head import use_compact_head
from train.publish import write_adapter
from train.run import RunFolder

LOG_RECORDS = 200  # about so many metrics records a run
DEFAULT_EVALS = 4
DEFAULT_CHECKPOINTS = 4


@dataclass
class TrainingJob:
    """Everything that a run needs before its first step."""

    config: SftConfig
    base: Base
    train: Rendered
    valid: Rendered | None
    plan: Plan
    warnings: list[str]
    facts: dict[str, Any]


def take_signals() -> Stopper:
    """Have SIGTERM and SIGINT end the run in order from now on."""
    stopper = Stopper()
    stopper.install()
    return stopper


def prepare(config: SftConfig) -> TrainingJob:
    """Load the base, check and render the data, and resolve the plan.

    Raises:
        ToolkitError: The base is unavailable or the data unusable.
    """
    set_seed(config.seed)
    base = load_base(config)
    train = load_file(config.train_file, base.tokenizer, config.min_examples)
    valid = None
    if config.validation_file is not None:
        valid = load_file(config.validation_file, base.tokenizer, 1)
    elif config.validation_fraction:
        train, valid = split(train, config.validation_fraction, config.seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = resolve(
        config,
        len(train.examples),
        train.longest,
        base.context_length,
        base.num_parameters,
        processes,
    )
    limit_length(train, plan.max_length, config.on_long)
    if valid is not None:
        limit_length(valid, plan.max_length, "truncate")
    facts = {
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "dtype": str(base.model.dtype),
        },
        "train_data": _describe(train),
        "validation_data": _describe(valid) if valid else None,
    }
    return TrainingJob(
        config, base, train, valid, plan, list(_warn(train, plan, config.on_long)), facts
    )


def train(
    job: TrainingJob, run: RunFolder, stopper: Stopper, checkpoint: Path | None
) -> dict[str, Any] | None:
    """Train, save the adapter, and return the outcome; None when told to stop.

    Raises:
        TrainingFailed: The loss is not finite, or the adapter does not serve as trained.
    """
    trainer = _make_trainer(job, run, stopper)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopper.asked.is_set():
        return None
    if trainer.state.global_step < trainer.state.max_steps:
        run.tell(
            f"Early stopping: no improvement in {job.config.early_stopping.patience} evaluations; "
            f"best step {_best_step(trainer)}",
            level="warn",
            step=trainer.state.global_step,
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    valid_losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    result = {
        "trained_tokens": round(job.train.num_tokens * (trainer.state.epoch or 0)),
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else outcome.training_loss,
        "valid_loss": min(valid_losses, default=None),
        "best_step": _best_step(trainer),
    }
    if trainer.is_world_process_zero():
        summary = {**result, **job.plan.model_dump(), "training data": job.train.path.name}
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_adapter(run, model, job.base, job.config, job.train.examples, summary)
    return result


def show_tokens(job: TrainingJob, count: int) -> None:
    """Print rows as the model sees them: learned tokens are green, the context is dim."""
    console = Console()
    for line, example in zip(job.train.lines[:count], job.train.examples, strict=False):
        console.print(f"line {line}: {len(example)} tokens, {example.num_trained} learned")
        for token_id, label in zip(example.input_ids, example.labels, strict=True):
            style = "dim" if label == IGNORED else "green"
            mark = " " if label == IGNORED else "*"
            text = repr(job.base.tokenizer.decode([token_id]))
            console.print(f"  {mark} {token_id:>7} {text}", style=style, markup=False)


class _Trainer(SFTTrainer):
    """SFTTrainer in length-grouped order, with a head that skips prompts, refusing a lost loss."""

    def __init__(self, lengths: list[int], batch_rows: int, order_seed: int, **kwargs: Any):
        self._order = LengthGroupedSampler(lengths, batch_rows, order_seed)
        super().__init__(**kwargs)
        use_compact_head(self.model.get_base_model())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate token by token: each counts alike, however the rows fall into batches."""
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader():
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = self.model(**inputs, fused_lm_head=True)
            parts = (-scores.log_probs.sum(), scores.is_top1.sum(), scores.label_mask.sum())
            totals += torch.stack([part.double() for part in parts])
        loss, correct, count = self.accelerator.reduce(totals).tolist()
        metrics = {"eval_loss": loss / count, "eval_mean_token_accuracy": correct / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingFailed(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; the last whole "
                "checkpoint is kept. Lower learning_rate, or look for broken rows",
                code="loss_not_finite",
            )
        return loss


def _make_trainer(job: TrainingJob, run: RunFolder, stopper: Stopper) -> _Trainer:
    config, plan, base = job.config, job.plan, job.base
    lora = config.lora
    set_seed(config.seed)  # so that the adapter starts the same however the data were read
    peft_config = LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    trainer = _Trainer(
        lengths=[len(example) for example in job.train.examples],
        batch_rows=plan.batch_size,
        order_seed=config.seed,
        model=base.model,
        args=_training_arguments(job, run),
        train_dataset=as_dataset(job.train.examples),
        eval_dataset=as_dataset(job.valid.examples) if job.valid else None,
        processing_class=base.tokenizer,
        peft_config=peft_config,
        callbacks=[stopper, RunLog(run, job.valid is not None)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty() and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(Console(stderr=True)))
    if config.early_stopping.enabled:
        patience, min_delta = config.early_stopping.patience, config.early_stopping.min_delta
        trainer.add_callback(EarlyStoppingCallback(patience, min_delta))
    return trainer


def _training_arguments(job: TrainingJob, run: RunFolder) -> SFTConfig:
    config, plan = job.config, job.plan
    evals = config.n_evals or DEFAULT_EVALS
    eval_steps = max(1, math.ceil(plan.total_steps / evals))
    save_steps = max(1, math.ceil(plan.total_steps / (config.n_checkpoints or DEFAULT_CHECKPOINTS)))
    keep_best = config.early_stopping.enabled
    if config.wandb.project:
        os.environ["WANDB_PROJECT"] = config.wandb.project
    return SFTConfig(
        output_dir=str(run.checkpoints),
        num_train_epochs=plan.num_epochs,
        per_device_train_batch_size=plan.micro_batch_size,
        per_device_eval_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.accumulation_steps,
        learning_rate=plan.learning_rate * plan.learning_rate_multiplier,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=math.ceil(config.warmup_fraction * plan.total_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        max_length=None,  # rows are cut already
        packing=False,
        activation_checkpointing=False,
        bf16=False,  # the base has its dtype; adapters are float32 over it
        use_cpu=job.base.model.device.type == "cpu",
        eval_strategy="steps" if job.valid else "no",
        eval_steps=eval_steps if job.valid else None,
        save_strategy="steps",
        save_steps=eval_steps if keep_best else save_steps,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        logging_steps=max(1, plan.total_steps // LOG_RECORDS),
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=["wandb"] if config.wandb.project else [],
        run_name=config.wandb.name or run.path.name,
        dataloader_num_workers=0,
        dataloader_pin_memory=job.base.model.device.type != "cpu",
        disable_tqdm=True,
    )


def _describe(rendered: Rendered) -> dict[str, Any]:
    return {
        "file": rendered.path.name,
        "sha256": rendered.digest,
        "examples": len(rendered.examples),
        "tokens": rendered.num_tokens,
        "longest": rendered.longest,
        "truncated_lines": rendered.long,
    }


def _warn(train: Rendered, plan: Plan, on_long: str) -> list[str]:
    if not train.long:
        return []
    what = "example" if len(train.long) == 1 else "examples"
    fate = "dropped, longer than" if on_long == "drop" else "truncated to"
    return [f"{len(train.long)} {what} {fate} {plan.max_length} tokens: {name_lines(train.long)}"]


def _best_step(trainer: SFTTrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return None if best is None else int(best.rpartition("-")[2])

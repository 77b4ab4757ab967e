"""The run itself: TRL's SFTTrainer on rendered rows, with hone's order, head, log and signals."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from data.render import IGNORED
from train.batches import LengthGroupedSampler, as_dataset
from train.callbacks import ProgressBar, RunLog, Stopper
from train.prepare import TrainingJob
from train.publish import write_adapter
from train.run import RunFolder
from train.sft_trainer import LoraTrainer

LOG_RECORDS = 200  # about so many metrics records a run
DEFAULT_EVALS = 4
DEFAULT_CHECKPOINTS = 4
EVAL_ROWS = 64  # of one validation batch, which is cut up as a step is


def take_signals() -> Stopper:
    """Have SIGTERM and SIGINT end the run in order from now on."""
    stopper = Stopper()
    stopper.install()
    return stopper


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


def estimate(job: TrainingJob) -> dict[str, float]:
    """Try one step on the run's first rows and say how long the whole run would take.

    Returns:
        `tokens_per_s` (real ones, not padding) and `training_s`, without loading and evaluation.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(job, RunFolder(Path(folder)), Stopper())
        batch = next(iter(trainer.get_train_dataloader()))
        num_learned = batch["labels"][:, 1:].ne(IGNORED).sum()
        seconds = []
        for _ in range(2):  # the first pays for what happens once
            started = time.monotonic()
            trainer.training_step(trainer.model, batch, num_learned)
            seconds.append(time.monotonic() - started)
    speed = float(batch["attention_mask"].sum()) / min(seconds)
    total = job.train.num_tokens * job.plan.num_epochs
    return {"tokens_per_s": round(speed, 1), "training_s": round(total / speed, 1)}


def _make_trainer(job: TrainingJob, run: RunFolder, stopper: Stopper) -> LoraTrainer:
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
    lengths = [len(example) for example in job.train.examples]
    trainer = LoraTrainer(
        order=LengthGroupedSampler(lengths, plan.batch_size, config.seed),
        max_rows=plan.micro_batch_size,
        max_tokens=plan.micro_batch_tokens,
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
        per_device_train_batch_size=plan.batch_size // job.num_processes,  # cut up in each step
        per_device_eval_batch_size=EVAL_ROWS,
        learning_rate=plan.learning_rate * plan.learning_rate_multiplier,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=math.ceil(config.warmup_fraction * plan.total_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        max_length=None,  # rows are cut already
        packing=False,
        activation_checkpointing=config.gradient_checkpointing,
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


def _best_step(trainer: SFTTrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return None if best is None else int(best.rpartition("-")[2])

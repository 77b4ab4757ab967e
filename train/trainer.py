"""The run itself: TRL's SFTTrainer on rendered rows, with hone's order, head, log and signals."""

from __future__ import annotations

import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from data.render import IGNORED
from train.batches import LengthGroupedSampler, as_dataset
from train.callbacks import (
    EarlyStop,
    EvaluateAt,
    KeptTokenCount,
    ProgressBar,
    RunLog,
    SaveAt,
    Stopper,
)
from train.config import Plan, SftConfig
from train.example_losses import write_losses
from train.lora import lora_config
from train.merged import write_merged
from train.prepare import TrainingJob
from train.publish import PROBE_ROWS, write_adapter
from train.regression import compare_with
from train.report import write_report
from train.run import RunFolder
from train.sft_trainer import ROUND, LoraTrainer
from train.start import read_shape, set_weights
from train.together import Seat

LOG_RECORDS = 200  # about so many metrics records a run
DEFAULT_EVALS = 4
FEWEST_CHECKPOINTS = 4  # to resume from, in a run of few epochs
EVAL_ROWS = 64  # of one validation batch, which is cut up as a step is


def take_signals() -> Stopper:
    """Have SIGTERM and SIGINT end the run in order from now on."""
    stopper = Stopper()
    stopper.install()
    return stopper


def train(
    job: TrainingJob,
    run: RunFolder,
    stopper: Stopper,
    checkpoint: Path | None,
    seat: Seat | None = None,
) -> dict[str, Any] | None:
    """Train, save the adapter, and return the outcome; None when told to stop.

    Args:
        seat: Where the run takes its turns with others on the same base, if it does.

    Raises:
        TrainingFailed: The loss is not finite, or the adapter does not serve as trained.
    """
    trainer = _make_trainer(job, run, stopper, seat)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = run.seconds
    if stopper.asked.is_set():
        return None
    if trainer.is_world_process_zero() and trainer.state.global_step < trainer.state.max_steps:
        message = (
            f"Early stopping: no improvement in {job.config.early_stopping.patience} evaluations; "
            f"best step {_best_step(trainer)}"
        )
        if not run.has_told(message):
            run.tell(message, level="warn", step=trainer.state.global_step)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "trained_tokens": round(job.train.num_tokens * (trainer.state.epoch or 0)),
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else outcome.training_loss,
        "valid_loss": _published_loss(trainer),
        "best_step": _best_step(trainer),
    }
    if trainer.is_world_process_zero():
        summary = {**result, **job.plan.model_dump(), "training data": job.train.path.name}
        model = trainer.accelerator.unwrap_model(trainer.model)
        rows = [example.input_ids for example in job.train.examples[:PROBE_ROWS]]
        has_dora = model.peft_config["default"].use_dora
        serves = not (has_dora or job.config.load_in_4bit)  # else the numbers are others
        write_adapter(run, model, job.base, job.config, rows, summary, serves=serves)
        write_losses(run, model, job)
        regression = compare_with(job, model)
        if regression is not None:
            result["comparison"], result["gate"] = regression.summary(), regression.gate()
        result["peak_memory_bytes"] = _peak_memory(job.base.model.device)
        write_report(run, job, {**result, "training_s": seconds}, regression)
        if has_dora:
            write_merged(run, model, job.base, job.config.device)
    return result


def _peak_memory(device: torch.device) -> int:
    """Return the most memory that this process had: the device's, or the machine's on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def _make_trainer(
    job: TrainingJob,
    run: RunFolder,
    stopper: Stopper,
    seat: Seat | None = None,
) -> LoraTrainer:
    config, plan, base = job.config, job.plan, job.base
    set_seed(config.seed)  # so that the adapter starts the same however the data were read
    if config.start_adapter is None:
        peft_config = lora_config(config.lora.model_copy(update={"r": plan.lora_r}), base.model)
    else:
        peft_config = read_shape(config.start_adapter, base, config.lora.dropout)
    steps = checkpoint_steps(config, plan)
    published = _published(config, plan, steps)
    log = RunLog(run, published, base.origin, config.keep_checkpoints)
    trainer = LoraTrainer(
        order=LengthGroupedSampler(job.train.examples.lengths, plan.batch_size, config.seed),
        max_rows=plan.micro_batch_size,
        max_tokens=plan.micro_batch_tokens,
        prompt_loss_weight=config.prompt_loss_weight,
        lr_ratio=config.lora.lr_ratio,
        lines=job.train.lines,
        seat=seat,
        classes=job.classes,
        model=base.model,
        args=_training_arguments(job, run),
        train_dataset=as_dataset(job.train.examples),
        eval_dataset=as_dataset(job.valid.examples) if job.valid else None,
        processing_class=base.tokenizer,
        peft_config=peft_config,
        callbacks=[stopper, log],
    )
    trainer.add_callback(KeptTokenCount(trainer))
    if config.start_adapter is not None:
        set_weights(trainer.model, config.start_adapter)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if seat is None and sys.stderr.isatty() and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(Console(stderr=True)))
    evaluated = spread(plan.total_steps, config.n_evals or DEFAULT_EVALS) if job.valid else set()
    trainer.add_callback(EvaluateAt(evaluated))
    if config.early_stopping.enabled:
        trainer.add_callback(EarlyStop(config.early_stopping))
    trainer.add_callback(SaveAt(evaluated if config.early_stopping.enabled else steps))
    return trainer


def spread(total: int, count: int) -> set[int]:
    """Return `count` of the steps 1 to `total`, evenly, the last among them; all if there are
    fewer."""
    return {-(-total * part // count) for part in range(1, count + 1)}


def checkpoint_steps(config: SftConfig, plan: Plan) -> set[int]:
    """Return the steps after which the state is saved: every epoch's last, or `n_checkpoints`.

    A run of few epochs is saved within them too, so that a crash costs less.
    """
    total = plan.total_steps
    if config.n_checkpoints is not None:
        return spread(total, config.n_checkpoints)
    parts = math.ceil(FEWEST_CHECKPOINTS / plan.num_epochs)
    within = {
        epoch * plan.steps_per_epoch + plan.steps_per_epoch * part // parts
        for epoch in range(plan.num_epochs)
        for part in range(1, parts + 1)
    }
    return within - {0}


def _published(config: SftConfig, plan: Plan, steps: set[int]) -> Callable[[int], bool]:
    """Tell which checkpoints become models: what was asked for, or the epochs'.

    A run that stops early publishes the checkpoint of every evaluation; one that is told to stop,
    its last.
    """
    if config.n_checkpoints is not None or config.early_stopping.enabled:
        return lambda step: True
    within_epochs = {step for step in steps if step % plan.steps_per_epoch}
    return lambda step: step not in within_epochs


def _training_arguments(job: TrainingJob, run: RunFolder) -> SFTConfig:
    config, plan = job.config, job.plan
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
        pad_to_multiple_of=ROUND,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are read when they are asked for
        remove_unused_columns=False,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=False,  # the base has its dtype; adapters are float32 over it
        use_cpu=job.base.model.device.type == "cpu",
        eval_strategy="steps" if job.valid else "no",
        eval_steps=plan.total_steps if job.valid else None,  # and where EvaluateAt says
        save_strategy="steps",
        save_steps=plan.total_steps,  # and where SaveAt says
        save_total_limit=None,  # RunLog removes old ones, once the new one is marked whole
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


def _published_loss(trainer: SFTTrainer) -> float | None:
    """Return the validation loss of the adapter at hand: the best one's, or the last."""
    state = trainer.state
    if state.best_model_checkpoint is not None:
        return state.best_metric
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return losses[-1] if losses else None


def _best_step(trainer: SFTTrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return None if best is None else int(best.rpartition("-")[2])

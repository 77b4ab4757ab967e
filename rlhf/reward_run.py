"""A reward model's run: comparisons in, adapter with head, scale and report card out."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from trl import RewardConfig as TrlRewardConfig

from data.errors import TrainingFailed
from rlhf.actor_critic import POLICY
from rlhf.comparisons import (
    Comparisons,
    Group,
    batches_of,
    limit_length,
    load_comparisons,
    split_prompts,
)
from rlhf.config import RewardConfig, resolve_length
from rlhf.prompts import Prompt
from rlhf.report_card import card_page, gate, report_card
from rlhf.reward_model import Normalizer, save_head
from rlhf.reward_trainer import PairTrainer, ScoredBase, as_row, score_rows
from rlhf.rollout import Sampler, seed_of
from rlhf.shared_prompts import of_groups, warn_of_shared
from serve.engine.adapter_files import memory_adapter
from serve.engine.base import MemoryAdapter
from train.base_model import Base, load_base
from train.batches import name_lines
from train.callbacks import KeptTokenCount, ProgressBar, RunLog, SaveAt, Stopper
from train.config import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS
from train.fused_layers import fuse_layers
from train.lora import lora_config
from train.publish import write_adapter
from train.run import RunFolder, replace_text, write_json
from train.start import read_shape, set_weights

CURVES = (("train_loss", "training"), ("valid_loss", "validation"))
SCORE_TOLERANCE = 1e-3  # of a raw score, saved and loaded again


@dataclass
class RewardRun:
    """Everything that a run needs before its first step."""

    config: RewardConfig
    base: Base
    train: Comparisons
    valid: Comparisons | None
    batch_groups: int
    max_tokens: int
    num_processes: int
    warnings: list[str]

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return self.config.num_epochs * math.ceil(len(self.train.groups) / self.batch_groups)


def set_up(config: RewardConfig) -> RewardRun:
    """Load and check everything.

    Raises:
        ToolkitError: The base is unavailable, or the comparisons cannot be used.
    """
    set_seed(config.seed)
    base = load_base(config)
    longest = resolve_length(config.max_length, base.name, base.context_length)
    train = load_comparisons(config.train_file, base.tokenizer, config.min_examples)
    valid, warnings = None, []
    if config.validation_file is not None:
        valid = load_comparisons(config.validation_file, base.tokenizer, 1)
        asked = of_groups(train.groups), of_groups(valid.groups)
        warnings += warn_of_shared(*asked, "validation_file")
    elif config.validation_fraction:
        train, valid = split_prompts(train, config.validation_fraction, config.seed)
    for part in (train, valid):
        if part is not None:
            limit_length(part, longest, config.on_long)
            if part.long:
                did = "dropped" if config.on_long == "drop" else "cut"
                warnings.append(
                    f"comparisons of more than {longest} tokens {did}: {name_lines(part.long)}"
                )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    groups = groups_a_step(config.batch_size, train.num_pairs / len(train.groups), size)
    by_device = CPU_MICRO_BATCH_TOKENS
    if base.model.device.type != "cpu":
        by_device = GPU_MICRO_BATCH_TOKENS
    tokens = config.micro_batch_tokens
    return RewardRun(
        *(config, base, train, valid, groups),
        tokens if tokens != "auto" else by_device,
        size,
        warnings,
    )


def groups_a_step(batch_size: int, pairs_a_group: float, num_processes: int) -> int:
    """Return how many prompts make a step of about `batch_size` comparisons.

    They are eights, or pairs where they are few, so that one, two, four or eight processes share
    the same steps; other numbers of processes round up to what they can share evenly.
    """
    groups = max(1, round(batch_size / pairs_a_group))
    unit = next(unit for unit in (8, 2, 1) if groups >= unit)
    groups = round(groups / unit) * unit
    return math.ceil(groups / num_processes) * num_processes


def train(
    job: RewardRun, run: RunFolder, stopper: Stopper, checkpoint: Path | None
) -> dict[str, Any] | None:
    """Train, normalise, judge and save; returns the outcome, or None when told to stop.

    Raises:
        TrainingFailed: The loss is not finite, or the scores do not survive saving.
    """
    config, base = job.config, job.base
    if config.start_adapter is None:
        shape = lora_config(config.lora, base.model)
    else:
        shape = read_shape(config.start_adapter, base, config.lora.dropout, may_score=True)
    set_seed(config.seed)
    scored = ScoredBase(base.model, shape)
    if config.start_adapter is not None:
        set_weights(scored.model, config.start_adapter)
    start = memory_adapter(scored.model.peft_config[POLICY].to_dict(), _adapter(scored))
    trainer = _make_trainer(job, run, stopper, scored)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopper.asked.is_set():
        return None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else outcome.training_loss,
        "train_pairs": job.train.num_pairs,
        "trained_tokens": sum(g.num_tokens for g in job.train.groups) * config.num_epochs,
    }
    if not trainer.is_world_process_zero():
        return result
    scored.model.eval()
    held_out: list[list[float]] = []
    if job.valid is not None:
        held_out = score_groups(scored, job.valid.groups, job.max_tokens, Normalizer())
    normalizer = _normalize(job, scored, start, held_out)
    if job.valid is not None:
        card = report_card(job.valid.groups, held_out)
        write_json(run.card, card)
        title = f"Reward model of {job.train.path.name}"
        replace_text(run.report, card_page(card, title))
        result |= {name: card[name] for name in ("accuracy", "accuracy_interval", "longer_wins")}
        result |= {"valid_pairs": card["pairs"], "nll": card["nll"]}
    _write(job, run, scored, normalizer, result)
    result |= {"mean": normalizer.mean, "std": normalizer.std}
    return result if job.valid is None else result | {"gate": gate(card)}


@torch.no_grad()
def score_groups(
    scored: ScoredBase, groups: Sequence[Group], max_tokens: int, normalizer: Normalizer
) -> list[list[float]]:
    """Return the normalised score of every answer of every group."""
    found: dict[int, list[float]] = {}
    device = scored.model.device
    for part in batches_of(groups, max_tokens):
        rows = [ids for group in part for ids in group.answers]
        scores = normalizer.apply(score_rows(scored.model, rows, device)).tolist()
        for group in part:
            found[id(group)], scores = scores[: len(group.answers)], scores[len(group.answers) :]
    return [found[id(group)] for group in groups]


def _normalize(
    job: RewardRun, scored: ScoredBase, start: MemoryAdapter, held_out: list[list[float]]
) -> Normalizer:
    """Measure the raw scores of the reference: of samples of the start policy, or held-out rows.

    Args:
        held_out: The raw scores of validation rows; empty where there are none.
    """
    config = job.config
    if config.normalize_on == "validation":
        train = job.train.groups
        by_group = held_out or score_groups(scored, train, job.max_tokens, Normalizer())
        raw = [score for found in by_group for score in found]
    else:
        raw = _score_samples(job, scored, start)
    values = torch.tensor(raw, dtype=torch.float64)
    std = float(values.std()) if len(values) > 1 else 0.0
    if not std > 1e-6:
        raise TrainingFailed(
            f"The reward model scores all {len(raw)} reference answers alike: it has learned "
            "nothing; look at the comparisons, or train longer",
            code="reward_constant",
        )
    return Normalizer(float(values.mean()), std, len(raw))


@torch.no_grad()
def _score_samples(job: RewardRun, scored: ScoredBase, start: MemoryAdapter) -> list[float]:
    config = job.config
    groups, count = job.train.groups, config.normalize_samples
    prompts = [
        Prompt(group.pairs[0].line, group.prompt[-(job.base.context_length // 2) :], "")
        for group in (groups[index % len(groups)] for index in range(count))
    ]
    longest = max(len(prompt.ids) for prompt in prompts)
    room = min(config.max_new_tokens, job.base.context_length - longest)
    sampler = Sampler(job.base, config.device, longest + room, count, stop_at_eos=True)
    try:
        seeds = [seed_of(config.seed, 0, index) for index in range(count)]
        samples = sampler.sample(start, prompts, seeds, room, 1.0)
    finally:
        sampler.close()
    rows = [Group(s.prompt.ids, [(*s.prompt.ids, *s.response)]) for s in samples]
    return [found[0] for found in score_groups(scored, rows, job.max_tokens, Normalizer())]


def _write(
    job: RewardRun,
    run: RunFolder,
    scored: ScoredBase,
    normalizer: Normalizer,
    result: dict[str, Any],
) -> None:
    """Save adapter and head, checked by loading them the way PPO and serving do."""
    rows = [ids for group in job.train.groups[:3] for ids in group.answers[:1]]
    with torch.no_grad():
        wanted = score_rows(scored.model, rows, scored.model.device).tolist()
    scored.give_back()

    def save(folder: Path) -> None:
        scored.model.peft_config[POLICY].base_model_name_or_path = job.base.name
        scored.model.save_pretrained(str(folder), save_embedding_layers=False)
        save_head(folder, scored.head.weight, normalizer)

    summary = {"method": "reward modelling (Bradley-Terry)", **result}
    write_adapter(run, scored.model, job.base, job.config, rows, summary, save=save, curves=CURVES)
    found = _reload(job, run.adapter, rows)
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    if not worst <= SCORE_TOLERANCE * max(1.0, *map(abs, wanted)):
        raise TrainingFailed(
            f"The reward model's scores differ by {worst:.2g} after saving and loading",
            code="probe_mismatch",
        )


@torch.no_grad()
def _reload(job: RewardRun, folder: Path, rows: Sequence[Sequence[int]]) -> list[float]:
    from peft import PeftModel

    from rlhf.actor_critic import REWARD, ActorCritic
    from rlhf.reward_model import read_head
    from serve.engine import base_model

    dtype = str(job.base.model.dtype).removeprefix("torch.")
    fresh, _ = base_model.load(job.base.folder, dtype, job.config.device)
    fuse_layers(fresh)  # as trained: other roundings differ by more in bfloat16
    model = PeftModel.from_pretrained(fresh, str(folder), adapter_name=REWARD)
    roles = ActorCritic(model, 1.0)
    roles.add_head(REWARD, read_head(folder, job.base.fingerprint).weight)
    return roles.rewards(rows).tolist()


def _adapter(scored: ScoredBase) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(scored.model, save_embedding_layers=False)


def _make_trainer(
    job: RewardRun, run: RunFolder, stopper: Stopper, scored: ScoredBase
) -> PairTrainer:
    config = job.config
    every = max(1, math.ceil(job.steps / config.n_evals))
    if config.wandb.project:
        os.environ["WANDB_PROJECT"] = config.wandb.project
    saved = {*range(every, job.steps, every), job.steps}
    log = RunLog(run, lambda step: False, job.base.origin, config.keep_checkpoints)
    trainer = PairTrainer(
        scored,
        job.max_tokens,
        config.label_smoothing,
        config.center_coefficient,
        args=TrlRewardConfig(
            output_dir=str(run.checkpoints),
            num_train_epochs=config.num_epochs,
            per_device_train_batch_size=job.batch_groups // job.num_processes,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(config.warmup_fraction * job.steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            data_seed=config.seed,
            max_length=None,  # rows are cut already
            activation_checkpointing=config.gradient_checkpointing,
            bf16=False,  # the base has its dtype; adapters are float32 over it
            use_cpu=job.base.model.device.type == "cpu",
            eval_strategy="steps" if job.valid else "no",
            eval_steps=every if job.valid else None,
            save_strategy="steps",
            save_steps=job.steps,  # and where SaveAt says
            save_total_limit=None,  # RunLog removes old ones, once a new one is whole
            logging_steps=max(1, job.steps // 200),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            report_to=["wandb"] if config.wandb.project else [],
            run_name=config.wandb.name or run.path.name,
            dataloader_pin_memory=job.base.model.device.type != "cpu",
            disable_tqdm=True,
        ),
        train_dataset=_dataset(job.train.groups),
        eval_dataset=_dataset(job.valid.groups) if job.valid else None,
        processing_class=job.base.tokenizer,
        callbacks=[stopper, log, SaveAt(saved)],
    )
    trainer.add_callback(KeptTokenCount(trainer))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if sys.stderr.isatty() and trainer.is_world_process_zero():
        trainer.add_callback(ProgressBar(Console(stderr=True)))
    return trainer


def _dataset(groups: Sequence[Group]) -> Dataset:
    return Dataset.from_list([as_row(group) for group in groups])

"""Learning from judged answers without sampling: DPO on pairs, KTO on single answers, by TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from data.adapter_checks import check_adapter
from data.errors import ConfigError
from rlhf import held_out
from rlhf.judged_rows import Rows, mean_tokens, read_judged, read_pairs
from rlhf.reward_model import read_head
from rlhf.trl_config import DpoConfig, KtoConfig
from rlhf.trl_run import Steps, arguments, callbacks, plan_steps, start_policy, train_policy
from train.base_model import Base, load_base
from train.callbacks import KeptTokenCount, Stopper
from train.run import RunFolder

JUDGING = frozenset({"eval_prompts", "max_new_tokens", "reward_model"})  # after the last step


@dataclass
class OfflineRun:
    """Everything that a run needs before its first step; rows are rendered."""

    config: DpoConfig | KtoConfig
    base: Base
    train: Rows
    valid: Rows
    steps: Steps
    warnings: list[str]


def set_up(config: DpoConfig | KtoConfig) -> OfflineRun:
    """Load and check everything.

    Raises:
        ToolkitError: The base is unavailable, or the rows cannot be used.
    """
    base = load_base(config)
    if config.reward_model is not None:  # what is wrong with it is told now
        read_head(config.reward_model, base.fingerprint)
        check_adapter(config.reward_model, base.fingerprint)
    if isinstance(config, DpoConfig):
        train, valid, warnings = read_pairs(config, base)
    else:
        train, valid, warnings = read_judged(config, base)
        train = _shuffled(train, config.seed)  # TRL takes them in order
    warnings += _check_room(config, base, valid)
    pairs = 2 if isinstance(config, DpoConfig) else 1
    mean = sum(mean_tokens(row) for row in train) / len(train)
    total = config.num_epochs * math.ceil(len(train) / config.batch_size)
    least = 1 if isinstance(config, DpoConfig) else 2  # KTO's KL needs a mismatched answer
    steps = plan_steps(config, total, pairs * mean, base.model.device.type, least)
    return OfflineRun(config, base, train, valid, steps, warnings)


def _check_room(config: DpoConfig | KtoConfig, base: Base, valid: Rows) -> list[str]:
    """Return what to warn of where nothing is held out, or no held-out prompt can be answered.

    Raises:
        ConfigError: A reward model was to compare the answers.
    """
    if not valid and not config.validation_fraction:
        return []  # as it was asked for
    if not valid:
        told = (
            "too few decided rows to hold any out, so the model is not judged; give more rows, a "
            "larger validation_fraction, or a validation_file"
        )
    elif config.eval_prompts and not held_out.prompts_of(valid, 1, config.max_new_tokens, base):
        told = (
            f"no held-out prompt leaves room for max_new_tokens ({config.max_new_tokens}) in the "
            f"{base.context_length} tokens that {base.name} reads, so no answers are compared; "
            "lower it"
        )
    else:
        return []
    if config.reward_model is not None:
        raise ConfigError([told])
    return [told]


def train(
    job: OfflineRun, run: RunFolder, stopper: Stopper, checkpoint: Path | None
) -> dict[str, Any] | None:
    """Train; returns the outcome, or None when told to stop."""
    config, base = job.config, job.base
    common = arguments(config, base, run, job.steps, bool(job.valid))
    common |= {"max_length": None, "per_device_eval_batch_size": job.steps.micro_rows}
    model = start_policy(config, base)
    parts: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(job.train),
        "eval_dataset": _dataset(job.valid) if job.valid else None,
        "processing_class": base.tokenizer,
        "callbacks": callbacks(run, base, config, stopper, job.steps),
    }
    trainer: DPOTrainer | KTOTrainer
    if isinstance(config, DpoConfig):
        trainer = RenderedDpo(
            args=DPOConfig(
                beta=config.beta,
                loss_type=[config.loss_type],
                label_smoothing=config.label_smoothing,
                **common,
            ),
            **parts,
        )
    else:
        trainer = RenderedKto(
            args=KTOConfig(
                beta=config.beta,
                desirable_weight=config.desirable_weight,
                undesirable_weight=config.undesirable_weight,
                train_sampling_strategy="sequential",  # the KL's answers are those of the batch
                **common,
            ),
            **parts,
        )
    trainer.add_callback(KeptTokenCount(trainer))
    rows = [
        row["prompt_ids"] + row.get("chosen_ids", row.get("completion_ids")) for row in job.train
    ]
    method = "DPO" if isinstance(config, DpoConfig) else "KTO"

    def judge() -> dict[str, Any]:
        return held_out.judge(config, base, model, job.valid, run, job.steps.total)

    return train_policy(*(trainer, config, base, run, stopper, checkpoint, method, rows[:3], judge))


def _dataset(rows: Rows) -> Dataset:
    return Dataset.from_list(
        [{name: value for name, value in row.items() if name != "line"} for row in rows]
    )


class RenderedDpo(DPOTrainer):
    """DPOTrainer on rows of prompt_ids, chosen_ids and rejected_ids, rendered as hone serves."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class RenderedKto(KTOTrainer):
    """KTOTrainer on rows of prompt_ids, completion_ids, label and KL_completion_ids."""

    def _prepare_dataset(self, dataset: Any, _: Any, args: KTOConfig, *__: Any) -> Any:
        size = args.per_device_train_batch_size
        ids = dataset["completion_ids"]
        mismatched = [
            ids[start + (index - 1) % (min(start + size, len(ids)) - start)]
            for start in range(0, len(ids), size)
            for index in range(min(size, len(ids) - start))
        ]
        return dataset.add_column("KL_completion_ids", mismatched)


def _shuffled(rows: Rows, seed: int) -> Rows:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[index] for index in order]

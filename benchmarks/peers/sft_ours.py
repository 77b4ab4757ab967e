"""`train.sft` for `benchmarks/training.py`; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from sft_common import Clock, peak, report, start_alike, words

from train import trainer
from train.batches import LengthGroupedSampler
from train.callbacks import Stopper
from train.config import SftConfig
from train.prepare import TrainingJob, prepare
from train.run import RunFolder
from train.sft_trainer import ROUND, cut_batch


def main() -> None:
    given = words().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(given, Path(scratch))))


def settings(given: argparse.Namespace, folder: Path, num_epochs: int) -> SftConfig:
    return SftConfig.model_validate(
        {
            "base_model": "smollm2-135m-instruct",
            "models_dir": given.models_dir,
            "train_file": given.rows,
            "output_dir": folder / "run",
            "batch_size": given.batch,
            "num_epochs": num_epochs,
            "learning_rate": given.learning_rate,
            "lr_scheduler": "constant",
            "warmup_fraction": 0.0,
            "dtype": given.dtype,
            "threads": given.threads,
            "lora": {"r": 16, "alpha": 32},
            "device": "cpu",
            "min_examples": 1,
        }
    )


def batches(job: TrainingJob, batch: int) -> list[list[int]]:
    """Return the rows of each step, in the run's order."""
    sampler = LengthGroupedSampler(job.train.examples.lengths, batch, job.config.seed)
    found = []
    for epoch in range(job.plan.num_epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        found += [order[start : start + batch] for start in range(0, len(order), batch)]
    return found


def measure(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    rows = sum(1 for line in given.rows.open() if line.strip())
    job = prepare(settings(given, folder, math.ceil(given.steps * given.batch / rows)))
    run = RunFolder(job.config.output_dir)
    run.prepare()
    clock = Clock()
    made = trainer._make_trainer(job, run, Stopper())
    made.args.max_steps, made.args.logging_steps = given.steps, 1
    made.add_callback(clock)
    start_alike(made.model)
    loaded = peak()
    made.train()
    lengths, padded = [], []
    for step in batches(job, given.batch)[: given.steps]:
        real = [len(job.train.examples[index]) for index in step]
        lengths.append(real)
        mask = torch.arange(max(real) + -max(real) % ROUND)[None] < torch.tensor(real)[:, None]
        parts = cut_batch(
            {"attention_mask": mask.long()}, job.plan.micro_batch_size, job.plan.micro_batch_tokens
        )
        padded.append(sum(part["attention_mask"].numel() for part in parts))
    return report(clock, lengths, padded, loaded, str(job.base.model.dtype))


if __name__ == "__main__":
    sys.exit(main())

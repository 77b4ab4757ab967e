"""TRL's SFTTrainer as it comes for `benchmarks/training.py`; prints one JSON object.

The rows are those that hone renders, so both learn the same tokens; with `--order given` they come
in hone's order.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from sft_common import Clock, peak, report, start_alike, words
from sft_ours import batches, settings
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from data.render import IGNORED
from train.prepare import prepare


def main() -> None:
    parser = words()
    parser.add_argument("--order", choices=["random", "given"], required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rows = sum(1 for line in given.rows.open() if line.strip())
        epochs = math.ceil(given.steps * given.batch / rows)
        job = prepare(settings(given, Path(scratch), epochs))
        order = [index for step in batches(job, given.batch) for index in step]
        examples = [job.train.examples[index] for index in order]
        columns = {
            "input_ids": [list(example.input_ids) for example in examples],
            "completion_mask": [
                [int(label != IGNORED) for label in example.labels] for example in examples
            ],
        }
        clock = Clock()
        seen: list[list[int]] = []
        padded: list[int] = []
        trainer = SFTTrainer(
            model=job.base.model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=given.steps,
                per_device_train_batch_size=given.batch,
                learning_rate=given.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=job.config.max_grad_norm,
                weight_decay=job.config.weight_decay,
                completion_only_loss=True,
                train_sampling_strategy="random" if given.order == "random" else "sequential",
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(columns),
            processing_class=job.base.tokenizer,
            peft_config=LoraConfig(
                r=16,
                lora_alpha=32,
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        start_alike(trainer.model)
        collate = trainer.data_collator

        def note(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            batch: dict[str, torch.Tensor] = collate(features)
            seen.append([len(feature["input_ids"]) for feature in features])
            padded.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = note
        loaded = peak()
        trainer.train()
        told = (seen[: given.steps], padded[: given.steps], loaded, str(job.base.model.dtype))
        print(json.dumps(report(clock, *told)))


if __name__ == "__main__":
    sys.exit(main())

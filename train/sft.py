"""Supervised fine-tuning of one LoRA adapter, on plain paths, with no server and no database.

    accelerate launch -m train.sft --config configs/sft/support-intents.yaml output_dir=runs/a

Reads YAML and `key=value` words (`train.config.SftConfig`), writes a run folder (`train.run`):
`adapter/` is a plain PEFT folder. The same command on the same folder resumes an unfinished run
from its newest whole checkpoint and gives the same adapter, bit for bit (CPU, float32, one
process). TRL's SFTTrainer with PEFT does the training.

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.command import (
    COMPARED,
    FREE_TO_CHANGE,
    STOPPED,
    adapter_facts,
    as_yaml,
    is_main_process,
    provenance,
    refuse_other_data,
    refuse_other_settings,
    run_command,
)
from train.config import SftConfig
from train.run import RunFolder, step_of, write_json

if TYPE_CHECKING:
    from train.base_model import Base
    from train.callbacks import Stopper
    from train.together import Seat


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("train.sft", __doc__ or "", SftConfig, _run, arguments, _add_options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show-tokens", type=int, metavar="N", help="print the tokens of N rows as trained, stop"
    )


def _run(config: SftConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from train import prepare, trainer  # torch, transformers and TRL take seconds to import

    if not (options.show_tokens or options.dry_run):
        stopper = trainer.take_signals()
        status = run_one(config, run, stopper)
        stopper.settle()
        return status
    trainer.take_signals()
    job = prepare.prepare(config)
    if options.show_tokens:
        prepare.show_tokens(job, options.show_tokens)
        return 0
    resolved = provenance(config, job.plan, **job.facts)
    estimate = trainer.estimate(job)
    if is_main_process():
        print(as_yaml({**resolved, "warnings": job.warnings, "estimate": estimate}))
    return 0


def run_one(
    config: SftConfig,
    run: RunFolder,
    stopper: Stopper,
    base: Base | None = None,
    seat: Seat | None = None,
) -> int:
    """Train from the start or the newest checkpoint to the end; returns the exit status.

    Of several processes the first alone writes into the folder and tells.

    Args:
        base: The base model of the settings, where it is loaded already.
        seat: Where the run takes its turns with others on the same base, if it does.
    """
    from train import prepare, trainer

    refuse_other_settings(config, run, FREE_TO_CHANGE | COMPARED)
    job = prepare.prepare(config, run.tokens, base)
    facts = job.facts | adapter_facts(config)
    refuse_other_data(config, run, facts)
    resolved = provenance(config, job.plan, **facts)
    checkpoint = run.newest_checkpoint()
    if is_main_process():
        run.prepare()
        run.trim_logs(step_of(checkpoint) if checkpoint else -1)
        write_json(run.resolved, resolved)
        for message in job.warnings if checkpoint is None else ():  # a resumed run has told them
            run.tell(message, level="warn")
            print(f"{run.path}: warning: {message}", file=sys.stderr)
    run.begin(checkpoint)
    outcome = trainer.train(job, run, stopper, checkpoint, seat)
    if not is_main_process():  # the first still saves and checks the adapter
        return STOPPED if outcome is None else 0
    if outcome is None:
        print(f"stopped; the same command resumes from {run.newest_checkpoint()}", file=sys.stderr)
        return STOPPED
    write_json(
        run.result,
        {
            "status": "succeeded",
            "hyperparameters": job.plan.model_dump(),
            "seconds": run.seconds,
            **outcome,
        },
    )
    shutil.rmtree(run.tokens, ignore_errors=True)
    print(f"the adapter is {run.adapter}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

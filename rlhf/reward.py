"""A reward model from human comparisons: a LoRA adapter and a score head on the base.

Usable with no server and no database:

    accelerate launch -m rlhf.reward --config configs/reward/helpful.yaml output_dir=runs/reward

Reads YAML and `key=value` words (`rlhf.config.RewardConfig`), writes a run folder (`train.run`):
`adapter/` is a PEFT folder with `head.safetensors` and `reward.json` beside the adapter;
`report_card.json` and `report.html` tell what it is worth on held-out prompts. The same command on
the same folder resumes an unfinished run. TRL's RewardTrainer with PEFT does the training.

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.config import RewardConfig
from train.command import (
    STOPPED,
    as_yaml,
    data_facts,
    is_main_process,
    provenance,
    refuse_other_data,
    refuse_other_settings,
    run_command,
)
from train.run import RunFolder, step_of, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("rlhf.reward", __doc__ or "", RewardConfig, _run, arguments)


def _run(config: RewardConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from rlhf import reward_run  # torch, transformers and TRL take seconds to import
    from train.callbacks import Stopper

    if not options.dry_run:
        refuse_other_settings(config, run)
    stopper = Stopper()
    stopper.install()
    job = reward_run.set_up(config)
    facts = {
        "base": {
            "name": job.base.name,
            "fingerprint": job.base.fingerprint,
            "dtype": str(job.base.model.dtype),
        },
        "train_pairs": job.train.num_pairs,
        "train_prompts": len(job.train.groups),
        "valid_pairs": job.valid.num_pairs if job.valid else 0,
        "prompts_a_step": job.batch_groups,
        "steps": job.steps,
    }
    facts |= data_facts(config)
    refuse_other_data(config, run, facts)
    if options.dry_run:
        print(as_yaml(provenance(config, None, **facts)))
        return 0
    is_main = is_main_process()
    checkpoint = run.newest_checkpoint()
    if is_main:
        run.prepare()
        run.trim_logs(step_of(checkpoint) if checkpoint else -1)
        write_json(run.resolved, provenance(config, None, **facts))
        for message in job.warnings if checkpoint is None else ():
            run.tell(message, level="warn")
    run.begin(checkpoint)
    outcome = reward_run.train(job, run, stopper, checkpoint)
    if outcome is None:
        print(f"stopped; the same command resumes from {run.newest_checkpoint()}", file=sys.stderr)
        return STOPPED
    if is_main:
        write_json(run.result, {"status": "succeeded", "seconds": run.seconds, **outcome})
        print(f"the reward model is {run.adapter}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

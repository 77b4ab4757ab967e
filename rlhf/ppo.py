"""PPO from a reward model, a Python function, a URL or a grader, on one base.

Usable with no server and no database:

    accelerate launch -m rlhf.ppo --config configs/ppo/helpful.yaml output_dir=runs/ppo

Reads YAML and `key=value` words (`rlhf.ppo_config.PpoConfig`), writes a run folder (`train.run`):
`adapter/` is a plain PEFT folder of the policy. Policy, reference, value and reward are adapters of
one frozen base. The same command on the same folder resumes an unfinished run from its newest whole
checkpoint and gives the same adapter, bit for bit (CPU, float32).

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.ppo_config import PpoConfig
from train.command import (
    STOPPED,
    as_yaml,
    data_facts,
    provenance,
    refuse_other_data,
    refuse_other_settings,
    run_command,
)
from train.run import RunFolder, step_of, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("rlhf.ppo", __doc__ or "", PpoConfig, _run, arguments)


def _run(config: PpoConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from rlhf import ppo_setup  # torch, transformers and PEFT take seconds to import
    from rlhf.ppo_trainer import PpoTrainer
    from rlhf.report import write_report
    from train.callbacks import Stopper

    if not options.dry_run:
        refuse_other_settings(config, run)
    stopper = Stopper()
    stopper.install()
    job = ppo_setup.set_up(config)
    try:
        facts = {
            "base": {
                "name": job.base.name,
                "fingerprint": job.base.fingerprint,
                "dtype": str(job.base.model.dtype),
            },
            "prompts": len(job.prompts),
            "eval_prompts": len(job.eval_prompts),
            "updates": config.num_updates,
            "processes": job.team.size,
        }
        facts |= data_facts(config)
        refuse_other_data(config, run, facts)
        if options.dry_run:
            print(as_yaml(provenance(config, None, **facts)))
            return 0
        checkpoint = run.newest_checkpoint()
        if job.team.is_main:
            run.prepare()
            run.trim_logs(step_of(checkpoint) if checkpoint else -1)
            write_json(run.resolved, provenance(config, None, **facts))
            if checkpoint is None:
                for message in job.warnings:
                    run.tell(message, level="warn")
        run.begin(checkpoint)
        outcome = PpoTrainer(job, run, stopper).train(checkpoint)
        if outcome is None:
            newest = run.newest_checkpoint()
            print(f"stopped; the same command resumes from {newest}", file=sys.stderr)
            return STOPPED
        if job.team.is_main:
            write_report(run, config, outcome)
            write_json(run.result, {"status": "succeeded", "seconds": run.seconds, **outcome})
            print(f"the adapter is {run.adapter}", file=sys.stderr)
    finally:
        job.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

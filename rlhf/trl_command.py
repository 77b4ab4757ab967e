"""The command of a run by one of TRL's trainers."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from train.command import (
    ADAPTERS,
    FREE_TO_CHANGE,
    STOPPED,
    as_yaml,
    data_facts,
    is_main_process,
    provenance,
    refuse_other_data,
    refuse_other_settings,
)
from train.run import RunFolder, step_of, write_json


def execute(module: Any, config: Any, run: RunFolder, options: argparse.Namespace) -> int:
    """Set up, train and write the result; returns the exit status.

    Args:
        module: `rlhf.offline_run` or `rlhf.group_run`: its `set_up` and `train`, and the settings,
            JUDGING, that change nothing of what is learned.
    """
    from rlhf.report import write_report
    from train.callbacks import Stopper

    if not options.dry_run:
        refuse_other_settings(config, run, FREE_TO_CHANGE | module.JUDGING)
    stopper = Stopper()
    stopper.install()
    job = module.set_up(config)
    is_main = is_main_process()
    try:
        base = job.base
        facts = {
            "base": {
                "name": base.name,
                "fingerprint": base.fingerprint,
                "dtype": str(base.model.dtype),
            },
            "steps": job.steps.total,
            "rows_at_once": job.steps.micro_rows,
            "rows": len(job.train) if hasattr(job, "train") else len(job.prompts),
        }
        facts |= data_facts(config)
        judging = {part for part, setting in ADAPTERS.items() if setting in module.JUDGING}
        learned = {name: fact for name, fact in facts.items() if name not in judging}
        refuse_other_data(config, run, learned)
        resolved = provenance(config, None, **facts)
        if options.dry_run:
            print(as_yaml(resolved))
            return 0
        checkpoint = run.newest_checkpoint()
        if is_main:
            run.prepare()
            run.trim_logs(step_of(checkpoint) if checkpoint else -1)
            write_json(run.resolved, resolved)
            for message in job.warnings if checkpoint is None else ():
                run.tell(message, level="warn")
        run.begin(checkpoint)
        outcome = module.train(job, run, stopper, checkpoint)
        if outcome is None:
            newest = run.newest_checkpoint()
            print(f"stopped; the same command resumes from {newest}", file=sys.stderr)
            return STOPPED
        if is_main:
            write_report(run, config, outcome)
            write_json(run.result, {"status": "succeeded", "seconds": run.seconds, **outcome})
            print(f"the adapter is {run.adapter}", file=sys.stderr)
    finally:
        if hasattr(job, "close"):
            job.close()
    return 0

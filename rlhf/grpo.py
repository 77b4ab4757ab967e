"""Group relative policy optimisation of a LoRA adapter, from any source of rewards.

Usable with no server and no database:

    accelerate launch -m rlhf.grpo --config configs/grpo/rule.yaml output_dir=runs/grpo

Reads YAML and `key=value` words (`rlhf.trl_config.GrpoConfig`), writes a run folder (`train.run`):
`adapter/` is a plain PEFT folder. The same command on the same folder resumes an unfinished run
from its newest whole checkpoint. TRL's GRPOTrainer with PEFT does the training.

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.trl_config import GrpoConfig
from train.command import run_command
from train.run import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("rlhf.grpo", __doc__ or "", GrpoConfig, _run, arguments)


def _run(config: GrpoConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from rlhf import group_run  # torch, transformers and TRL take seconds to import
    from rlhf.trl_command import execute

    return execute(group_run, config, run, options)


if __name__ == "__main__":
    sys.exit(main())

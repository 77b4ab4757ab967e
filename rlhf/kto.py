"""Kahneman-Tversky optimisation of a LoRA adapter on good and bad answers.

Usable with no server and no database:

    accelerate launch -m rlhf.kto --config configs/kto/thumbs.yaml output_dir=runs/kto

Reads YAML and `key=value` words (`rlhf.trl_config.KtoConfig`), writes a run folder (`train.run`):
`adapter/` is a plain PEFT folder. The same command on the same folder resumes an unfinished run
from its newest whole checkpoint. TRL's KTOTrainer with PEFT does the training.

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlhf.trl_config import KtoConfig
from train.command import run_command
from train.run import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("rlhf.kto", __doc__ or "", KtoConfig, _run, arguments)


def _run(config: KtoConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from rlhf import offline_run  # torch, transformers and TRL take seconds to import
    from rlhf.trl_command import execute

    return execute(offline_run, config, run, options)


if __name__ == "__main__":
    sys.exit(main())

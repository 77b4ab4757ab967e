"""Supervised fine-tuning of several adapters at once, on one base that is loaded once.

    accelerate launch -m train.many --config a.yaml b.yaml runs/c threads=2

Each --config is the configuration of a run of `train.sft`, or a run's folder that holds it as
`config.yaml`; `key=value` words go to all of them. Every run has its own data, shape, schedule,
seed and folder, and leaves in it what `train.sft` would. Rows of all runs pass the frozen base
together (`train.together`), up to --max-tokens at a time; a run's numbers are those that it would
have alone, but for the rounding of matrix products of another height (0 tokens: none at all).

The runs must agree on base_model, models_dir, dtype, load_in_4bit, device and threads. One that
fails leaves its `error.json` and the others go on. The same command resumes what is unfinished; so
does `train.sft` for one of them.

Exit status: 0 all done, 2 wrong input, 143 stopped by a signal (resumable), else that of the first
run that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import ConfigError, ToolkitError
from data.settings import read_config
from train.command import STOPPED, report_failure, tell_finished
from train.config import CPU_MICRO_BATCH_TOKENS, GPU_MICRO_BATCH_TOKENS, SftConfig
from train.devices import with_one_gpu
from train.run import RunFolder
from train.sft import run_one

if TYPE_CHECKING:
    from train.base_model import Base
    from train.callbacks import Stopper
    from train.together import Seat

MODULE = "train.many"
SHARED = ("base_model", "models_dir", "dtype", "load_in_4bit", "device", "threads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        configs = [read_config(SftConfig, _file(path), options.words) for path in options.config]
        check_together(configs)
        statuses = run_many(configs, options.max_tokens)
    except ToolkitError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([outcome_of(config.output_dir) for config in configs], indent=2))
    failed = [status for status in statuses if status]
    return STOPPED if STOPPED in failed else next(iter(failed), 0)


def check_together(configs: Sequence[SftConfig]) -> None:
    """Raise ConfigError, with all problems, where runs cannot share a process."""
    problems = []
    first = configs[0]
    folders: dict[Path, int] = {}
    for number, config in enumerate(configs, 1):
        for name in SHARED:
            value, other = getattr(config, name), getattr(first, name)
            if value != other:
                problems.append(
                    f"{name} of run {number} is {value}, but {other} of run 1; runs at once share "
                    "one loaded base, so give all the same"
                )
        other_run = folders.setdefault(config.output_dir.resolve(), number)
        if other_run != number:
            problems.append(
                f"runs {other_run} and {number} have the same output_dir, {config.output_dir}; "
                "give each its own"
            )
        if config.lora.use_dora:
            problems.append(
                f"run {number} asks lora.use_dora, which ends in a merged base of its own; train "
                "it alone by train.sft"
            )
        if config.wandb.project and len(configs) > 1:
            problems.append(
                f"run {number} names wandb.project, and a process logs one run there; train it "
                "alone by train.sft"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append(
            f"{os.environ['WORLD_SIZE']} processes were launched; runs at once share one process: "
            "launch it with --num_processes 1"
        )
    if problems:
        raise ConfigError(problems)


def run_many(configs: Sequence[SftConfig], max_tokens: int | None = None) -> list[int]:
    """Train all runs that are not finished; returns the exit status of each.

    A run that is finished is left alone; asked for with other settings, its status is 2.

    Args:
        configs: Checked by `check_together`.
        max_tokens: Of a joint pass through the base; by default what `auto` gives a single run.

    Raises:
        ConfigError: There is no such base.
        ModelUnavailable: It can be neither fetched nor read.
    """
    runs = [RunFolder(config.output_dir) for config in configs]
    todo = [index for index, run in enumerate(runs) if not run.result.exists()]
    statuses = [0] * len(runs)
    for index in set(range(len(runs))) - set(todo):
        statuses[index] = tell_finished("train.many", configs[index], runs[index])
    if not todo:
        return statuses
    device = with_one_gpu(configs[0]).device
    configs = [config.model_copy(update={"device": device}) for config in configs]
    from train.base_model import load_base
    from train.memory import share_one_heap
    from train.together import Seat, Together
    from train.trainer import take_signals

    share_one_heap()
    stopper = take_signals()
    base = load_base(configs[0])
    if max_tokens is None:
        on_cpu = base.model.device.type == "cpu"
        max_tokens = CPU_MICRO_BATCH_TOKENS if on_cpu else GPU_MICRO_BATCH_TOKENS
    seats = [
        Seat(runs[index].path.name, partial(_work, configs[index], runs[index], stopper, base))
        for index in todo
    ]
    for index, status in zip(todo, Together(max_tokens).run(seats), strict=True):
        statuses[index] = 1 if status is None else status  # None: something ended its thread
    stopper.settle()
    return statuses


def outcome_of(folder: Path) -> dict[str, Any]:
    """Return what a run's folder tells of its end: `run`, `status`, and the result or the error."""
    run = RunFolder(folder)
    for path, status in ((run.result, "succeeded"), (run.error, "failed")):
        if path.exists():
            return {"run": str(folder), "status": status, **json.loads(path.read_text("utf-8"))}
    return {"run": str(folder), "status": "unfinished"}


def _work(config: SftConfig, run: RunFolder, stopper: Stopper, base: Base, seat: Seat) -> int:
    from train.together import share

    try:
        status = run_one(config, run, stopper, share(base), seat)
    except Exception as error:  # noqa: BLE001 - a run's failure is told in its folder
        return report_failure(f"{MODULE}: {run.path}", error, run)
    steps = ", ".join(f"{count} {how}" for how, count in seat.passes.items())
    print(f"{run.path}: parts of steps through the base: {steps}", file=sys.stderr)
    return status


def _file(path: Path) -> Path:
    return path / "config.yaml" if path.is_dir() else path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings: those of `python -m train.sft --help`",
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="override settings of all")
    parser.add_argument(
        "--config", type=Path, nargs="+", required=True, metavar="PATH", help="YAML or run folder"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"of a joint pass; default {CPU_MICRO_BATCH_TOKENS} on a CPU, "
        f"{GPU_MICRO_BATCH_TOKENS} on a GPU; 0 computes each run's rows alone",
    )
    parser.add_argument("--json", action="store_true", help="print what came of each run")
    return parser


if __name__ == "__main__":
    sys.exit(main())

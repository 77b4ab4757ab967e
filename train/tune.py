"""A small sweep: several adapters from one file, at once on one base, ranked by validation loss.

    accelerate launch -m train.tune train_file=train.jsonl output_dir=runs/sweep \\
        learning_rate=3e-4,1e-3,3e-3 lora.r=8,32 num_epochs=3

`key=a,b,c` is an axis of the grid; other words go to all trials (settings of `train.sft`). Without
an axis six trials are made: learning_rate_multiplier 0.3, 1, 3 by lora.r 8, 32. Without a
validation_file a tenth of the rows is held out, the same for all trials. Every trial is evaluated 8
times, stops after 3 evaluations without gain, and stands for its best checkpoint.

The folder holds the run of each trial (`train.many`), `adapter/` (the best, a plain PEFT folder)
and `tune.json`: the ranking, `job`, what a fine-tuning job takes beside its model and files to
train as the best trial did, and `not_for_jobs`, settings that a job does not have. The same command
resumes an unfinished sweep of the same files.

Exit status: as that of `train.many`; 0 where at least one trial has a result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from data.errors import ToolkitError
from train.command import STOPPED
from train.many import check_together, run_many
from train.sweep import AXES, plan_sweep

MODULE = "train.tune"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        sweep = plan_sweep(options.words, options.trials, options.sample_seed)
        check_together(sweep.configs)
        sweep.begin()
        print(f"{len(sweep.configs)} trials in {sweep.folder}", file=sys.stderr)
        statuses = run_many(sweep.configs, options.max_tokens)
    except ToolkitError as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return 2
    if STOPPED in statuses:
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    result = sweep.finish()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, sweep.axes)
    return 0 if result["best"] else max(statuses)


def show(result: Mapping[str, Any], axes: Sequence[str]) -> None:
    """Print the ranking as a table, and what to do with it."""
    table = Table(box=None, pad_edge=False)
    for name in ("", *axes, "validation loss", "best step", "of", "training loss", "trial"):
        table.add_column(name, overflow="fold")
    for place, trial in enumerate(result["trials"], 1):
        values = [trial["settings"][name] for name in axes]
        if trial["valid_loss"] is None:
            cells = [trial["status"], "", "", ""]
        else:
            losses = [f"{trial[name]:.4f}" for name in ("valid_loss", "train_loss")]
            cells = [losses[0], str(trial["best_step"]), str(trial["steps"]), losses[1]]
        table.add_row(str(place), *values, *cells, str(trial["trial"]))
    console = Console()
    console.print(table, markup=False)
    for trial in result["trials"]:
        if trial["message"]:
            console.print(f"trial {trial['trial']}: {trial['message']}", markup=False)
    best = result["best"]
    if best is None:
        console.print("No trial has a result.")
        return
    job = json.dumps(result["job"])
    console.print(f"best: trial {best['trial']}, its adapter is {result['adapter']}", markup=False)
    console.print(f"as a job: {job}", markup=False, soft_wrap=True)
    lost = ", ".join(f"{name}={json.dumps(v)}" for name, v in result["not_for_jobs"].items())
    if lost:
        console.print(f"does not carry over: {lost}", markup=False, soft_wrap=True)
    if "early_stopping" in result["not_for_jobs"]:
        console.print("(a job stops early only with a validation_file, which this sweep had not)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"axes: {', '.join(AXES)}\nsettings: those of `python -m train.sft --help`",
    )
    parser.add_argument("words", nargs="+", metavar="key=value", help="settings and axes")
    parser.add_argument(
        "--trials", type=_positive, metavar="N", help="try N combinations at random, not all"
    )
    parser.add_argument(
        "--sample-seed", type=int, default=0, metavar="N", help="of that choice; default 0"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a joint pass; as for train.many"
    )
    parser.add_argument("--json", action="store_true", help="print tune.json instead of a table")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of trials; give 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

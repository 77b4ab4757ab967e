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
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import ConfigError, InvalidInput, ModelUnavailable, ToolkitError, TrainingFailed
from data.settings import StrictModel, read_config
from train.config import Plan, SftConfig
from train.run import RunFolder, is_disk_full, step_of, write_json

STOPPED, DISK_FULL = 143, 74
FREE_TO_CHANGE = {"output_dir", "models_dir", "threads", "wandb", "keep_checkpoints"}
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = read_config(SftConfig, options.config, options.words)
    except ToolkitError as error:
        print(f"train.sft: {error}", file=sys.stderr)
        return 2
    run = RunFolder(config.output_dir)
    try:
        return _run(config, run, options)
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a status
        return _report(error, run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.sft",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n" + "\n".join(_settings_help()),
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="override settings")
    parser.add_argument("--config", type=Path, help="YAML with settings; see configs/sft")
    parser.add_argument(
        "--dry-run", action="store_true", help="check data and settings, print plan and time, stop"
    )
    parser.add_argument(
        "--show-tokens", type=int, metavar="N", help="print the tokens of N rows as trained, stop"
    )
    return parser


def _settings_help(model: type[StrictModel] = SftConfig, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
            yield from _settings_help(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else f"default {field.default}"
            yield f"  {prefix + name:26} {field.description or ''} ({default})"


def _run(config: SftConfig, run: RunFolder, options: argparse.Namespace) -> int:
    from train import prepare, trainer  # torch, transformers and TRL take seconds to import

    if run.result.exists():
        print(f"{run.path} holds a finished run; give another output_dir", file=sys.stderr)
        return 0
    if not (options.show_tokens or options.dry_run):
        _refuse_other_settings(config, run)
    stopper = trainer.take_signals()
    job = prepare.prepare(config)
    if options.show_tokens:
        prepare.show_tokens(job, options.show_tokens)
        return 0
    resolved = _resolved(config, job.plan, job.facts)
    if options.dry_run:
        print(_as_text({**resolved, "estimate": trainer.estimate(job)}))
        return 0
    run.prepare()
    checkpoint = run.newest_checkpoint()
    run.trim_logs(step_of(checkpoint) if checkpoint else -1)
    write_json(run.resolved, resolved)
    if checkpoint is None:  # a resumed run has told them
        for message in job.warnings:
            run.tell(message, level="warn")
    started = time.monotonic()
    outcome = trainer.train(job, run, stopper, checkpoint)
    if outcome is None:
        print(f"stopped; the same command resumes from {run.newest_checkpoint()}", file=sys.stderr)
        return STOPPED
    write_json(
        run.result,
        {
            "status": "succeeded",
            "hyperparameters": job.plan.model_dump(),
            "seconds": round(time.monotonic() - started, 1),
            **outcome,
        },
    )
    print(f"the adapter is {run.adapter}", file=sys.stderr)
    return 0


def _refuse_other_settings(config: SftConfig, run: RunFolder) -> None:
    """Resuming must not mix two runs: what decides the result has to be as it was."""
    if run.newest_checkpoint() is None or not run.resolved.exists():
        return
    began = json.loads(run.resolved.read_text("utf-8"))["config"]
    problems = [
        f"{name} is {value!r}, but the unfinished run in {run.path} began with "
        f"{began[name]!r}; keep it, or give another output_dir"
        for name, value in config.model_dump(mode="json").items()
        if name not in FREE_TO_CHANGE and began.get(name, value) != value
    ]
    if problems:
        raise ConfigError(problems)


def _resolved(config: SftConfig, plan: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "plan": plan.model_dump(),
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of hone's own checkout, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() or None


def _as_text(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False).rstrip()


def _report(error: Exception, run: RunFolder) -> int:
    """Tell what stopped the run, in the folder where possible and on stderr always."""
    import traceback

    if is_disk_full(error, _existing(run.path)):
        code, status = "disk_full", DISK_FULL
        message = f"The disk of {run.path} is full ({error}); free some space and start again"
    elif isinstance(error, ToolkitError):
        code, message = error.code or "training_failed", error.message
        wrong_input = isinstance(error, InvalidInput | ModelUnavailable)
        status = 2 if wrong_input and not isinstance(error, TrainingFailed) else 1
    else:
        code, status = "internal_error", 1
        message = f"{type(error).__name__}: {error}"
        traceback.print_exception(error)
    print(f"train.sft: {message}", file=sys.stderr)
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.error, {"code": code, "message": message})
        except OSError as failure:
            print(f"train.sft: {run.error} could not be written: {failure}", file=sys.stderr)
    return status


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


if __name__ == "__main__":
    sys.exit(main())

"""The command line that every trainer has: settings in, a run folder out, an exit status.

Exit status: 0 done, 2 wrong input, 74 disk full, 143 stopped by a signal (resumable), 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.errors import ConfigError, InvalidInput, ModelUnavailable, ToolkitError, TrainingFailed
from data.settings import StrictModel, read_config
from train.config import RunConfig
from train.devices import refuse_shards, with_one_gpu
from train.run import RunFolder, is_disk_full, write_json

STOPPED, DISK_FULL = 143, 74
# Neither of them changes what a run learns, beyond rounding.
FREE_TO_CHANGE = frozenset(
    {
        *("output_dir", "models_dir", "threads", "wandb", "keep_checkpoints"),
        *("micro_batch_tokens", "gradient_checkpointing"),
    }
)
COMPARED = frozenset({"compare_with", "compare_base"})  # with what was learned, at the end
DATA = {  # parts of a run's provenance, and the settings that name their files
    "train_data": "train_file",
    "validation_data": "validation_file",
    "prompts_data": "prompts_file",
    "eval_prompts_data": "eval_prompts_file",
}
# Settings that name the folder of an adapter or a reward model, and parts of provenance likewise.
ADAPTERS = {
    "start_weights": "start_adapter",
    "reward_weights": "reward.model",
    "judge_weights": "reward_model",
}
ADAPTER_PARTS = ("adapter_model.safetensors", "head.safetensors", "reward.json")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
STARTED = time.time()  # of this process
Config = TypeVar("Config", bound=RunConfig)


def run_command(
    module: str,
    about: str,
    config_type: type[Config],
    execute: Callable[[Config, RunFolder, argparse.Namespace], int],
    arguments: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> int:
    """Read settings and run; returns the exit status.

    Args:
        module: Such as "train.sft", for messages.
        about: For `--help`.
        execute: Does the run and returns the exit status; may raise anything.
        add_options: Adds options of this command alone.
    """
    options = _parser(module, about, config_type, add_options).parse_args(arguments)
    try:
        config = with_one_gpu(read_config(config_type, options.config, options.words))
        if not options.dry_run:
            refuse_shards()
    except ToolkitError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    run = RunFolder(config.output_dir)
    try:
        if run.result.exists():
            return tell_finished(module, config, run)
        return execute(config, run, options)
    except Exception as error:  # noqa: BLE001 - the one place that turns any failure into a status
        return report_failure(module, error, run)


def refuse_other_settings(
    config: RunConfig, run: RunFolder, free: Collection[str] = FREE_TO_CHANGE
) -> None:
    """Raise ConfigError if an unfinished run in the folder began with other settings.

    Resuming must not mix two runs: what decides the result has to be as it was.
    """
    if run.newest_checkpoint() is None or not run.resolved.exists():
        return
    problems = [
        f"{name} is {value!r}, but the unfinished run in {run.path} began with {old!r}; keep it, "
        "or give another output_dir"
        for name, value, old in _other_settings(config, run, free)
    ]
    if problems:
        raise ConfigError(problems)


def refuse_other_data(config: RunConfig, run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError if an unfinished run in the folder began with other rows, base or adapters.

    Args:
        facts: `base`, with its fingerprint, and the parts of DATA and ADAPTERS, with their SHA-256,
            of what is there now; `provenance` keeps them for the next time.
    """
    if run.newest_checkpoint() is None or not run.resolved.exists():
        return
    began = json.loads(run.resolved.read_text("utf-8"))
    compared = [(part, "sha256", setting) for part, setting in (DATA | ADAPTERS).items()]
    compared.append(("base", "fingerprint", "base_model"))
    problems = []
    for part, mark, setting in compared:
        old, new = ((kept.get(part) or {}).get(mark) for kept in (began, facts))
        if old is not None and new is not None and old != new:
            # What is held out of the training file is part of that.
            name = setting if _setting(config, setting) is not None else "train_file"
            problems.append(
                f"{name} {_setting(config, name)} has changed since the unfinished run in "
                f"{run.path} began ({mark} was {old[:12]}..., is {new[:12]}...); put back what it "
                "was, or give another output_dir"
            )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def data_facts(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return path and SHA-256 of each data file and adapter that a configuration names, by its part
    of DATA or ADAPTERS."""
    found = {}
    for part, setting in DATA.items():
        path = _setting(config, setting)
        if path is not None:
            found[part] = {"path": str(path), "sha256": _digest(path)}
    return found | adapter_facts(config)


def adapter_facts(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return path and SHA-256 of the adapters that a configuration names, by part of ADAPTERS.

    The SHA-256 is of the digests of ADAPTER_PARTS in turn.
    """
    found = {}
    for part, setting in ADAPTERS.items():
        folder = _setting(config, setting)
        files = [folder / name for name in ADAPTER_PARTS] if folder is not None else []
        there = [file for file in files if file.is_file()]
        if there:
            digests = "".join(_digest(file) for file in there)
            whole = hashlib.sha256(digests.encode()).hexdigest()
            found[part] = {"path": str(folder), "sha256": whole}
    return found


def _setting(config: RunConfig, name: str) -> Any:
    """Return a setting by its dotted name, None where the configuration has no such one."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tell_finished(module: str, config: RunConfig, run: RunFolder) -> int:
    """Say that a folder holds a finished run, and whether it is the one that is asked for.

    Returns:
        The exit status; nothing is written into the folder.
    """
    others = list(_other_settings(config, run, FREE_TO_CHANGE))
    for name, value, old in others:
        print(
            f"{module}: {name} is {value!r}, but the finished run in {run.path} had {old!r}; give "
            "another output_dir, or what it had",
            file=sys.stderr,
        )
    if not others:
        print(f"{run.path} holds a finished run; give another output_dir", file=sys.stderr)
    return 2 if others else 0


def _other_settings(
    config: RunConfig, run: RunFolder, free: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value now and value then of each setting that is not what the run began with."""
    if not run.resolved.exists():
        return
    began = json.loads(run.resolved.read_text("utf-8"))["config"]
    for name, value in config.model_dump(mode="json").items():
        if name not in free and began.get(name, value) != value:
            yield name, value, began[name]


def provenance(config: RunConfig, plan: StrictModel | None, **facts: Any) -> dict[str, Any]:
    """Return what a run keeps of how it came about: `resolved_config.json`."""
    return {
        "config": config.model_dump(mode="json"),
        "plan": plan.model_dump() if plan else None,
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def is_main_process() -> bool:
    """Tell whether this is the only process of a run, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def as_yaml(value: Any) -> str:
    """Return a value as people read it."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False).rstrip()


def _parser(
    module: str,
    about: str,
    config_type: type[RunConfig],
    add_options: Callable[[argparse.ArgumentParser], None],
) -> argparse.ArgumentParser:
    folder = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about.replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings:\n" + "\n".join(_settings_help(config_type)),
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="override settings")
    parser.add_argument("--config", type=Path, help=f"YAML with settings; see configs/{folder}")
    parser.add_argument(
        "--dry-run", action="store_true", help="check data and settings, print the plan, stop"
    )
    add_options(parser)
    return parser


def _settings_help(model: type[StrictModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
            yield from _settings_help(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else f"default {field.default}"
            yield f"  {prefix + name:26} {field.description or ''} ({default})"


def _git_commit() -> str | None:
    """Return the commit of hone's own checkout, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() or None


def report_failure(module: str, error: Exception, run: RunFolder) -> int:
    """Tell what stopped a run, in its folder where possible and on stderr always.

    Of several processes the one that fails first tells the folder: what the others meet then, a
    lost connection, is only what came of it.

    Returns:
        The exit status.
    """
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
    print(f"{module}: {message}", file=sys.stderr)
    if not _told_by_another(run):
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.error, {"code": code, "message": message})
        except OSError as failure:
            print(f"{module}: {run.error} could not be written: {failure}", file=sys.stderr)
    return status


def _told_by_another(run: RunFolder) -> bool:
    """Tell whether another process of this run has said what stopped it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    return run.error.exists() and run.error.stat().st_mtime >= STARTED


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())

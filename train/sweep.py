"""The trials of a sweep: which settings are tried, and what came of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import ConfigError, DataError
from data.settings import read_config
from train.config import SftConfig, auto_learning_rate
from train.job_config import FIELDS, resolved_hyperparameters
from train.many import outcome_of
from train.run import RunFolder, write_json

AXES = (
    *("learning_rate", "learning_rate_multiplier", "num_epochs", "batch_size"),
    *("lr_scheduler", "warmup_fraction", "weight_decay", "max_grad_norm", "prompt_loss_weight"),
    *("lora.r", "lora.alpha", "lora.dropout", "lora.use_rslora", "lora.lr_ratio"),
)
DEFAULT_AXES = {"learning_rate_multiplier": ["0.3", "1", "3"], "lora.r": ["8", "32"]}
DEFAULTS = {
    "early_stopping.enabled": "true",
    "early_stopping.patience": "3",
    "n_evals": "8",
    "keep_checkpoints": "1",
}
HELD_OUT = {"validation_fraction": "0.1"}  # without a validation file
MOST_TRIALS = 16
RECORD = "sweep.json"
RESULT = "tune.json"
# Settings that a job has too: by `train.job_config`, or as what they became.
OF_JOBS = {"learning_rate", "seed", *FIELDS.values()}
VALIDATED = ("early_stopping", "classification", "n_evals")  # of a job with a validation file
# Settings of a run that a job decides by itself, and that change no result.
OF_RUNS = {
    *("base_model", "models_dir", "output_dir", "device", "threads", "train_file", "min_examples"),
    *("validation_file", "keep_checkpoints", "micro_batch_size", "micro_batch_tokens", "wandb"),
    *("gradient_checkpointing", "bias_report", "compare_with", "compare_base", "score_examples"),
    "max_auto_rank",
}


@dataclass(frozen=True)
class Sweep:
    """A folder, and the settings of each trial in it.

    Attributes:
        axes: What differs between trials, by name.
        settings: Of each trial, on the axes.
    """

    folder: Path
    axes: tuple[str, ...]
    settings: list[dict[str, str]]
    configs: list[SftConfig]

    def begin(self) -> None:
        """Note the trials in the folder.

        Raises:
            ConfigError: The folder holds another sweep, or one of another content of its files.
            DataError: A file is absent.
        """
        record = self.folder / RECORD
        files = _digests(self.configs[0])
        wanted = {"configs": [one.model_dump(mode="json") for one in self.configs], "files": files}
        if record.exists():
            found = json.loads(record.read_text("utf-8"))
            configs = found["configs"] if isinstance(found, dict) else found
            instead = "give another output_dir, or delete the folder"
            if configs != wanted["configs"]:
                raise ConfigError([f"{self.folder} holds another sweep (see {record}); {instead}"])
            if found != wanted:
                names = " or ".join(files)
                raise ConfigError(
                    [f"{self.folder} holds a sweep of other content of {names}; {instead}"]
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)

    def finish(self) -> dict[str, Any]:
        """Rank the trials by validation loss, copy the best adapter to `adapter/`, write
        `tune.json` and return its content; checkpoints of the trials are removed."""
        trials = [
            {"trial": number, "settings": settings, **_summary(outcome_of(config.output_dir))}
            for number, (settings, config) in enumerate(
                zip(self.settings, self.configs, strict=True), 1
            )
        ]
        trials.sort(key=lambda trial: (trial["valid_loss"] is None, trial["valid_loss"] or 0))
        result: dict[str, Any] = {"trials": trials, "best": None, "adapter": None, "job": None}
        best = trials[0]
        if best["valid_loss"] is not None:
            config = self.configs[best["trial"] - 1]
            run = RunFolder(config.output_dir)
            adapter = self.folder / "adapter"
            shutil.rmtree(adapter, ignore_errors=True)
            shutil.copytree(run.adapter, adapter)
            result |= {"best": best, "adapter": str(adapter), "job": _job(config, run)}
            result["not_for_jobs"] = _not_for_jobs(config)
        write_json(self.folder / RESULT, result)
        for config in self.configs:
            run = RunFolder(config.output_dir)
            if run.result.exists():
                shutil.rmtree(run.checkpoints, ignore_errors=True)
                shutil.rmtree(run.models, ignore_errors=True)
        return result


def plan_sweep(words: Sequence[str], num_trials: int | None, seed: int) -> Sweep:
    """Turn `key=value` words into trials; `key=a,b,c` is an axis.

    Without an axis DEFAULT_AXES are tried. Every combination is a trial, or a random `num_trials`
    of them.

    Raises:
        ConfigError: With every problem found.
    """
    values, axes = _parse(words)
    folder = Path(values.pop("output_dir"))
    settings = _choose(axes, num_trials, seed)
    configs = []
    for number, trial in enumerate(settings, 1):
        chosen = {**values, **trial, "output_dir": folder / f"trial-{number:02}"}
        told = [f"{key}={value}" for key, value in chosen.items()]
        configs.append(read_config(SftConfig, None, told))
    return Sweep(folder, tuple(axes), settings, configs)


def _parse(words: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the settings of all trials, and the values of each axis."""
    problems: list[str] = []
    values: dict[str, str] = {}
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        parts = [part.strip() for part in value.split(",")]
        if not equals:
            problems.append(f'"{word}" is not key=value')
        elif len(parts) == 1 or value.strip()[:1] in "[{'\"":  # one value, or YAML with commas
            values[key] = value
        elif key == "max_length":
            problems.append(
                "max_length cannot have several values: validation rows are cut to it, so the "
                "trials would be ranked by losses of different texts; give one value"
            )
        elif key not in AXES:
            problems.append(f"{key} cannot have several values; a sweep varies {', '.join(AXES)}")
        elif "" in parts or len(set(parts)) < len(parts):
            problems.append(f"{word} has an empty or repeated value; give each once")
        else:
            axes[key] = parts
    if values.get("early_stopping.enabled", "true") != "true":
        problems.append(
            "early_stopping.enabled must stay true: trials are compared by their best checkpoint"
        )
    if "output_dir" not in values:
        problems.append("output_dir is missing; give the folder of the sweep")
    if problems:
        raise ConfigError(problems)
    defaults = DEFAULTS if "validation_file" in values else {**DEFAULTS, **HELD_OUT}
    fixed = set(values) | ({"lora.r"} if "start_adapter" in values else set())  # of its shape
    default_axes = {name: tried for name, tried in DEFAULT_AXES.items() if name not in fixed}
    return {**defaults, **values}, axes or default_axes


def _choose(
    axes: Mapping[str, Sequence[str]], num_trials: int | None, seed: int
) -> list[dict[str, str]]:
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if num_trials is not None and num_trials < len(grid):
        chosen = random.Random(seed).sample(range(len(grid)), num_trials)
        return [grid[index] for index in sorted(chosen)]
    if num_trials is None and len(grid) > MOST_TRIALS:
        sizes = " x ".join(f"{len(values)} of {name}" for name, values in axes.items())
        raise ConfigError(
            [
                f"{sizes} are {len(grid)} trials; give fewer values, or --trials N to try N of "
                "them at random"
            ]
        )
    return grid


def _summary(outcome: Mapping[str, Any]) -> dict[str, Any]:
    names = ("run", "status", "valid_loss", "best_step", "steps", "train_loss", "message")
    found = {name: outcome.get(name) for name in names}
    compared = outcome.get("comparison") or {}
    return {**found, "base_loss": compared.get("loss_before"), "loss": compared.get("loss_after")}


def _job(config: SftConfig, run: RunFolder) -> dict[str, Any]:
    """Return what a fine-tuning job takes, beside its model and files, to train as the trial did.

    What needs a validation file is there where the sweep had one.
    """
    resolved = json.loads(run.resolved.read_text("utf-8"))
    hyperparameters = resolved_hyperparameters(resolved, run)
    rate = resolved["plan"]["learning_rate"] * resolved["plan"]["learning_rate_multiplier"]
    by_rule = auto_learning_rate(resolved["base"]["parameters"])
    hyperparameters["learning_rate_multiplier"] = round(rate / by_rule, 6)
    lora = config.lora.model_dump(exclude_unset=True, exclude={"use_dora"})
    if resolved["plan"]["lora_r"] is not None:
        lora["r"] = resolved["plan"]["lora_r"]
    more: dict[str, Any] = {}
    if config.prompt_loss_weight:
        more["prompt_loss_weight"] = config.prompt_loss_weight
    if config.max_length != "auto":
        more["max_seq_length"] = config.max_length
    if config.on_long != "truncate":
        more["on_long"] = config.on_long
    if config.validation_file is not None:
        more["early_stopping"] = config.early_stopping.model_dump()
        more["n_evals"] = config.n_evals
        if config.classification.enabled:
            more["classification"] = config.classification.model_dump(
                exclude={"enabled"}, exclude_defaults=True
            )
    return {
        "hyperparameters": hyperparameters,
        "seed": config.seed,
        **({"lora": lora} if lora else {}),
        **more,
    }


def _not_for_jobs(config: SftConfig) -> dict[str, Any]:
    """Return the settings of a trial that a job like it does not have, and their values."""
    carried = OF_JOBS | OF_RUNS
    if config.validation_file is not None:
        carried |= set(VALIDATED)
    else:
        carried -= set(VALIDATED)
    values = config.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in values.items() if name not in carried}


def _digests(config: SftConfig) -> dict[str, str]:
    """Return the SHA-256 of a sweep's files, by setting."""
    found = {}
    for name in ("train_file", "validation_file"):
        path = getattr(config, name)
        if path is None:
            continue
        if not path.is_file():
            raise DataError(
                f"{name} {path} is not a file; give the path of an existing JSONL file",
                param=name,
                code="file_not_found",
            )
        with path.open("rb") as stream:
            found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found

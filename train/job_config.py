"""A job's row as the configuration of `train.sft`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.settings import Settings, read_config
from data.tables import Job
from data.upgrades import UPGRADE
from serve.engine.base_spec import find_spec
from train.config import SftConfig
from train.run import RunFolder, replace_text

# hyperparameters and options of the API -> fields of the trainer's configuration
FIELDS = {
    "n_epochs": "num_epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
    "max_seq_length": "max_length",
    "on_long": "on_long",
    "n_evals": "n_evals",
    "n_checkpoints": "n_checkpoints",
    "lora": "lora",
    "prompt_loss_weight": "prompt_loss_weight",
}
SCORED_EXAMPLES = 5000  # a job with more training rows has no list of their losses
RESOLVED = ("n_epochs", "batch_size", "learning_rate_multiplier")


def write_config(
    job: Job,
    settings: Settings,
    run: RunFolder,
    train_file: Path,
    validation_file: Path | None,
    start_adapter: Path | None = None,
    compare_with: Path | None = None,
) -> Path:
    """Write the configuration of a job's run and check it.

    A run keeps the configuration that it began with: the job's row holds numbers by the time it is
    resumed, where it held "auto".

    Raises:
        ConfigError: What the job asks is impossible together.
    """
    path = run.path / "config.yaml"
    if path.exists():
        return path
    asked = {**job.hyperparameters, **job.options}
    values: dict[str, Any] = {
        "base_model": base_of(job, settings),
        "models_dir": str(settings.models_dir.resolve()),
        "train_file": str(train_file.resolve()),
        "output_dir": str(run.path.resolve()),
        "min_examples": settings.min_examples,
        "device": settings.device,
        "max_auto_rank": settings.max_lora_rows,  # a larger one could not be served
        "seed": job.seed,
        "score_examples": SCORED_EXAMPLES,
        "bias_report": settings.bias_reports,
        **{ours: asked[name] for name, ours in FIELDS.items() if name in asked},
    }
    if validation_file is not None:
        values["validation_file"] = str(validation_file.resolve())
    if start_adapter is not None:
        values["start_adapter"] = str(start_adapter.resolve())
    if compare_with is not None:
        values["compare_with"] = str(compare_with.resolve())
    if UPGRADE in job.options:
        upgrade = job.options[UPGRADE]
        if compare_with is not None:
            values["compare_base"] = upgrade["old_base"]
        if "held_out" in upgrade:
            values["validation_fraction"] = upgrade["held_out"]
    for section in ("early_stopping", "classification"):
        if section in asked:
            values[section] = {"enabled": True, **asked[section]}
    wandb = wandb_of(job, settings)
    if wandb:
        values["wandb"] = wandb
    replace_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    read_config(SftConfig, path)
    return path


def base_of(job: Job, settings: Settings) -> str:
    """Return the base model by a name that the trainer finds: the server's may be a path."""
    if UPGRADE in job.options:
        return str(job.options[UPGRADE]["new_base"])
    return settings.model if find_spec(settings.model).name == job.base else job.base


def resolved_hyperparameters(resolved: Mapping[str, Any], run: RunFolder) -> dict[str, Any]:
    """Return the API's hyperparameters as numbers: those of a plan in resolved_config.json, or
    what was decided before the trainer began."""
    if resolved["plan"] is None:
        found: dict[str, Any] = json.loads(run.hyperparameters.read_text("utf-8"))
        return found
    return {name: resolved["plan"][FIELDS[name]] for name in RESOLVED}


def wandb_of(job: Job, settings: Settings) -> dict[str, str]:
    for item in job.integrations:
        asked = item["wandb"]
        return {"project": asked["project"], "name": asked.get("name") or job.id}
    if settings.wandb_project:
        return {"project": settings.wandb_project, "name": job.id}
    return {}

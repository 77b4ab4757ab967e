"""A job's row as the configuration of a trainer of `rlhf`: comparisons, judged answers or prompts.

What the API calls "auto" becomes a number here, by the method's rules, and is kept beside the
configuration for the job's row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data.job_methods import METHODS, REWARD_MODEL
from data.settings import Settings
from data.tables import Job
from train.job_config import base_of, wandb_of
from train.run import RunFolder, replace_text, write_json

VALUE_LEARNING_RATE = 1e-4  # of PPO's value model, as rlhf.ppo_config has it
GROUP = 4  # responses to a prompt, times compute_multiplier
SHARED = {
    **{"max_seq_length": "max_length", "on_long": "on_long", "n_evals": "n_evals"},
    "max_completion_tokens": "max_new_tokens",
}


def write_method_config(
    job: Job,
    settings: Settings,
    run: RunFolder,
    train_file: Path,
    validation_file: Path | None,
    start_adapter: Path | None,
    reward_model: Path | None,
) -> Path:
    """Write the configuration of a job's run; one that is there already is kept.

    Args:
        reward_model: Folder of the reward model that the job or its grader names.
    """
    path = run.path / "config.yaml"
    if path.exists():
        return path
    kind = str(job.method["type"])
    rules = METHODS[kind]
    asked = {name: value for name, value in job.hyperparameters.items() if value != "auto"}
    numbers = {**rules.defaults, **asked}
    values: dict[str, Any] = {
        "base_model": base_of(job, settings),
        "models_dir": str(settings.models_dir.resolve()),
        "output_dir": str(run.path.resolve()),
        "device": settings.device,
        "seed": job.seed,
        "batch_size": numbers["batch_size"],
        "learning_rate": rules.learning_rate * numbers["learning_rate_multiplier"],
    }
    if kind != REWARD_MODEL:  # which writes no text
        values["bias_report"] = settings.bias_reports
    if rules.graded:
        values |= _sampling(job, kind, numbers, train_file, reward_model)
        numbers["batch_size"] = values["batch_size"]  # of whole groups
        if validation_file is not None:
            values["eval_prompts_file"] = str(validation_file.resolve())
    else:
        values |= _offline(job, settings, numbers, train_file, validation_file)
        if reward_model is not None:
            values["reward_model"] = str(reward_model.resolve())
    if kind == "ppo":
        rate = VALUE_LEARNING_RATE * numbers["learning_rate_multiplier"]
        values["value"] = {"learning_rate": rate}
    for name in ("lora", "keep_checkpoints"):
        if name in job.options:
            values[name] = job.options[name]
    if start_adapter is not None:
        values["start_adapter"] = str(start_adapter.resolve())
    wandb = wandb_of(job, settings)
    if wandb:
        values["wandb"] = wandb
    write_json(run.hyperparameters, numbers)
    replace_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path


def _offline(
    job: Job,
    settings: Settings,
    numbers: dict[str, Any],
    train_file: Path,
    validation_file: Path | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "train_file": str(train_file.resolve()),
        "min_examples": settings.min_examples,
        "num_epochs": numbers["n_epochs"],
    }
    if "beta" in numbers:
        values["beta"] = numbers["beta"]
    if validation_file is not None:
        values["validation_file"] = str(validation_file.resolve())
    values |= {ours: job.options[name] for name, ours in SHARED.items() if name in job.options}
    return values


def _sampling(
    job: Job, kind: str, numbers: dict[str, Any], prompts: Path, reward_model: Path | None
) -> dict[str, Any]:
    grader = job.method[kind]["grader"]
    reward: dict[str, Any] = {}
    if reward_model is not None:
        reward["model"] = str(reward_model.resolve())
    if grader["type"] != "score_model":
        reward |= {"grader": grader, "clip": None}  # a rule's numbers mean what they say
    with prompts.open("rb") as stream:
        rows = sum(1 for line in stream if line.strip())
    values: dict[str, Any] = {
        "prompts_file": str(prompts.resolve()),
        "reward": reward,
        "eval_prompts": numbers["eval_samples"],
        "eval_every": numbers["eval_interval"],
    }
    if "max_completion_tokens" in job.options:
        values["max_new_tokens"] = job.options["max_completion_tokens"]
    each = 1
    if kind == "ppo":
        values["kl"] = {"coef": numbers["kl_coef"]}
    else:
        each = max(2, round(GROUP * numbers["compute_multiplier"]))
        values["num_generations"] = each
        values["batch_size"] = max(each, numbers["batch_size"] // each * each)
    episodes = rows * each * numbers["n_epochs"]
    values["total_episodes"] = max(episodes, values.get("batch_size", numbers["batch_size"]))
    return values

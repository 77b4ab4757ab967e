"""Everything that a run needs before its first step: base, rendered data, and a plan.

Also the two ways to look at that without training: the tokens of some rows, and how long the run
would take.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from data.errors import ConfigError, DataError
from data.overlap import find_overlap
from data.render import IGNORED
from data.rows import Format
from train.base_model import Base, load_base
from train.batches import Rendered, limit_length, load_file, name_lines, split
from train.class_metrics import Classes, find_classes
from train.config import Plan, SftConfig, auto_learning_rate, resolve, resolve_length
from train.start import check_compared

ABSURD = 30  # times the rate of auto
KEPT_LINES = 1000  # of those that were truncated, in resolved_config.json


@dataclass
class TrainingJob:
    """Everything that a run needs before its first step."""

    config: SftConfig
    base: Base
    train: Rendered
    valid: Rendered | None
    plan: Plan
    num_processes: int
    warnings: list[str]
    facts: dict[str, Any]
    classes: Classes | None = None


def prepare(config: SftConfig, tokens: Path | None = None, base: Base | None = None) -> TrainingJob:
    """Load the base, check and render the data, and resolve the plan.

    Args:
        tokens: Folder that keeps the rendered rows; without one they go with the process.
        base: What `load_base` would load, where it is there already.

    Raises:
        ToolkitError: The base is unavailable, the data unusable, or the settings do not fit them.
    """
    _require_files(config)
    set_seed(config.seed)
    base = base or load_base(config)
    check_compared(config, base)
    tokenizer, fingerprint = base.tokenizer, base.fingerprint
    place = _below(tokens, "train")
    train = load_file(config.train_file, tokenizer, config.min_examples, place, fingerprint)
    if config.prompt_loss_weight and train.kind != Format.PROMPT_COMPLETION:
        raise ConfigError(
            [
                f"prompt_loss_weight is {config.prompt_loss_weight}, but the rows of "
                f"{config.train_file} are {train.kind}; only prompt/completion rows have a prompt"
            ]
        )
    valid = None
    if config.validation_file is not None:
        place = _below(tokens, "validation")
        valid = load_file(config.validation_file, tokenizer, 1, place, fingerprint)
    elif config.validation_fraction:
        train, valid = split(train, config.validation_fraction, config.seed)
    longest = max(train.longest, valid.longest if valid else 0)
    max_length = resolve_length(config, longest, base.context_length)
    train = limit_length(train, max_length, config.on_long)
    if valid is not None:
        valid = limit_length(valid, max_length, config.on_long)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = resolve(
        config,
        num_rows=len(train.examples),
        max_length=max_length,
        num_parameters=base.num_parameters,
        on_gpu=base.model.device.type != "cpu",
        num_processes=num_processes,
    )
    facts = {
        "base": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "dtype": str(base.model.dtype),
            "parameters": base.num_parameters,
        },
        "train_data": _describe(train),
        "validation_data": _describe(valid) if valid else None,
    }
    warnings = [
        *_warn_of_length(train, max_length, config.on_long),
        *(_warn_of_length(valid, max_length, config.on_long) if valid else []),
        *_warn_of_overlap(config),
        *_warn_of_rate(plan, base.num_parameters),
    ]
    classes = None
    if config.classification.enabled and valid is not None:
        classes = find_classes(config.classification, tokenizer, train, valid)
    return TrainingJob(config, base, train, valid, plan, num_processes, warnings, facts, classes)


def show_tokens(job: TrainingJob, count: int) -> None:
    """Print rows as the model sees them: learned tokens are green, the context is dim."""
    console = Console()
    for line, example in zip(job.train.lines[:count], job.train.examples[:count], strict=True):
        console.print(f"line {line}: {len(example)} tokens, {example.num_trained} learned")
        for token_id, label in zip(example.input_ids, example.labels, strict=True):
            style = "dim" if label == IGNORED else "green"
            mark = " " if label == IGNORED else "*"
            text = repr(job.base.tokenizer.decode([token_id]))
            console.print(f"  {mark} {token_id:>7} {text}", style=style, markup=False)


def _below(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _require_files(config: SftConfig) -> None:
    """A misspelt path is told before a base model is fetched for it."""
    for name in ("train_file", "validation_file"):
        path: Path | None = getattr(config, name)
        if path is not None and not path.is_file():
            raise DataError(
                f"{name} {path} is not a file; give the path of an existing JSONL file",
                param=name,
                code="file_not_found",
            )


def _describe(rendered: Rendered) -> dict[str, Any]:
    return {
        "file": rendered.path.name,
        "sha256": rendered.digest,
        "examples": len(rendered.examples),
        "tokens": rendered.num_tokens,
        "longest": rendered.longest,
        "truncated": len(rendered.long),
        "truncated_lines": rendered.long[:KEPT_LINES].tolist(),
    }


def _warn_of_length(rendered: Rendered, max_length: int, on_long: str) -> list[str]:
    if not len(rendered.long):
        return []
    if on_long == "truncate" and len(rendered.long) == len(rendered.examples):
        return [
            f"every example of {rendered.path.name} ({len(rendered.long)}) was truncated to "
            f"{max_length} tokens, so the model sees no whole prompt, but serving sends "
            "whole ones; raise max_length, or shorten the prompts"
        ]
    what = "example" if len(rendered.long) == 1 else "examples"
    what = f"{len(rendered.long)} {what} of {rendered.path.name}"
    if on_long == "drop":
        return [f"{what} dropped, longer than {max_length} tokens: {name_lines(rendered.long)}"]
    return [f"{what} truncated to {max_length} tokens: {name_lines(rendered.long)}"]


def _warn_of_rate(plan: Plan, num_parameters: int) -> list[str]:
    rate, usual = (
        plan.learning_rate * plan.learning_rate_multiplier,
        auto_learning_rate(num_parameters),
    )
    if rate <= ABSURD * usual:
        return []
    return [
        f"the learning rate is {rate:g}, {rate / usual:.3g} times what auto chooses for this base "
        f"({usual:g}); the loss will most likely rise, so lower learning_rate or its multiplier"
    ]


def _warn_of_overlap(config: SftConfig) -> list[str]:
    if config.validation_file is None:
        return []
    count, first = find_overlap(config.train_file, config.validation_file)
    if not count:
        return []
    lines = [problem.line for problem in first if problem.line is not None]
    return [
        f"{count} validation examples are also training examples, so the validation loss flatters "
        f"the model: {name_lines(lines, count)}"
    ]

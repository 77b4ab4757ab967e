"""The base model as training needs it: fetched, loaded, and with what a plan asks of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from serve.engine import base_model
from train.config import RunConfig


@dataclass(frozen=True)
class Base:
    """A loaded base; `context_length` in tokens."""

    name: str
    folder: Path
    fingerprint: str
    model: PreTrainedModel
    tokenizer: Any
    context_length: int

    @property
    def origin(self) -> dict[str, str]:
        """What an adapter says of the base that it belongs to."""
        return {"base_model": self.name, "base_fingerprint": self.fingerprint}

    @property
    def num_parameters(self) -> int:
        return int(self.model.num_parameters())


def load_base(config: RunConfig) -> Base:
    """Fetch (if need be) and load the run's base model.

    Raises:
        ConfigError: There is no such model.
        ModelUnavailable: It can be neither fetched nor read.
    """
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    spec = base_model.find_spec(config.base_model)
    folder = base_model.fetch(spec, config.models_dir)
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    model, tokenizer = base_model.load(folder, dtype, config.device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Base(
        name=spec.name,
        folder=folder,
        fingerprint=base_model.fingerprint(folder),
        model=model,
        tokenizer=tokenizer,
        context_length=spec.context_length or limit or 2048,
    )

"""The base model as training needs it: fetched, loaded, and with what a plan asks of it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from data.errors import ConfigError
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


def four_bits(device: str) -> BitsAndBytesConfig:
    """Return how a base is kept in 4 bits: NF4 with doubly quantised scales (arXiv:2305.14314).

    Raises:
        ConfigError: There is no CUDA GPU, or no bitsandbytes.
    """
    if base_model.resolve_device(device).type != "cuda":
        raise ConfigError(
            [
                "load_in_4bit is true, but the run is on a CPU; it needs a CUDA GPU (device=cuda). "
                "Leave it out, or take a smaller base or gradient_checkpointing=true"
            ]
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            ["load_in_4bit is true, but bitsandbytes is not there: pip install bitsandbytes"]
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


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
    quantization = four_bits(config.device) if getattr(config, "load_in_4bit", False) else None
    model, tokenizer = base_model.load(folder, dtype, config.device, quantization)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Base(
        name=spec.name,
        folder=folder,
        fingerprint=base_model.fingerprint(folder),
        model=model,
        tokenizer=tokenizer,
        context_length=spec.context_length or limit or 2048,
    )

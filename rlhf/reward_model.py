"""A reward model for trainers: the head as a tensor, its scale, and writing both.

`data.reward_head` says what a reward model's folder is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.errors import AdapterRefused, ConfigError, InvalidInput
from data.reward_head import HEAD, SCALE, load_head
from train.run import ORIGIN, write_json


@dataclass(frozen=True)
class Normalizer:
    """What brings raw scores to mean 0 and standard deviation 1 on reference answers."""

    mean: float = 0.0
    std: float = 1.0
    samples: int = 0

    def apply(self, raw: Tensor) -> Tensor:
        """Return normalised scores."""
        return (raw - self.mean) / self.std


@dataclass(frozen=True)
class RewardHead:
    """What a reward model has beside its adapter; `weight` is [D]."""

    weight: Tensor
    normalizer: Normalizer


def save_head(folder: Path, weight: Tensor, normalizer: Normalizer, **facts: Any) -> None:
    """Write head and scale into a folder."""
    save_file({"score.weight": weight.detach().cpu().float().reshape(1, -1)}, folder / HEAD)
    write_json(folder / SCALE, {**asdict(normalizer), **facts})


def read_head(folder: Path, fingerprint: str) -> RewardHead:
    """Read head and scale, and check that they belong to a base.

    Raises:
        ConfigError: The folder is no reward model.
        AdapterRefused: It belongs to another base.
    """
    missing = [n for n in ("adapter_config.json", HEAD, SCALE) if not (folder / n).is_file()]
    if missing:
        raise ConfigError(
            [
                f"{folder} is no reward model: it has no {', '.join(missing)}; give "
                "the adapter folder of a run of rlhf.reward"
            ]
        )
    origin_file = folder / ORIGIN
    origin = json.loads(origin_file.read_text("utf-8")) if origin_file.exists() else {}
    if origin.get("base_fingerprint", fingerprint) != fingerprint:
        raise AdapterRefused(
            f"The reward model {folder} was trained on {origin.get('base_model')} "
            f"({origin['base_fingerprint']}), but the policy's base is {fingerprint}; train both "
            "on one base",
            code="adapter_wrong_base",
        )
    try:
        head = load_head(folder)
    except InvalidInput as error:
        raise ConfigError([f"the reward model {folder}: {error.message}"]) from error
    normalizer = Normalizer(head.mean, head.std, head.samples)
    return RewardHead(torch.from_numpy(head.weight), normalizer)

"""What makes an adapter a reward model: a score head beside it, and the scale of its scores.

The folder is a plain PEFT folder plus `head.safetensors` (`score.weight` [1, D]) and `reward.json`
(mean and standard deviation of the raw scores on reference answers). A score is (raw - mean) / std.
Raw is the head on the last hidden state of the last token of prompt and answer, which is the EOS
that ends the answer, where there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data.errors import InvalidInput

HEAD, SCALE = "head.safetensors", "reward.json"


@dataclass(frozen=True, slots=True)
class RewardHead:
    """Head and scale; `weight` is [D] in float32."""

    weight: NDArray[np.float32]
    mean: float
    std: float
    samples: int

    def score(self, hidden: Sequence[float]) -> float:
        """Return the normalised score of a last hidden state [D]."""
        raw = float(self.weight @ np.asarray(hidden, dtype=np.float32))
        return (raw - self.mean) / self.std


def load_head(folder: Path) -> RewardHead:
    """Read head and scale.

    Raises:
        InvalidInput: The folder has none, or they cannot be read.
    """
    missing = [name for name in (HEAD, SCALE) if not (folder / name).is_file()]
    if missing:
        raise InvalidInput(f"{folder} is no reward model: it has no {', '.join(missing)}")
    try:
        weight = load_file(folder / HEAD)["score.weight"].astype(np.float32).flatten()
        scale = json.loads((folder / SCALE).read_text("utf-8"))
        mean, std, samples = float(scale["mean"]), float(scale["std"]), int(scale["samples"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"the reward model {folder} cannot be read: {error}") from error
    if not (np.isfinite(weight).all() and math.isfinite(mean) and 0 < std < math.inf):
        raise InvalidInput(f"the reward model {folder} holds numbers that are not finite")
    return RewardHead(weight, mean, std, samples)

"""Comparing a policy with the one it started from, on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.rollout import Sample


@dataclass(frozen=True)
class Answers:
    """Responses to the fixed prompts and their scores, NaN where there is none."""

    samples: Sequence[Sample]
    scores: Sequence[float]

    @property
    def mean_score(self) -> float:
        known = [score for score in self.scores if not math.isnan(score)]
        return sum(known) / len(known) if known else math.nan


def summarize(answers: Answers) -> dict[str, float]:
    """Return mean reward, length in tokens and the share that ended by itself."""
    count = len(answers.samples)
    if not count:
        return {}
    return {
        "reward": answers.mean_score,
        "length_mean": sum(len(sample.response) for sample in answers.samples) / count,
        "eos_rate": sum(sample.ended for sample in answers.samples) / count,
    }


def compare(start: Answers, end: Answers) -> dict[str, object]:
    """Return both sides' numbers and how often the end scores above the start."""
    pairs = [
        (before, after)
        for before, after in zip(start.scores, end.scores, strict=True)
        if not (math.isnan(before) or math.isnan(after))
    ]
    wins = sum(after > before for before, after in pairs)
    ties = sum(after == before for before, after in pairs)
    low, high = wilson(wins + ties / 2, len(pairs))
    return {
        "start": summarize(start),
        "end": summarize(end),
        "win_rate": (wins + ties / 2) / len(pairs) if pairs else None,
        "win_rate_interval": [low, high],
        "prompts": len(pairs),
        "ties": ties,
    }


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)

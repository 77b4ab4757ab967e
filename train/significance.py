"""Whether one of two models is better on the same questions, or it only looks so.

The test is a paired permutation test: if the models were alike, each question's difference could as
well have the other sign (Fisher 1935; Koehn 2004 and Dror et al. 2018 for texts). Up to EXACT_UP_TO
differences, all signs are tried; beyond, RESAMPLES random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data.errors import InvalidInput
from data.intervals import bootstrap, wilson

EXACT_UP_TO = 14
RESAMPLES = 10_000
LEVEL = 0.05
ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """What the second model has over the first.

    Attributes:
        mean: Of the second's scores less the first's.
        interval: 95 % bootstrap interval of it, over questions.
        p_value: Two-sided.
        better, worse, same: Questions.
    """

    mean: float
    interval: tuple[float, float]
    p_value: float
    better: int
    worse: int
    same: int

    @property
    def is_significant(self) -> bool:
        return self.p_value < LEVEL

    @property
    def win_rate(self) -> float:
        """How often the second scores above the first; the same is half a win."""
        return (self.better + self.same / 2) / (self.better + self.worse + self.same)

    def as_dict(self) -> dict[str, object]:
        """Return the fields, the win rate with its interval (Wilson's), and the verdict."""
        count = self.better + self.worse + self.same
        return {
            **asdict(self),
            "significant": self.is_significant,
            "win_rate": self.win_rate,
            "win_rate_interval": wilson(self.win_rate * count, count),
        }


def compare(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare scores of the same questions.

    Raises:
        InvalidInput: They are not of the same number, or there are none.
    """
    if len(first) != len(second) or not first:
        raise InvalidInput(
            f"{len(first)} scores against {len(second)}: give both models' scores of the same "
            "questions, at least one"
        )
    gains = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    with np.errstate(invalid="ignore"):  # of scores that are not finite nothing can be said
        low, high = bootstrap(len(gains), lambda drawn: drawn @ gains / len(gains)) or (0, 0)
        mean, chance = float(gains.mean()), p_value(gains)
    return Difference(
        mean=mean,
        interval=(low, high),
        p_value=chance,
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
        same=int((gains == 0).sum()),
    )


def p_value(gains: np.ndarray) -> float:
    """Return the share of sign changes whose mean is at least as far from 0: gains [N]."""
    gains = gains[gains != 0]  # their signs change nothing
    if not len(gains):
        return 1.0
    seen = abs(gains.sum()) - ROUNDING * np.abs(gains).sum()
    if len(gains) <= EXACT_UP_TO:
        bits = np.arange(2 ** len(gains))[:, None] >> np.arange(len(gains))
        signs = 1 - 2 * (bits & 1)
        return float((np.abs(signs @ gains) >= seen).mean())
    draw = np.random.default_rng(0)
    extreme = 0
    for _ in range(RESAMPLES // 100):
        signs = 1 - 2 * draw.integers(0, 2, (100, len(gains)), dtype=np.int8)
        extreme += int((np.abs(signs @ gains) >= seen).sum())
    return (extreme + 1) / (RESAMPLES + 1)  # the signs seen are one of them

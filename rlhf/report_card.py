"""What a reward model is worth: accuracy with an interval, calibration, length, agreement.

Pairs whose better answer is not decided (a probability of 0.5) count in loss and Brier score only.
Intervals are bootstrapped over prompts, as pairs of one prompt are not independent.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.rows import TAGS
from rlhf.comparisons import Group, agreement, noise_ceiling
from train.pages import draw, flat, page, table

BINS = 10
RESAMPLES = 1000
SHOWN_TAGS = 20  # labelers, say, of whom the card tells
NEAR = 0.1  # lengths within this share of one another


@dataclass(frozen=True)
class Judged:
    """One held-out pair: its prompt, both scores and lengths, and the labelled probability."""

    group: int
    line: int
    better: float
    worse: float
    better_length: int
    worse_length: int
    prob: float

    @property
    def difference(self) -> float:
        return self.better - self.worse

    @property
    def decided(self) -> bool:
        return self.prob > 0.5

    @property
    def credit(self) -> float:
        """The share of judgements that the order of the scores agrees with; equal scores: 1/2."""
        return _credit(self.difference, self.prob)


def judge(groups: Sequence[Group], scores: Sequence[Sequence[float]]) -> list[Judged]:
    """Return the pairs of some groups with the scores of their answers."""
    return [
        Judged(
            index,
            pair.line,
            scores[index][pair.better],
            scores[index][pair.worse],
            group.lengths[pair.better],
            group.lengths[pair.worse],
            pair.prob,
        )
        for index, group in enumerate(groups)
        for pair in group.pairs
    ]


def report_card(groups: Sequence[Group], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the numbers of a reward model on held-out pairs; None where one is not defined."""
    judged = judge(groups, scores)
    decided = [pair for pair in judged if pair.decided]
    ceiling, no_ceiling = noise_ceiling(groups)
    agreed, not_agreed = agreement(groups)
    near = [
        pair
        for pair in decided
        if abs(pair.better_length - pair.worse_length)
        <= NEAR * max(pair.better_length, pair.worse_length)
    ]
    probs = np.array([_sigmoid(pair.difference) for pair in judged])
    labels = np.array([pair.prob for pair in judged])
    every = [score for group in scores for score in group]
    lengths = [length for group in groups for length in group.lengths]
    temperature = fit_temperature([pair.difference for pair in judged], labels.tolist())
    bins = reliability(decided)
    return {
        "prompts": len(groups),
        "pairs": len(judged),
        "ties": len(judged) - len(decided),
        "accuracy": accuracy(decided),
        "accuracy_interval": bootstrap(decided),
        "chance": 0.5,
        "longer_wins": _longer_wins(decided),
        "accuracy_near_equal_length": accuracy(near),
        "pairs_near_equal_length": len(near),
        "noise_ceiling": ceiling,
        "noise_ceiling_reason": no_ceiling,
        "label_agreement": agreed,
        "label_agreement_reason": not_agreed,
        "nll": float(np.mean(_nll(probs, labels))) if judged else None,
        "brier": float(np.mean((probs - labels) ** 2)) if judged else None,
        "ece": expected_calibration_error(bins, len(decided)),
        "temperature": temperature,
        "reliability": bins,
        "by": by_tag(groups, scores),
        "score_length_correlation": pearson(every, lengths),
        "score_mean": float(np.mean(every)) if every else None,
        "score_std": float(np.std(every)) if every else None,
    }


def by_tag(
    groups: Sequence[Group], scores: Sequence[Sequence[float]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the judgements are worth of each labeler, batch and confidence that rows tell.

    Of each of the SHOWN_TAGS most frequent: decided judgements, the share of them that the scores
    agree with, and the share of other judgements of the same pairs that agree with them (None where
    there are none).
    """
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for group, marks in zip(groups, scores, strict=True):
        for pair in group.pairs:
            difference = marks[pair.better] - marks[pair.worse]
            for index, vote in enumerate(pair.votes):
                if vote.prob == 0.5:
                    continue
                others = [v.prob for i, v in enumerate(pair.votes) if i != index and v.prob != 0.5]
                agreed = [vote.prob * p + (1 - vote.prob) * (1 - p) for p in others]
                share = sum(agreed) / len(agreed) if agreed else None
                for name, value in vote.tags.items():
                    values = found.setdefault(name, {}).setdefault(value, [])
                    values.append((_credit(difference, vote.prob), share))
    return {
        name: {
            value: _summary(found[name][value])
            for value in sorted(found[name], key=lambda v: (-len(found[name][v]), v))[:SHOWN_TAGS]
        }
        for name in TAGS
        if name in found
    }


def _summary(votes: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    agreed = [share for _, share in votes if share is not None]
    return {
        "judgements": len(votes),
        "accuracy": sum(credit for credit, _ in votes) / len(votes),
        "agreement": sum(agreed) / len(agreed) if agreed else None,
    }


def gate(card: Mapping[str, Any]) -> dict[str, Any]:
    """Decide by a report card whether a reward model is worth more than a coin, and say why."""
    if card["accuracy"] is None:
        return {"promote": False, "reasons": ["no held-out comparison is decided"]}
    within = card["accuracy_interval"]
    told = f"held-out accuracy {card['accuracy']:.3f}"
    told += f" ({within[0]:.3f} to {within[1]:.3f})" if within else ""
    return {"promote": card["accuracy"] > 0.5, "reasons": [f"{told}, chance 0.5"]}


def accuracy(pairs: Sequence[Judged]) -> float | None:
    """Return the share of judgements that the scores order rightly; equal scores count half.

    A pair judged 2 : 1 counts 2/3 or 1/3, so that the noise ceiling bounds it.
    """
    return sum(pair.credit for pair in pairs) / len(pairs) if pairs else None


def bootstrap(pairs: Sequence[Judged], seed: int = 0) -> list[float] | None:
    """Return the 95 % interval of the accuracy, resampling prompts."""
    by_group: dict[int, list[Judged]] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, []).append(pair)
    if len(by_group) < 2:
        return None
    right = np.array([sum(pair.credit for pair in group) for group in by_group.values()])
    counts = np.array([len(group) for group in by_group.values()])
    drawn = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    found = right[drawn].sum(1) / counts[drawn].sum(1)
    return [float(value) for value in np.quantile(found, (0.025, 0.975))]


def reliability(pairs: Sequence[Judged]) -> list[dict[str, float]]:
    """Return bins of how sure the model was and how often it was right.

    Each pair counts as the answer that scores higher beating the other.
    """
    sure = np.array([_sigmoid(abs(pair.difference)) for pair in pairs])
    right = np.array([pair.credit for pair in pairs])
    edges = np.linspace(0.5, 1.0, BINS + 1)
    found = []
    for low, high in itertools.pairwise(edges):
        inside = (sure >= low) & ((sure < high) | (high == 1.0))
        if inside.any():
            found.append(
                {
                    "low": float(low),
                    "high": float(high),
                    "count": int(inside.sum()),
                    "confidence": float(sure[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    return found


def expected_calibration_error(bins: Sequence[dict[str, float]], count: int) -> float | None:
    """Return the mean |confidence - accuracy| over pairs (Naeini et al. 2015)."""
    if not count:
        return None
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / count


def fit_temperature(differences: Sequence[float], probs: Sequence[float]) -> float | None:
    """Return the T that makes sigmoid(difference / T) likeliest; above 1: the model is too sure.

    Newton's method on 1 / T (Guo et al. 2017); None where no T > 0 is best.
    """
    d, p = np.array(differences), np.array(probs)
    scale = 1.0
    for _ in range(100):
        found = 1 / (1 + np.exp(-np.clip(scale * d, -500, 500)))
        slope, bend = float(((found - p) * d).sum()), float((found * (1 - found) * d * d).sum())
        if bend < 1e-12:
            return None
        step = slope / bend
        scale = min(max(scale - step, scale / 10), scale * 10)
        if abs(step) < 1e-9 * max(1.0, scale):
            break
    return 1 / scale if 1e-4 < scale < 1e4 else None


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the correlation; None where one of them does not vary."""
    if len(first) < 2 or np.std(first) == 0 or np.std(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def card_page(card: dict[str, Any], title: str) -> str:
    """Return the report card as a page with pictures."""
    bins = card["reliability"]
    plain = {name: value for name, value in card.items() if name not in ("reliability", "by")}
    shown = flat(plain)
    line = [(0.5, 0.5), (1.0, 1.0)]
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    counts = [((b["low"] + b["high"]) / 2, float(b["count"])) for b in bins]
    return page(
        title,
        [
            table("Held-out comparisons", shown),
            *(_tag_table(name, values) for name, values in card["by"].items()),
            "<h2>Calibration</h2>",
            draw([(line, "perfect", "--"), (points, "model", "o-")], "confidence", "accuracy"),
            draw([(counts, "pairs", "o-")], "confidence", "pairs"),
        ],
    )


def _tag_table(name: str, values: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [(value, *facts.values()) for value, facts in values.items()]
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>"
        for row in cells
    )
    names = (name, "judgements", "the model agrees with", "others agree with")
    head = "".join(f"<th>{text}</th>" for text in names)
    return f"<h2>By {name}</h2><table><tr>{head}</tr>{rows}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "not known"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _longer_wins(pairs: Sequence[Judged]) -> float | None:
    if not pairs:
        return None
    return sum(_credit(p.better_length - p.worse_length, p.prob) for p in pairs) / len(pairs)


def _credit(difference: float, prob: float) -> float:
    return 0.5 if difference == 0 else prob if difference > 0 else 1 - prob


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _nll(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    inside = np.clip(probs, 1e-12, 1 - 1e-12)
    return -(labels * np.log(inside) + (1 - labels) * np.log(1 - inside))

"""How far labelers agree: Krippendorff's alpha, Cohen's kappa, raw agreement, with intervals.

What is undefined says why, and is never told as 0 or 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from data.intervals import bootstrap

Metric = Literal["nominal", "ordinal", "interval"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with its interval, or why there is none; `count` is what it rests on."""

    value: float | None
    interval: tuple[float, float] | None = None
    count: int = 0
    reason: str | None = None


def alpha(units: Sequence[Sequence[Any]], metric: Metric) -> Measure:
    """Return alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        units: The judgements of each task, in any order; those of fewer than two are left out.
            Numbers for `ordinal` and `interval`.
    """
    used = [unit for unit in units if len(unit) > 1]
    if not used:
        return Measure(None, reason="no task has judgements of two labelers")
    values = sorted({value for unit in used for value in unit}, key=_order)
    if len(values) == 1:
        return Measure(
            None, count=len(used), reason="all judgements are the same, so chance cannot be told"
        )
    index = {value: place for place, value in enumerate(values)}
    parts = np.zeros((len(used), len(values), len(values)))
    for part, unit in zip(parts, used, strict=True):
        counts = np.zeros(len(values))
        for value in unit:
            counts[index[value]] += 1
        part += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    flat = parts.reshape(len(used), -1)
    scale = np.arange(len(values)) if metric == "nominal" else np.array(values, dtype=float)

    def measure(weights: np.ndarray) -> float | None:
        return _alpha((weights @ flat).reshape(len(values), len(values)), scale, metric)

    found = measure(np.ones(len(used)))
    return Measure(found, bootstrap(len(used), measure), len(used))


def _alpha(coincidences: np.ndarray, values: np.ndarray, metric: Metric) -> float | None:
    """Return alpha of a coincidence matrix [V, V]; None where no disagreement is expected."""
    totals = coincidences.sum(1)
    n = totals.sum()
    if metric == "nominal":
        distance = 1.0 - np.eye(len(values))
    elif metric == "interval":
        distance = (values[:, None] - values[None]) ** 2
    else:
        upto = np.cumsum(totals) - totals / 2  # ranks between two values, half of each end
        distance = (upto[:, None] - upto[None]) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / (n - 1)
    if expected <= 0:
        return None
    return float(1 - (coincidences * distance).sum() / expected)


def raw_agreement(units: Sequence[Sequence[Hashable]]) -> Measure:
    """Return the mean share of pairs of labelers that say the same of a task."""
    shares = []
    for unit in units:
        if len(unit) > 1:
            pairs = list(combinations(unit, 2))
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    if not shares:
        return Measure(None, reason="no task has judgements of two labelers")
    found = np.array(shares)

    def measure(weights: np.ndarray) -> float:
        return float(weights @ found / weights.sum())

    return Measure(float(found.mean()), bootstrap(len(found), measure), len(found))


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Measure:
    """Return Cohen's kappa of two labelers' answers to the same tasks (Cohen 1960)."""
    if not first:
        return Measure(None, reason="they share no task")
    names = sorted({*first, *second}, key=_order)
    index = {name: place for place, name in enumerate(names)}
    a = np.array([index[value] for value in first])
    b = np.array([index[value] for value in second])

    def measure(weights: np.ndarray) -> float | None:
        table = np.zeros((len(names), len(names)))
        np.add.at(table, (a, b), weights)
        table /= table.sum()
        by_chance = table.sum(1) @ table.sum(0)
        return (
            None
            if by_chance >= 1 - 1e-12
            else float((np.trace(table) - by_chance) / (1 - by_chance))
        )

    found = measure(np.ones(len(a)))
    if found is None:
        return Measure(None, count=len(a), reason="both gave one and the same answer throughout")
    return Measure(found, bootstrap(len(a), measure), len(a))


def kappas(answers: Mapping[str, Mapping[str, Hashable]]) -> list[tuple[str, str, Measure]]:
    """Return kappa of every two labelers who share a task.

    Args:
        answers: By labeler, then by task.
    """
    found = []
    for one, other in combinations(sorted(answers), 2):
        shared = sorted(answers[one].keys() & answers[other].keys())
        if shared:
            pairs = ([answers[who][task] for task in shared] for who in (one, other))
            found.append((one, other, kappa(*pairs)))
    return found


def _order(value: Any) -> Any:
    """Sort numbers by size, and anything else by how it reads."""
    is_number = isinstance(value, int | float)
    return (0, value, "") if is_number else (1, 0, repr(value))

"""How far labelers agree: Krippendorff's alpha, Cohen's kappa, raw agreement, with intervals.

What is undefined says why, and is never told as 0 or 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from data.intervals import bootstrap

TINY = 1e-12  # of disagreement, which is none
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
    alike = Counter(tuple(sorted(map(index.__getitem__, unit))) for unit in used)
    parts = np.zeros((len(alike), len(values), len(values)))
    for part, unit in zip(parts, alike, strict=True):
        counts = np.zeros(len(values))
        for place in unit:
            counts[place] += 1
        part += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    flat = parts.reshape(len(alike), -1)
    kinds = list(alike.values())
    scale = np.arange(len(values)) if metric == "nominal" else np.array(values, dtype=float)

    def measure(weights: np.ndarray) -> np.ndarray:
        return _alpha((weights @ flat).reshape(-1, len(values), len(values)), scale, metric)

    [found] = measure(np.array([kinds]))
    return Measure(float(found), bootstrap(len(used), measure, kinds), len(used))


def _alpha(coincidences: np.ndarray, values: np.ndarray, metric: Metric) -> np.ndarray:
    """Return alpha of R coincidence matrices [R, V, V]; NaN where no disagreement is expected."""
    totals = coincidences.sum(2)
    if metric == "nominal":
        distance = 1.0 - np.eye(len(values))
    elif metric == "interval":
        distance = (values[:, None] - values[None]) ** 2
    else:
        upto = np.cumsum(totals, 1) - totals / 2  # ranks between two values, half of each end
        distance = (upto[:, :, None] - upto[:, None]) ** 2
    chance = totals[:, :, None] * totals[:, None] / (totals.sum(1) - 1)[:, None, None]
    return _share_left(*((table * distance).sum((1, 2)) for table in (coincidences, chance)))


def _share_left(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return 1 - part / whole; NaN where the whole is 0."""
    known = whole > TINY
    return np.where(known, 1 - part / np.where(known, whole, 1), np.nan)


def raw_agreement(units: Sequence[Sequence[Hashable]]) -> Measure:
    """Return the mean share of pairs of labelers that say the same of a task."""
    shares = []
    for unit in units:
        if len(unit) > 1:
            pairs = list(combinations(unit, 2))
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    if not shares:
        return Measure(None, reason="no task has judgements of two labelers")
    alike = Counter(shares)
    found, kinds = np.array(list(alike)), list(alike.values())

    def measure(weights: np.ndarray) -> np.ndarray:
        return weights @ found / len(shares)

    interval = bootstrap(len(shares), measure, kinds)
    return Measure(float(np.mean(shares)), interval, len(shares))


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Measure:
    """Return Cohen's kappa of two labelers' answers to the same tasks (Cohen 1960)."""
    if not first:
        return Measure(None, reason="they share no task")
    names = sorted({*first, *second}, key=_order)
    index = {name: place for place, name in enumerate(names)}
    count = len(first)
    pairs = ((index[a], index[b]) for a, b in zip(first, second, strict=True))
    cells = Counter(a * len(names) + b for a, b in pairs)
    kinds = [cells[cell] for cell in range(len(names) ** 2)]

    def measure(weights: np.ndarray) -> np.ndarray:
        tables = weights.reshape(-1, len(names), len(names)) / count
        by_chance = (tables.sum(1) * tables.sum(2)).sum(1)
        return _share_left(1 - np.trace(tables, axis1=1, axis2=2), 1 - by_chance)

    [found] = measure(np.array([kinds]))
    if np.isnan(found):
        return Measure(None, count=count, reason="both gave one and the same answer throughout")
    return Measure(float(found), bootstrap(count, measure, kinds), count)


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

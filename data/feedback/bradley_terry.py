"""Strengths of models from comparisons of their answers (Bradley & Terry 1952).

Fitted by Hunter's MM iterations (2004, "MM algorithms for generalized Bradley-Terry models"); a tie
is half a win for each. Every two models that met get `PRIOR` of a tie in addition, so that one
which has always won has a strength that is high but finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PRIOR = 0.1
STEPS = 2000
ENOUGH = 1e-9
RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Strength:
    """A model's log-strength (mean 0 over the models), its interval, and its comparisons.

    P(a beats b) = 1 / (1 + exp(strength of b - strength of a)).
    """

    model: str
    value: float
    interval: tuple[float, float] | None
    comparisons: int


def strengths(results: Sequence[tuple[str, str, float]]) -> tuple[list[Strength], str | None]:
    """Return models by strength, the best first, and why there are none, if so.

    Args:
        results: First model, second model, and 1, 0.5 or 0 for the first; those of a model with
            itself are left out.
    """
    used = [result for result in results if result[0] != result[1]]
    names = sorted({name for first, second, _ in used for name in (first, second)})
    if len(names) < 2:
        return [], "no two models were compared"
    if not _connected(names, used):
        return [], "some models were never compared with the others, not even through a third"
    index = {name: place for place, name in enumerate(names)}
    a = np.array([index[first] for first, _, _ in used])
    b = np.array([index[second] for _, second, _ in used])
    wins = np.array([score for _, _, score in used])

    def fit(weights: np.ndarray) -> np.ndarray:
        table = np.zeros((len(names), len(names)))  # wins of row over column
        np.add.at(table, (a, b), weights * wins)
        np.add.at(table, (b, a), weights * (1 - wins))
        return _fit(table, met)

    met = np.zeros((len(names), len(names)), dtype=bool)
    met[a, b] = met[b, a] = True
    found = fit(np.ones(len(used)))
    draws = {name: np.empty(RESAMPLES) for name in names}
    generator = np.random.default_rng(0)
    for place in range(RESAMPLES):
        drawn = fit(generator.multinomial(len(used), np.full(len(used), 1 / len(used))))
        for name in names:
            draws[name][place] = drawn[index[name]]
    made = []
    for name in names:
        low, high = np.quantile(draws[name], [0.025, 0.975])
        count = int(((a == index[name]) | (b == index[name])).sum())
        value = float(found[index[name]])
        made.append(Strength(name, value, (float(low), float(high)), count))
    return sorted(made, key=lambda strength: -strength.value), None


def _fit(table: np.ndarray, met: np.ndarray) -> np.ndarray:
    """Return log-strengths of mean 0 of a table of wins [M, M]."""
    table = table + PRIOR / 2 * met
    games, total = table + table.T, table.sum(1)
    strength = np.ones(len(table))
    for _ in range(STEPS):
        shares = games / (strength[:, None] + strength[None])
        new = total / shares.sum(1)
        new /= np.exp(np.log(new).mean())
        done = np.abs(np.log(new / strength)).max() < ENOUGH
        strength = new
        if done:
            break
    return np.log(strength)


def _connected(names: Sequence[str], results: Sequence[tuple[str, str, float]]) -> bool:
    reached, waiting = {names[0]}, [names[0]]
    while waiting:
        name = waiting.pop()
        for first, second, _ in results:
            for near, far in ((first, second), (second, first)):
                if near == name and far not in reached:
                    reached.add(far)
                    waiting.append(far)
    return len(reached) == len(names)

"""Answers as orders of candidates, so that all kinds of comparison are treated alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any


def best_of(kind: str, answer: Mapping[str, Any]) -> Any:
    """Return what an answer says is best, in a form in which answers can be compared.

    `pairwise`: a position, "tie" or "both_bad"; `ranking`: the tuple of the best positions;
    `likert`: the tuple of the ratings; `thumbs`: the thumb; `edit`: whether there is one.
    """
    if kind == "pairwise":
        return answer["choice"]
    if kind == "ranking":
        ranks = answer["ranks"]
        return tuple(index for index, rank in enumerate(ranks) if rank == min(ranks))
    if kind == "likert":
        return tuple(sorted(answer["axes"].items()))
    return answer.get("thumb", "edited")


def comparisons(kind: str, answer: Mapping[str, Any]) -> Iterator[tuple[int, int, float]]:
    """Yield first, second and how it went for the first (1 won, 0.5 tied, 0 lost), by positions.

    Nothing where both are bad, or the kind compares nothing.
    """
    if kind == "pairwise" and answer["choice"] != "both_bad":
        choice = answer["choice"]
        yield 0, 1, 0.5 if choice == "tie" else 1.0 if choice == 0 else 0.0
    elif kind == "ranking":
        ranks = answer["ranks"]
        for first, second in combinations(range(len(ranks)), 2):
            difference = ranks[second] - ranks[first]
            yield first, second, 0.5 if difference == 0 else 1.0 if difference > 0 else 0.0


def is_right(kind: str, answer: Mapping[str, Any], gold: Mapping[str, Any]) -> bool:
    """Tell whether an answer says what gold says; ratings may be one off, edits are not judged."""
    if kind == "likert":
        return all(abs(answer["axes"][axis] - value) <= 1 for axis, value in gold["axes"].items())
    if kind == "edit":
        return True
    if kind == "ranking":
        wrong = [
            (a, b)
            for (a, b, wins), (_, _, wanted) in zip(
                comparisons(kind, answer), comparisons(kind, gold), strict=True
            )
            if wanted != 0.5 and wins != wanted
        ]
        return not wrong
    return bool(best_of(kind, answer) == best_of(kind, gold))

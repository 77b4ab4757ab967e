"""What decides a round: which prompts are held out, what each judgement counts, and the rule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from data.db import Database
from data.errors import InvalidInput
from data.feedback import tasks
from data.intervals import wilson
from data.tables_feedback import LabelTask

OLD, NEW = 0, 1  # positions of the candidates of a comparison
MOST_HELD_OUT = 0.25  # of the prompts


@dataclass(frozen=True, slots=True)
class Rule:
    """When the new model takes the old one's place.

    Attributes:
        min_win_rate: Ties are half a win, and so are prompts to which both gave the same answer.
        min_judgements: With fewer the new model is rejected.
        certain: Whether the lower end of the win rate's 95 % interval must reach it too.
    """

    min_win_rate: float = 0.5
    min_judgements: int = 10
    certain: bool = False

    def check(self) -> None:
        """Raises InvalidInput."""
        if not 0 <= self.min_win_rate <= 1:
            raise wrong("rule.min_win_rate", self.min_win_rate, "0 to 1")
        if not 1 <= self.min_judgements <= 100_000:
            raise wrong("rule.min_judgements", self.min_judgements, "1 to 100000")


def points(database: Database, comparison: str) -> list[float]:
    """Return what the new model got of each judgement: 1, 0, or a half."""
    with database.read() as session:
        query = select(LabelTask).where(LabelTask.label_project_id == comparison)
        found = []
        for task in session.scalars(query.order_by(LabelTask.number)):
            answers = [answer for _, answer in tasks.answers_of(session, task.id)]
            if task.settled is not None:
                answers = [task.settled["answer"]]
            choices = [answer["choice"] for answer in answers]
            found += [{NEW: 1.0, OLD: 0.0}.get(choice, 0.5) for choice in choices]
    return found


def verdict(rule: Rule, found: Sequence[float], same: int) -> dict[str, Any]:
    """Apply a rule to points and to prompts with the same answer; returns decision and reasons."""
    count = len(found) + same
    won = sum(found) + same / 2
    rate = won / count if count else 0.0
    low, high = wilson(won, count)
    rules = [
        (
            len(found) >= rule.min_judgements,
            f"{len(found)} judgements of at least {rule.min_judgements}",
        ),
        (
            rate >= rule.min_win_rate,
            f"win rate {rate:.1%} ({low:.1%} to {high:.1%}) of at least {rule.min_win_rate:.1%}",
        ),
    ]
    if rule.certain:
        enough = low >= rule.min_win_rate
        rules.append((enough, f"its lower end {low:.1%} of at least {rule.min_win_rate:.1%}"))
    failed = [reason for passed, reason in rules if not passed]
    return {
        "promote": not failed,
        "reasons": failed or [reason for _, reason in rules],
        "win_rate": rate,
        "win_rate_interval": [low, high],
        "judgements": len(found),
        "same": same,
    }


def hold_out(
    exported: Sequence[dict[str, Any]], wanted: int, seed: int
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return prompts to compare on, and the rows of all others.

    Raises:
        InvalidInput: There are too few prompts.
    """
    by_prompt: dict[str, Any] = {repr(row["prompt"]): row["prompt"] for row in exported}
    count = min(wanted, int(MOST_HELD_OUT * len(by_prompt)))
    if not count:
        raise InvalidInput(
            f"The judgements concern {len(by_prompt)} prompts; a round needs at least "
            f"{round(1 / MOST_HELD_OUT)}, to hold some out for the comparison.",
            param="label_project_id",
        )
    names = set(random.Random(seed).sample(sorted(by_prompt), count))
    kept = [row for row in exported if repr(row["prompt"]) not in names]
    return [by_prompt[name] for name in sorted(names)], kept


def wrong(name: str, value: Any, wanted: str) -> InvalidInput:
    """Return the error of a setting out of its range."""
    return InvalidInput(f"Invalid '{name}': {value!r}; expected {wanted}.", param=name)

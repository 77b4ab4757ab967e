"""Answers that models gave to the same prompt, as tasks of a labeling project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data.errors import InvalidInput
from data.feedback.label_kinds import CANDIDATES
from data.feedback.tasks import CandidateSpec, Prompt, TaskSpec

MAX_PROMPTS = 100  # of one call
MAX_ANSWERS = 1000


def check_draw(kind: str, prompts: int, models: int, count: int) -> None:
    """Make sure that `count` answers of each model make tasks of a kind; raises InvalidInput."""
    total = models * count
    if not 1 <= prompts <= MAX_PROMPTS:
        raise InvalidInput(
            f"Invalid 'prompts': {prompts}; give 1 to {MAX_PROMPTS} in one call.", param="prompts"
        )
    if prompts * total > MAX_ANSWERS:
        raise InvalidInput(
            f"{prompts} prompts with {total} answers each are {prompts * total} answers; at most "
            f"{MAX_ANSWERS} are drawn in one call.",
            param="count",
        )
    if kind == "pairwise" and total % 2:
        raise InvalidInput(
            f"{models} models with {count} answers each are {total} answers, which do not go into "
            "pairs; give an even number.",
            param="count",
        )
    low, high = CANDIDATES["ranking"]
    if kind == "ranking" and not low <= total <= high:
        raise InvalidInput(
            f"{models} models with {count} answers each are {total} answers; a ranking has "
            f"{low} to {high}.",
            param="count",
        )


def as_tasks(
    kind: str,
    prompt: Prompt,
    answers: Sequence[CandidateSpec],
    left_out: Counter[str],
    end_user: str | None = None,
) -> list[TaskSpec]:
    """Return the tasks that answers to a prompt make.

    `pairwise`: the first two, the next two, and so on; `ranking`: one of all that differ; the other
    kinds: one of each that differs. Empty answers, and pairs of the same text, are left out.

    Args:
        left_out: Counts what was left out, and why.
    """
    if kind == "pairwise":
        groups = [list(answers[at : at + 2]) for at in range(0, len(answers), 2)]
    else:
        different = list({answer.text: answer for answer in answers}.values())
        left_out["same"] += len(answers) - len(different)
        full = [answer for answer in different if answer.text.strip()]
        left_out["empty"] += len(different) - len(full)
        groups = [full] if kind == "ranking" else [[answer] for answer in full]
    made = []
    for group in groups:
        texts = [answer.text for answer in group]
        if not all(text.strip() for text in texts):
            left_out["empty"] += 1
        elif len(set(texts)) < CANDIDATES[kind][0]:
            left_out["same"] += kind == "pairwise"
        else:
            made.append(TaskSpec(prompt, group, end_user=end_user))
    return made

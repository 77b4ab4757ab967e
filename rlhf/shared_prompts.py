"""Prompts that are both learned on and judged on, which make a judgement look too good."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.comparisons import Group
from rlhf.prompts import Prompt
from train.batches import name_lines

Ids = tuple[int, ...]
Asked = Iterable[tuple[int, Ids]]  # the line of a row, and the ids of its prompt before any cut


def warn_of_shared(learned: Asked, judged: Asked, name: str) -> list[str]:
    """Return what to warn of where a file asks what is learned on too; nothing where it does not.

    Args:
        learned: Of the training file.
        judged: Of the other.
        name: The setting that names the other.
    """
    known = {ids for _, ids in learned}
    lines = sorted({line for line, ids in judged if ids in known})
    if not lines:
        return []
    rows = f"1 row of {name} has" if len(lines) == 1 else f"{len(lines)} rows of {name} have"
    return [
        f"{rows} a prompt that the training file has too, so what is measured there "
        f"flatters the model: {name_lines(lines)}"
    ]


def of_groups(groups: Iterable[Group]) -> list[tuple[int, Ids]]:
    """Return the lines and ids of comparisons' prompts."""
    return [(pair.line, group.prompt) for group in groups for pair in group.pairs]


def of_prompts(prompts: Iterable[Prompt]) -> list[tuple[int, Ids]]:
    """Return the lines and ids of prompts."""
    return [(prompt.line, prompt.ids) for prompt in prompts]

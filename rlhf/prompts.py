"""The prompts of a run: read from rows of any kind, rendered as the server reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.checks import KNOWN_KEYS
from data.errors import DataError, ToolkitError
from data.jsonl import is_blank_line, iter_lines, read_numbered_rows
from data.parse import decode_object
from data.prompt_format import prompt_format
from data.render import question, render_prompt
from data.rows import (
    TAGS,
    Format,
    Preference,
    PromptOnly,
    Ranking,
    Reinforcement,
    Row,
    Text,
    Unpaired,
)
from data.validate import validate


@dataclass(frozen=True)
class Prompt:
    """One prompt: its line, its ids, what people read of it, and what a grader may read."""

    line: int
    ids: tuple[int, ...]
    text: str
    item: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Prompts:
    """A file's prompts, and the lines that were dropped.

    Attributes:
        too_long: Lines whose prompt is longer than the limit.
        repeated: Lines that say what an earlier one says: the same prompt for the same grading.
    """

    rows: list[Prompt]
    too_long: list[int]
    repeated: list[int] = field(default_factory=list)


def load_prompts(
    path: Path, tokenizer: Any, max_length: int, advice: str = "raise max_prompt_length"
) -> Prompts:
    """Check and render a file of prompts; the same prompt with the same other keys is one.

    Args:
        max_length: Most tokens of a prompt.
        advice: What to do where every prompt has more.

    Raises:
        DataError: The file is absent or has problems, or no prompt is short enough.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; give the path of a JSONL file of prompts", code="file_not_found"
        )
    report = validate(path, prompt_format(path), min_examples=1)
    if not report.ok:
        raise DataError(f"{path} cannot be used.\n{report.summary()}", code="invalid_file")
    if report.format is Format.TEXT:
        raise DataError(f"{path} holds texts, which ask nothing; give prompts", code="wrong_format")
    found: dict[tuple[tuple[int, ...], str], Prompt] = {}
    too_long, repeated = [], []
    for line, row, others in _read(path, report.format):
        try:
            prompt = _prompt(tokenizer, line, row, others)
        except ToolkitError as error:
            raise DataError(f"{path} line {line}: {error.message}", code=error.code) from error
        if len(prompt.ids) > max_length:
            too_long.append(line)
        elif found.setdefault(_key(prompt), prompt) is not prompt:
            repeated.append(line)
    if not found:
        raise DataError(
            f"every prompt of {path} has more than {max_length} tokens; {advice}",
            code="example_too_long",
        )
    return Prompts(list(found.values()), too_long, repeated)


class PromptStream:
    """An endless order of prompts: a new permutation each pass, the same for the same seed."""

    def __init__(self, count: int, seed: int):
        self._count = count
        self._seed = seed

    def take(self, start: int, number: int) -> list[int]:
        """Return the indices of the prompts at places start, start + 1, ... of the order."""
        return [self._at(place) for place in range(start, start + number)]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self._count)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(self._count, generator=generator).tolist()
        return int(self._order[index])


def _key(prompt: Prompt) -> tuple[tuple[int, ...], str]:
    return prompt.ids, json.dumps(prompt.item, sort_keys=True)


def _read(path: Path, format: Format | None) -> Iterator[tuple[int, Row, dict[str, Any]]]:
    """Yield each row of a checked file with its line and the keys that are not of its kind."""
    rows = read_numbered_rows(path, format)
    known = None if format is None else KNOWN_KEYS.get(format)
    if known is None:  # rows that keep their other keys themselves
        for number, row in rows:
            yield number, row, {}
        return
    if format in (Format.PREFERENCE, Format.RANKING):  # whose comparison it was, say
        known -= frozenset(TAGS)
    with path.open("rb") as stream:
        lines = (line for _, _, line in iter_lines(stream) if not is_blank_line(line))
        for (number, row), line in zip(rows, lines, strict=True):
            value = decode_object(line)
            given = value.items() if isinstance(value, dict) else ()
            yield number, row, {k: v for k, v in given if k not in known and v is not None}


def _prompt(tokenizer: Any, line: int, row: Row, others: Mapping[str, Any]) -> Prompt:
    item: Mapping[str, Any] = others
    if isinstance(row, PromptOnly):
        ids, item = render_prompt(tokenizer, row.prompt), row.fields
    elif isinstance(row, Reinforcement):
        ids, item = render_prompt(tokenizer, row.messages, row.tools), row.fields
    elif isinstance(row, Preference | Ranking):
        ids = render_prompt(tokenizer, row.prompt, row.tools)
    elif isinstance(row, Unpaired):
        ids = render_prompt(tokenizer, row.prompt)
    elif isinstance(row, Text):
        raise DataError("A text asks nothing", code="wrong_format")
    else:
        ids, answer = question(tokenizer, row)
        item = {**others, "completion": answer}
    return Prompt(line, tuple(ids), tokenizer.decode(ids, skip_special_tokens=True), item)

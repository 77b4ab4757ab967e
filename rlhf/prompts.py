"""The prompts of a run: read from rows of any kind, rendered as the server reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError, ToolkitError
from data.jsonl import read_numbered_rows
from data.prompt_format import prompt_format
from data.render import question, render_prompt
from data.rows import Format, Preference, PromptOnly, Ranking, Reinforcement, Row, Text, Unpaired
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
    """A file's prompts; `too_long` are the lines that were dropped."""

    rows: list[Prompt]
    too_long: list[int]


def load_prompts(path: Path, tokenizer: Any, max_length: int) -> Prompts:
    """Check and render a file of prompts; the same prompt twice is one.

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
    found: dict[tuple[int, ...], Prompt] = {}
    too_long = []
    for line, row in read_numbered_rows(path, report.format):
        try:
            prompt = _prompt(tokenizer, line, row)
        except ToolkitError as error:
            raise DataError(f"{path} line {line}: {error.message}", code=error.code) from error
        if len(prompt.ids) > max_length:
            too_long.append(line)
        else:
            found.setdefault(prompt.ids, prompt)
    if not found:
        raise DataError(
            f"every prompt of {path} has more than {max_length} tokens; raise max_prompt_length",
            code="example_too_long",
        )
    return Prompts(list(found.values()), too_long)


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


def _prompt(tokenizer: Any, line: int, row: Row) -> Prompt:
    if isinstance(row, PromptOnly):
        ids, item = render_prompt(tokenizer, row.prompt), row.fields
    elif isinstance(row, Reinforcement):
        ids, item = render_prompt(tokenizer, row.messages, row.tools), row.fields
    elif isinstance(row, Preference | Ranking):
        ids, item = render_prompt(tokenizer, row.prompt, row.tools), {}
    elif isinstance(row, Unpaired):
        ids, item = render_prompt(tokenizer, row.prompt), {}
    elif isinstance(row, Text):
        raise DataError("A text asks nothing", code="wrong_format")
    else:
        ids, answer = question(tokenizer, row)
        item = {"completion": answer}
    return Prompt(line, tuple(ids), tokenizer.decode(ids, skip_special_tokens=True), item)

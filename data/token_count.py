"""How many tokens a file's rows are, as training reads them.

The tokenizer is passed in. Tokens are counted exactly up to MAX_COUNTED rows; of a larger file
every n-th row is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.jsonl import read_numbered_rows
from data.render import render, render_answer
from data.report import Report
from data.rows import Preference, Ranking, Row, Unpaired

MAX_COUNTED = 5000  # rows
SAMPLED = 4


@dataclass(slots=True)
class TokenCount:
    """Of one pass over a file.

    Attributes:
        long: Rows counted that are longer than the limit.
        exact: Whether every row was counted.
        sample: Token ids of a few rows.
    """

    tokens: int
    long: int
    exact: bool
    sample: list[tuple[int, ...]] = field(default_factory=list)


def count_tokens(
    path: Path, report: Report, tokenizer: Any, max_length: int, drops_long: bool = False
) -> TokenCount:
    """Count a valid file's tokens; rows are cut to `max_length`, or left out if `drops_long`.

    Raises:
        DataError: A row cannot be rendered; the message names its line.
    """
    every = -(-report.num_examples // MAX_COUNTED)
    counted = long = tokens = 0
    sample: list[tuple[int, ...]] = []
    for number, (line, row) in enumerate(read_numbered_rows(path, report.format)):
        if number % every:
            continue
        try:
            rendered = _sequences(tokenizer, row)
        except DataError as error:
            raise DataError(f"line {line}: {error.message}", code=error.code) from error
        counted += 1
        is_long = any(len(ids) > max_length for ids in rendered)
        long += is_long
        if not (is_long and drops_long):
            tokens += sum(min(len(ids), max_length) for ids in rendered)
        if len(sample) < SAMPLED:
            sample.append(rendered[0][:max_length])
    return TokenCount(round(tokens * report.num_examples / counted), long, every == 1, sample)


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens that a row must not spell out."""
    return [token for token in tokenizer.all_special_tokens if len(token) > 2]


def _sequences(tokenizer: Any, row: Row) -> list[tuple[int, ...]]:
    """Return the token ids that a row is read as: one sequence for each answer in it."""
    if isinstance(row, Preference):
        answers = [row.chosen, row.rejected]
    elif isinstance(row, Ranking):
        answers = list(row.completions)
    elif isinstance(row, Unpaired):
        answers = [row.completion]
    else:
        return [render(tokenizer, row).input_ids]
    tools = None if isinstance(row, Unpaired) else row.tools
    return [render_answer(tokenizer, row.prompt, one, tools).input_ids for one in answers]

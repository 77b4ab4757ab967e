"""Rows that ask something with a known answer, as questions for a model.

Rows with one prompt are one question with several right answers; a row may also list them as
`references`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data.check_parts import show
from data.errors import DataError, ToolkitError
from data.jsonl import iter_lines
from data.render import question
from data.rows import Row


@dataclass
class Question:
    """One prompt, its right answers, and what the model said: text, and its tokens with EOS where
    it ended by itself."""

    line: int
    prompt_ids: tuple[int, ...]
    answers: list[str] = field(default_factory=list)
    said: str = ""
    said_ids: tuple[int, ...] = ()

    @property
    def is_right(self) -> bool:
        return self.said.strip() in {answer.strip() for answer in self.answers}


def read_questions(path: Path, tokenizer: Any, rows: Iterable[tuple[int, Row]]) -> list[Question]:
    """Return the questions of a file: rows of one prompt are one, with all their answers.

    Raises:
        DataError: A row asks nothing that has a right answer, or its `references` are no texts.
    """
    references = _references(path)
    questions: dict[tuple[int, ...], Question] = {}
    for line, row in rows:
        try:
            ids, answer = question(tokenizer, row)
        except ToolkitError as error:
            raise DataError(f"line {line}: {error.message}", code=error.code) from error
        asked = questions.setdefault(tuple(ids), Question(line, tuple(ids)))
        asked.answers += references.get(line) or [answer]
    return list(questions.values())


def _references(path: Path) -> dict[int, list[str]]:
    """Read the column `references`, which training does not know, by line; null is none.

    Raises:
        DataError: It is neither a string nor a list of strings.
    """
    found = {}
    with path.open("rb") as stream:
        for number, _, line in iter_lines(stream):
            if b'"references"' not in line:
                continue
            given = orjson.loads(line).get("references")
            texts = [given] if isinstance(given, str) else [] if given is None else given
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f'{path}:{number}: "references" is {show(given)}; give a string or a list of '
                    "strings",
                    code="invalid_file",
                )
            found[number] = texts
    return found

"""Labelled texts for the moderation classifier, read from JSONL.

A row has `text` (or `prompt`) and either `labels`, an object of category -> 0 or 1 in which a
category that is missing is unknown, or `label`, one word that `VALUE=CATEGORY` pairs map: then a
row is 1 for the category of its own word and 0 for those of the other words of its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, InvalidInput


@dataclass
class Labelled:
    """Texts and what is known of each.

    Attributes:
        known: Of each category, one number a text: 1, 0, or -1 for unknown.
    """

    texts: list[str] = field(default_factory=list)
    known: dict[str, list[int]] = field(default_factory=dict)

    def add(self, text: str, labels: Mapping[str, int]) -> None:
        """Add a text."""
        for category in labels:
            self.known.setdefault(category, [-1] * len(self.texts))
        self.texts.append(text)
        for category, values in self.known.items():
            values.append(labels.get(category, -1))

    def of(self, category: str) -> np.ndarray:
        """Return what is known of a category, one number a text."""
        return np.array(self.known.get(category, [-1] * len(self.texts)))


def read_map(words: Iterable[str]) -> dict[str, str]:
    """Read `VALUE=CATEGORY` pairs; raises InvalidInput."""
    found = {}
    for word in words:
        value, sign, category = word.partition("=")
        if not (value and sign and category):
            raise InvalidInput(f'Invalid label "{word}"; expected VALUE=CATEGORY, as hateful=hate')
        found[value] = category
    return found


def read(paths: Iterable[Path], mapped: Mapping[str, str]) -> Labelled:
    """Read labelled files; raises DataError naming file and line."""
    found = Labelled()
    for path in paths:
        rows = list(_rows(path))
        words = {row["label"] for _, row in rows if isinstance(row.get("label"), str)}
        in_file = {category for value, category in mapped.items() if value in words}
        for line, row in rows:
            found.add(_text(path, line, row), _labels(path, line, row, mapped, in_file))
    return found


def read_benign(found: Labelled, paths: Iterable[Path], categories: Iterable[str]) -> None:
    """Add texts that are known to be of no category."""
    labels = dict.fromkeys(categories, 0)
    for path in paths:
        for line, row in _rows(path):
            found.add(_text(path, line, row), labels)


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object")
            yield number, row


def _text(path: Path, line: int, row: Mapping[str, Any]) -> str:
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{path}:{line}: expected a string that is not empty as "text"')
    return text


def _labels(
    path: Path, line: int, row: Mapping[str, Any], mapped: Mapping[str, str], in_file: set[str]
) -> dict[str, int]:
    labels = row.get("labels")
    if isinstance(labels, dict) and all(value in (0, 1) for value in labels.values()):
        return {str(name): int(value) for name, value in labels.items()}
    if labels is None and isinstance(row.get("label"), str) and in_file:
        return {category: int(mapped.get(row["label"]) == category) for category in in_file}
    raise DataError(
        f'{path}:{line}: expected "labels" (category -> 0 or 1), or a "label" that --label maps'
    )

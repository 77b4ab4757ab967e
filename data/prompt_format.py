"""Telling files of prompts alone from files whose rows lack an answer by mistake."""

from __future__ import annotations

from pathlib import Path

import orjson

from data.jsonl import iter_lines
from data.rows import Format

ANSWER_KEYS = {"completion", "completions", "chosen", "rejected", "messages", "text"}


def prompt_format(path: Path) -> Format | str:
    """Return the format to read a file of prompts by: rows of a prompt alone need to be named."""
    with path.open("rb") as stream:
        for _, _, line in iter_lines(stream):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                break  # validation tells
            if isinstance(row, dict) and "prompt" in row and not row.keys() & ANSWER_KEYS:
                return Format.PROMPT_ONLY
            break
    return "auto"

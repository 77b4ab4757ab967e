"""What a file holds by its first row: rows for the job's method, or prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import orjson

from data.errors import InvalidInput, NotFound
from data.files import FileStore
from data.job_methods import METHODS, unusable_rows
from data.job_spec import JobSpec
from data.jsonl import iter_lines
from data.rows import Format, detect

ANSWER_KEYS = {"completion", "completions", "chosen", "rejected", "messages", "text"}


def prompt_format(file: Path | BinaryIO) -> Format | str:
    """Return the format to read a file of prompts by: rows of a prompt alone need to be named."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return prompt_format(stream)
    row = _first_row(file)
    return Format.PROMPT_ONLY if row is not None and _is_prompt(row) else "auto"


def format_of(files: FileStore, project_id: str, file_id: str) -> Format | None:
    """Return the kind of a file's first row; None if there is no such file, or no known kind."""
    try:
        with files.open(project_id, file_id) as stream:
            row = _first_row(stream)
    except (NotFound, FileNotFoundError):
        return None
    return None if row is None else detect(row)


def check_rows(files: FileStore, project_id: str, spec: JobSpec) -> None:
    """Check by their first rows that a job's files are what its method learns from.

    Files that are absent, and rows that are nothing known, are told of where jobs are made and
    files validated.

    Raises:
        InvalidInput: The rows are for another method.
    """
    for param in ("training_file", "validation_file"):
        file_id = getattr(spec, param)
        if file_id is None:
            continue
        try:
            with files.open(project_id, file_id) as stream:
                row = _first_row(stream)
        except (NotFound, FileNotFoundError):
            continue
        kind = None if row is None else detect(row)
        if row is not None and METHODS[spec.method_type].graded and _is_prompt(row):
            kind = Format.PROMPT_ONLY
        misfit = None if kind is None else unusable_rows(spec.method_type, spec.options, kind)
        if misfit is not None:
            raise InvalidInput(f"Invalid '{param}': the rows of {file_id} {misfit}", param=param)


def _first_row(stream: BinaryIO) -> dict[str, Any] | None:
    for _, _, line in iter_lines(stream):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return None  # validation tells
        return row if isinstance(row, dict) else None
    return None


def _is_prompt(row: dict[str, Any]) -> bool:
    return "prompt" in row and not row.keys() & ANSWER_KEYS

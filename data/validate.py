"""Validation of a JSONL dataset: one pass over a stream, in constant memory, every fault told.

    report = validate("support.jsonl")
    print(report.summary())

Level `syntax` asks only that every line is a JSON object, which is what an upload must be; level
`rows` also checks every row against its format, and warns of duplicates and of unused keys. What
needs a tokenizer, an example that is too long, is found later, by training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from data.check_parts import Finding
from data.checks import Extra
from data.duplicates import RowIndex
from data.fast_rows import Line, count_objects
from data.jsonl import (
    MAX_LINE_BYTES,
    Block,
    Readable,
    Source,
    is_blank_line,
    iter_blocks,
    open_source,
    source_name,
    too_long_message,
)
from data.locate import column_of
from data.overlap import find_overlap
from data.parse import RowParser, decode_object
from data.report import KEEP, Problem, Report, Tally, upload_error_message
from data.rows import Format, Row

__all__ = ["Problem", "Report", "find_overlap", "upload_error_message", "validate"]


def validate(
    source: Source,
    format: Format | str = "auto",
    *,
    min_examples: int = 10,
    level: Literal["rows", "syntax"] = "rows",
    special_tokens: Collection[str] = (),
    max_line_bytes: int = MAX_LINE_BYTES,
    name: str | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> Report:
    """Read a dataset once and report everything wrong with it.

    Args:
        source: A path or a binary stream.
        format: A `Format` or its value; "auto" takes the first row's for all.
        min_examples: Fewer lines than this are a problem (level `rows`).
        level: How much to check.
        special_tokens: Strings that no row may hold, the tokenizer's special tokens.
        max_line_bytes: A longer line is a problem, and is not held in memory.
        name: What to call the file in the report; the path by default.
        on_progress: Called with the number of bytes read so far.

    Raises:
        DataError: The path is not a file.
    """
    wanted = None if format == "auto" else Format(format)
    parser = RowParser(wanted, tuple(special_tokens))
    with open_source(source) as stream, RowIndex() as index:
        reader = _CountingReader(stream, on_progress)
        run = _Validation(parser, index, max_line_bytes)
        for block in iter_blocks(reader, max_line_bytes=max_line_bytes):
            if block.too_long:
                run.add_too_long(block)
            elif level == "syntax":
                run.check_syntax(block)
            else:
                run.check_rows(block)
            del block  # a long line goes before the next one comes
        run.finish(min_examples if level == "rows" else 0)
    return Report(
        name=name or source_name(source),
        format=parser.format,
        num_lines=run.num_lines,
        num_blank=run.num_blank,
        num_examples=run.num_examples,
        num_bad_lines=run.num_bad_lines,
        bytes=reader.num_bytes,
        sha256=reader.hash.hexdigest(),
        errors=run.errors,
        cautions=run.cautions,
    )


class _CountingReader:
    """A stream that hashes and counts what is read through it."""

    def __init__(self, stream: Readable, on_progress: Callable[[int], object] | None):
        self._stream = stream
        self._on_progress = on_progress
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.num_bytes += len(data)
        if self._on_progress is not None:
            self._on_progress(self.num_bytes)
        return data


@dataclass(slots=True)
class _Extra:
    """Where a key that training does not use was met."""

    line: int
    column: int
    count: int = 0
    lines: list[int] = field(default_factory=list)

    def problem(self, name: str) -> Problem:
        lines = ", ".join(map(str, self.lines)) + (", ..." if self.count > len(self.lines) else "")
        message = f'"{name}" is not used by training: rows with it: {self.count} (lines {lines})'
        fix = "Leave it if it is for your own use; check its spelling if it is not."
        return Problem(self.line, self.column, "extra_column", message, fix)


@dataclass(slots=True)
class _Validation:
    """The counts and findings of one pass."""

    parser: RowParser
    index: RowIndex
    max_line_bytes: int
    num_lines: int = 0
    num_blank: int = 0
    num_examples: int = 0
    num_bad_lines: int = 0
    errors: Tally = field(default_factory=Tally)
    cautions: Tally = field(default_factory=Tally)
    extras: dict[str, _Extra] = field(default_factory=dict)

    def check_rows(self, block: Block) -> None:
        rows = self.parser.parse_block(block.data)
        if rows is None:
            numbers, rows = self._check_each_row(block)
            lines = np.array(numbers, np.uint64)
        else:
            lines = np.arange(block.first_line, block.first_line + len(rows), dtype=np.uint64)
            self.num_lines += len(rows)
        self.num_examples += len(rows)
        self.index.add(rows, lines)

    def _check_each_row(self, block: Block) -> tuple[list[int], list[Row]]:
        numbers: list[int] = []
        rows: list[Row] = []
        for number, line in self._filled_lines(block):
            row, findings, extras = self.parser.parse_line(number, line)
            if extras:
                self._add_extras(number, line, extras)
            if row is None:
                self._add_findings(number, line, findings)
            else:
                numbers.append(number)
                rows.append(row)
        return numbers, rows

    def check_syntax(self, block: Block) -> None:
        num_rows = count_objects(block.data)
        if num_rows is not None:
            self.num_lines += num_rows
            self.num_examples += num_rows
            return
        for number, line in self._filled_lines(block):
            value = decode_object(line)
            if isinstance(value, Finding):
                self._add_findings(number, line, [value])
            else:
                self.num_examples += 1

    def _filled_lines(self, block: Block) -> list[tuple[int, Line]]:
        """The lines that are not blank, all lines being counted."""
        lines = block.lines()
        filled = [
            (number, line)
            for number, line in enumerate(lines, block.first_line)
            if not is_blank_line(line)
        ]
        self.num_lines += len(lines)
        self.num_blank += len(lines) - len(filled)
        return filled

    def add_too_long(self, block: Block) -> None:
        self.num_lines += 1
        message = too_long_message(block, self.max_line_bytes)
        fix = "Put one example on a line; a book is many examples."
        self._add_findings(
            block.first_line, b"", [Finding("line_too_long", message, fix, column=1)]
        )

    def _add_findings(self, number: int, line: Line, findings: Sequence[Finding]) -> None:
        self.num_bad_lines += 1
        for finding in findings:
            self.errors.add(finding.code, partial(_problem, number, line, finding))

    def _add_extras(self, number: int, line: Line, extras: Sequence[Extra]) -> None:
        for name, path in extras:
            if name not in self.extras:
                if len(self.extras) == KEEP:  # keys that look like data: their names are endless
                    self.cautions.counts["extra_column"] += 1
                    continue
                self.extras[name] = _Extra(number, column_of(line, path))
            extra = self.extras[name]
            extra.count += 1
            if len(extra.lines) < 5:
                extra.lines.append(number)

    def finish(self, min_examples: int) -> None:
        """Add what can only be told of the file as a whole."""
        num_filled = self.num_lines - self.num_blank
        if num_filled == 0:
            self._add_file_problem("empty_file", "the file has no examples", "Add examples.")
        elif num_filled < min_examples:
            message = f"the file has {num_filled} examples; at least {min_examples} are needed"
            fix = f"Add {min_examples - num_filled} or more."
            self._add_file_problem("invalid_n_examples", message, fix)
        for name, extra in self.extras.items():
            self.cautions.extend("extra_column", [extra.problem(name)], extra.count)
        repeats = self.index.repeats()
        self.cautions.extend(
            "duplicate_examples",
            [_duplicate(line, origin) for line, origin in repeats.first],
            repeats.total,
        )

    def _add_file_problem(self, code: str, message: str, fix: str) -> None:
        self.errors.add(code, lambda: Problem(None, None, code, message, fix))


def _problem(line: int, text: Line, finding: Finding) -> Problem:
    column = column_of(text, finding.path) if finding.column is None else finding.column
    return Problem(line, column, finding.code, finding.message, finding.fix)


def _duplicate(line: int, origin: int) -> Problem:
    message = f"the row says the same as line {origin}"
    return Problem(line, 1, "duplicate_examples", message, "Remove one of them.")

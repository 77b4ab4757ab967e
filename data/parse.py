"""From the bytes of a line to a typed row, or to everything that is wrong with them.

Two readings of one rule. The fast one, `data/fast_rows.py`, accepts what is plainly good; whatever
it does not accept, good or bad, goes to the exact one here, which parses the JSON and runs
`data/checks.py`. Nearly all lines of a good file take the first, whole blocks at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import orjson

from data.check_parts import Finding, Path, dotted, missing_key, show
from data.checks import KNOWN_KEYS, Extra, check_row, extra_keys
from data.fast_rows import FastReader, Line, decode_quickly
from data.rows import ROW_TYPES, Format, Row, canonical_preference, detect, to_row

MAX_DEPTH = 64  # levels of nesting; more than any row needs, fewer than any parser chokes on


class Parsed(NamedTuple):
    """A line that was read: its row if it is good, what is wrong if not, and its unused keys."""

    row: Row | None
    findings: Sequence[Finding] = ()
    extras: Sequence[Extra] = ()


class RowParser:
    """Reads the lines of one file; the first line whose format can be told sets it for all.

    Args:
        format: The format that every row must have; None takes the first row's.
        special_tokens: Strings with a meaning to the tokenizer that no row may hold.
    """

    def __init__(self, format: Format | None = None, special_tokens: Sequence[str] = ()):
        self.format = format
        self.format_line: int | None = None
        self._tokens = _pattern(special_tokens)
        self._escaped_tokens = _escaped_pattern(special_tokens)
        self._fast = None if format is None else FastReader(format)

    def parse_block(self, block: Line) -> Sequence[Row] | None:
        """All rows of a block of whole lines, if every one is plainly good; else None."""
        if self._fast is None or self._may_hold_tokens(block):
            return None
        return self._fast.read_block(block)

    def parse_line(self, number: int, line: Line) -> Parsed:
        """The row of a line that is not blank, or all that is wrong with it."""
        fast = None if self._fast is None or self._may_hold_tokens(line) else self._fast
        row = fast.read_line(line) if fast else None
        if row is not None:
            return Parsed(row)
        value = decode_object(line)
        if isinstance(value, Finding):
            return Parsed(None, [value])
        present = {key: item for key, item in value.items() if item is not None}
        parsed = self._parse_known(fast, line, present) if fast else None
        return parsed or self._parse_exactly(number, line, present)

    def _parse_known(self, fast: FastReader, line: Line, row: dict[str, Any]) -> Parsed | None:
        """The quick reading of what is left of a row without its unused keys, if it has such."""
        known_keys = KNOWN_KEYS.get(fast.format, row.keys())
        known = {key: item for key, item in row.items() if key in known_keys}
        if len(known) == len(row):
            return None
        good = fast.convert(line, known)
        extras = [(key, (key,)) for key in row if key not in known_keys]
        return None if good is None else Parsed(good, extras=extras)

    def _parse_exactly(self, number: int, line: Line, row: dict[str, Any]) -> Parsed:
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deeper(row, MAX_DEPTH):
            message = f"values are nested more than {MAX_DEPTH} levels deep"
            return Parsed(None, [Finding("too_deep", message, "Flatten the row.", column=1)])
        format = self._format_of(number, row)
        if isinstance(format, Finding):
            return Parsed(None, [format])
        known_keys = KNOWN_KEYS.get(format, row.keys())
        known = {key: item for key, item in row.items() if key in known_keys}
        findings = [*_repeated_keys(line, known), *check_row(row, format)]
        findings += _special_tokens(known, self._tokens)
        if findings:
            return Parsed(None, findings, extra_keys(row, format))
        return Parsed(to_row(row, format), extras=extra_keys(row, format))

    def _format_of(self, number: int, row: dict[str, Any]) -> Format | Finding:
        """The file's format if the row can be read as one of it; sets it if it is still open."""
        found = detect(row)
        if self.format is None and found is not None:
            self.format, self.format_line = found, number
            self._fast = FastReader(found)
        if found is None:
            return _unknown_keys(row, self.format)
        expected = cast(Format, self.format)
        if found is expected or _has_required_keys(row, expected):
            return expected
        since = f" as line {self.format_line} is" if self.format_line else ""
        return Finding(
            "mixed_formats",
            f"this is a {found} row; expected a {expected} row{since}",
            "Keep one format a file: move the rows of each to a file of their own.",
        )

    def _may_hold_tokens(self, data: Line) -> bool:
        """Whether a special token may be in raw JSON, as it is or hidden by an escape."""
        if self._escaped_tokens is None:
            return False
        return b"\\u" in data or b"\\/" in data or bool(self._escaped_tokens.search(data))


def decode_object(line: Line) -> dict[str, Any] | Finding:
    """Parse one line as a JSON object, strictly."""
    value = decode_quickly(line)
    if value is not None:
        return value
    try:
        value = orjson.loads(line)  # tells where it stops, for twice the memory
    except orjson.JSONDecodeError as error:
        return _not_utf8(line) or _not_json(line, error)
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else f"the value {show(value)}"
        message = f"expected a JSON object, got {kind} (line starts with: {_start(line)})"
        return Finding("not_an_object", message, 'Write each row as {"key": value, ...}.')
    return value


def _not_utf8(line: Line) -> Finding | None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        message = f"byte 0x{line[error.start]:02x} is not UTF-8"
        return Finding("invalid_utf8", message, "Save the file as UTF-8.", column=column)
    return None


def _not_json(line: Line, error: orjson.JSONDecodeError) -> Finding:
    rest = error.doc[error.pos : error.pos + 9]
    fix = "Write rows with a JSON library, each as one object on one line."
    if rest.startswith(("NaN", "Infinity", "-Infinity")):
        fix = "JSON has no NaN or Infinity: use null or leave the key out."
    elif rest.startswith("'"):
        fix = "JSON needs double quotes: write rows with json.dumps, not str."
    elif rest.startswith(","):
        fix = "Remove the comma."
    elif "surrogate" in error.msg:
        fix = "Escape the character as a pair of surrogates, or write it as UTF-8."
    elif len(line) < 9 and line.strip() in (b"[", b"{"):
        fix = "The file looks like one JSON document: write one object a line instead."
    message = f"{error.msg} (line starts with: {_start(line)})"
    return Finding("invalid_json", message, fix, column=error.pos + 1)


def _start(line: Line) -> str:
    return show(line[:200].decode(errors="replace")[:40])


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels, without recursion."""
    level: list[Any] = [value]
    for _ in range(limit + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return True


def _repeated_keys(line: Line, row: dict[str, Any]) -> Iterator[Finding]:
    """A top-level key written twice; only such a key or a value equal to it occurs twice quoted."""
    if any(line.count(f'"{key}"'.encode()) > 1 for key in row):
        pairs: list[tuple[str, Any]] = []

        def keep_last(found: list[tuple[str, Any]]) -> None:
            pairs[:] = found  # the outermost object is closed last

        json.loads(line, object_pairs_hook=keep_last)
        keys = [key for key, _ in pairs]
        for key in dict.fromkeys(key for key in keys if keys.count(key) > 1):
            message = f'"{key}" is given {keys.count(key)} times'
            yield Finding("duplicate_key", message, "Keep one of them.", (key,))


def _unknown_keys(row: dict[str, Any], expected: Format | None) -> Finding:
    if expected is not None:
        return missing_key(row, _REQUIRED[expected][0])
    keys = ", ".join(key[:40] for key in list(row)[:8]) or "none"
    return Finding(
        "missing_key",
        f"no known key in the row; its keys are: {keys}",
        'Use "prompt" and "completion", "messages", "prompt", "chosen" and "rejected", or "text".',
    )


def _has_required_keys(row: dict[str, Any], format: Format) -> bool:
    names = canonical_preference(row) if format is Format.PREFERENCE else row
    return all(key in names for key in _REQUIRED[format])


_REQUIRED: dict[Format, tuple[str, ...]] = {
    format: tuple(field.name for field in msgspec.structs.fields(row_type) if field.required)
    for format, row_type in ROW_TYPES.items()
}


def _pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def _escaped_pattern(tokens: Sequence[str]) -> re.Pattern[bytes] | None:
    """The tokens as they look inside a JSON string in which only what must be escaped is."""
    written = [json.dumps(token, ensure_ascii=False)[1:-1].encode() for token in tokens]
    return re.compile(b"|".join(map(re.escape, written))) if tokens else None


def _special_tokens(row: dict[str, Any], pattern: re.Pattern[str] | None) -> Iterator[Finding]:
    if pattern is None:
        return
    for path, text in _strings(row, ()):
        match = pattern.search(text)
        if match:
            yield Finding(
                "forbidden_special_token",
                f'"{dotted(path)}" holds the special token {match.group()}',
                "Remove it: the template adds such tokens, and a user's text must not.",
                path,
            )


def _strings(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for step, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(child, (*path, step))

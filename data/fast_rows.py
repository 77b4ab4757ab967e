"""The quick reading of rows that are plainly good.

Lines are decoded straight into the row type of the file's format, a block of them in one call. What
is accepted here is good by `data/checks.py` too; what is not may still be good, for example a row
with tools, text parts or unused keys, and is then read exactly by `data/parse.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np

from data.check_parts import is_blank
from data.rows import ROW_TYPES, TAGS, Format, Messages, Row

Line = bytes | bytearray
T = TypeVar("T")
_NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FastReader:
    """Decodes lines straight into the row type of a format, and accepts what is plainly good."""

    def __init__(self, format: Format):
        self.format = format
        self._decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(ROW_TYPES[format])
        self._all_good = _ALL_GOOD[format]
        fields = msgspec.structs.fields(ROW_TYPES[format])
        keys = {field.name: f'"{field.name}"'.encode() for field in fields}
        self._required = [keys[field.name] for field in fields if field.required]
        seen = ("label_prob", "margin", *TAGS)  # tools are not read here
        self._optional = [keys[name] for name in seen if name in keys]
        self._keys = self._required + self._optional

    def read_line(self, line: Line) -> Row | None:
        """The row of a line, if it is a good one."""
        return self._checked(line, partial(self._decoder.decode, line))

    def convert(self, line: Line, known: dict[str, Any]) -> Row | None:
        """The row of a line that was parsed and stripped of unused keys, if it is a good one."""
        return self._checked(line, partial(msgspec.convert, known, ROW_TYPES[self.format]))

    def _checked(self, line: Line, decode: Callable[[], Row]) -> Row | None:
        if any(line.count(key) > 1 for key in self._keys):
            return None  # perhaps a repeated key
        try:
            row = decode()
        except _NOT_DECODED:
            return None
        return row if self._all_good((row,)) else None

    def read_block(self, block: Line) -> Sequence[Row] | None:
        """All rows of a block, if every line is a good one."""
        rows = _decode_lines(self._decoder, block)
        if rows is None or any(block.count(key) != len(rows) for key in self._required):
            return None
        if any(key in block for key in self._optional):
            return None
        return rows if self._all_good(rows) else None


_object_decoder = msgspec.json.Decoder(dict[str, Any])


def decode_quickly(line: Line) -> dict[str, Any] | None:
    """The JSON object that a line is, or None when it is something else or hard to read."""
    try:
        return _object_decoder.decode(line)
    except _NOT_DECODED:
        return None


def count_objects(block: Line) -> int | None:
    """The number of lines of a block if every one is a JSON object, else None."""
    values = _decode_lines(_object_decoder, block)
    return None if values is None else len(values)


def _decode_lines(decoder: msgspec.json.Decoder[T], block: Line) -> list[T] | None:
    """Decode every line of a block whose last newline was taken off, if each is one object.

    The decoder takes any run of JSON values for lines, so the block must show that its lines are
    objects: each begins with { and ends with }, which within one value cannot meet across a
    newline, and there are as many values as lines.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").removesuffix(b"\r")
    if not (block.startswith(b"{") and block.endswith(b"}")):
        return None
    codes = np.frombuffer(block, np.uint8)
    newlines = np.flatnonzero(codes == ord("\n"))
    if (codes[newlines - 1] != ord("}")).any() or (codes[newlines + 1] != ord("{")).any():
        return None
    try:
        values = decoder.decode_lines(block)
    except _NOT_DECODED:
        return None
    return values if len(values) == len(newlines) + 1 else None


def _good_completions(rows: Sequence[Any]) -> bool:
    for row in rows:
        prompt, completion = row.prompt, row.completion
        if type(completion) is str:
            good = type(prompt) is str and completion and not completion.isspace()
        else:
            good = type(prompt) is tuple and _good_messages(prompt)
            good = good and _good_messages(completion, must_train=True)
        if not good:
            return False
    return True


def _good_messages(messages: Messages, must_train: bool = False) -> bool:
    trains = False
    for message in messages:
        content = message.content
        if content is None or message.tool_calls is not None:
            return False
        if message.role == "assistant" and message.weight != 0:
            if not content or content.isspace():
                return False
            trains = True
    return trains or (bool(messages) and not must_train)


def _good_chats(rows: Sequence[Any]) -> bool:
    return all(row.tools is None and _good_messages(row.messages, must_train=True) for row in rows)


def _good_preferences(rows: Sequence[Any]) -> bool:
    return all(
        row.tools is None
        and (row.label_prob is None or 0 <= row.label_prob <= 1)
        and (row.margin is None or 0 <= row.margin <= 1e6)
        and row.chosen != row.rejected
        and (_good_texts(row) if type(row.prompt) is str else _good_conversations(row))
        for row in rows
    )


def _good_texts(row: Any) -> bool:
    return all(
        type(answer) is str and not is_blank(answer) for answer in (row.chosen, row.rejected)
    )


def _good_conversations(row: Any) -> bool:
    return (
        _good_messages(row.prompt)
        and row.prompt[-1].role != "assistant"
        and all(
            type(answer) is tuple and _good_messages(answer) and answer[-1].role == "assistant"
            for answer in (row.chosen, row.rejected)
        )
    )


_ALL_GOOD: dict[Format, Callable[[Sequence[Any]], bool]] = {
    Format.PROMPT_COMPLETION: _good_completions,
    Format.CHAT: _good_chats,
    Format.PREFERENCE: _good_preferences,
    Format.UNPAIRED: _good_completions,
    Format.TEXT: lambda rows: not any(is_blank(row.text) for row in rows),
    Format.REINFORCEMENT: lambda rows: False,  # its grader fields may have any name
    Format.RANKING: lambda rows: False,
    Format.PROMPT_ONLY: lambda rows: False,
}

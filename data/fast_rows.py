"""The quick reading of rows that are plainly good.

Lines are decoded straight into the row type of the file's format, a block of them in one call. What
is accepted here is good by `data/checks.py` too; what is not may still be good, for example a row
with tools, text parts or unused keys, and is then read exactly by `data/parse.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from data.checks import is_blank
from data.rows import ROW_TYPES, Content, Format, Messages, Row

Line = bytes | bytearray
T = TypeVar("T")
_NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class FastReader:
    """Decodes lines straight into the row type of a format, and accepts what is plainly good."""

    def __init__(self, format: Format):
        self._decoder: msgspec.json.Decoder[Row] = msgspec.json.Decoder(ROW_TYPES[format])
        self._is_good = _IS_GOOD[format]
        fields = msgspec.structs.fields(ROW_TYPES[format])
        self._required = [f'"{field.name}"'.encode() for field in fields if field.required]
        self._optional = [f'"{field.name}"'.encode() for field in fields if not field.required]

    def read_line(self, line: Line) -> Row | None:
        if any(line.count(key) > 1 for key in self._required + self._optional):
            return None  # perhaps a repeated key
        try:
            row = self._decoder.decode(line)
        except _NOT_DECODED:
            return None
        return row if self._is_good(row) else None

    def read_block(self, block: Line) -> Sequence[Row] | None:
        """All rows of a block, if every line is a good one."""
        num_lines = block.count(b"\n") + 1
        if any(block.count(key) != num_lines for key in self._required):
            return None
        if any(key in block for key in self._optional):
            return None
        rows = _decode_lines(self._decoder, block)
        return rows if rows is not None and all(map(self._is_good, rows)) else None


_object_decoder = msgspec.json.Decoder(dict[str, Any])


def all_objects(block: Line) -> int | None:
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
    num_lines = block.count(b"\n") + 1
    if not (block.startswith(b"{") and block.endswith(b"}")):
        return None
    if block.count(b"}\n{") != num_lines - 1:
        return None
    try:
        values = decoder.decode_lines(block)
    except _NOT_DECODED:
        return None
    return values if len(values) == num_lines else None


def _good_prompt_completion(row: Any) -> bool:
    prompt, completion = row.prompt, row.completion
    if type(completion) is str:
        return type(prompt) is str and not is_blank(completion)
    return type(prompt) is tuple and _good_messages(prompt) and _good_chat(completion)


def _good_messages(messages: Messages) -> bool:
    for message in messages:
        if message.content is None or message.tool_calls is not None:
            return False
        if message.trains and is_blank(message.content):
            return False
    return bool(messages)


def _good_chat(messages: Messages) -> bool:
    return _good_messages(messages) and any(message.trains for message in messages)


def _good_preference(row: Any) -> bool:
    prompt, chosen, rejected = row.prompt, row.chosen, row.rejected
    if row.tools is not None or chosen == rejected:
        return False
    if type(prompt) is str:
        return all(type(answer) is str and not is_blank(answer) for answer in (chosen, rejected))
    return (
        _good_messages(prompt)
        and prompt[-1].role != "assistant"
        and _good_answer(chosen)
        and _good_answer(rejected)
    )


def _good_answer(answer: Content) -> bool:
    return type(answer) is tuple and _good_messages(answer) and answer[-1].role == "assistant"


_IS_GOOD: dict[Format, Callable[[Any], bool]] = {
    Format.PROMPT_COMPLETION: _good_prompt_completion,
    Format.CHAT: lambda row: row.tools is None and _good_chat(row.messages),
    Format.PREFERENCE: _good_preference,
    Format.UNPAIRED: _good_prompt_completion,
    Format.TEXT: lambda row: not is_blank(row.text),
    Format.REINFORCEMENT: lambda row: False,  # its grader fields may have any name
}

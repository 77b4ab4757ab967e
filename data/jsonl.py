"""Reading JSONL as a stream: in blocks of whole lines, in lines, and in typed rows.

Memory holds one block and at most one line; a line over the limit is passed over and told. A byte
order mark is dropped, CRLF ends a line as LF does, and blank lines are skipped by `read_rows`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.errors import DataError
from data.fast_rows import Line
from data.parse import RowParser
from data.rows import Format, Row

MAX_LINE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 18
_BOM = b"\xef\xbb\xbf"


class Readable(Protocol):
    """Any binary stream."""

    def read(self, size: int, /) -> bytes: ...


Source = str | os.PathLike[str] | Readable


class Block(NamedTuple):
    """Whole lines, without the newline of the last one.

    `too_long` is 0, or the number of bytes of a single line that was over the limit and dropped.
    """

    first_line: int
    offset: int
    data: Line
    too_long: int = 0

    def lines(self) -> list[Line]:
        return list(self.data.split(b"\n")) if b"\n" in self.data else [self.data]


def open_source(source: Source) -> AbstractContextManager[Readable]:
    """Open a path for reading; a stream is used as it is and left open."""
    if not isinstance(source, str | os.PathLike):
        return nullcontext(source)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; give the path of an existing JSONL file.", code="file_not_found"
        )
    return path.open("rb", buffering=0)


def iter_blocks(
    stream: Readable, *, max_line_bytes: int = MAX_LINE_BYTES, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Cut a stream into blocks of whole lines, of about `block_bytes` each."""
    line, offset = 1, 0
    held, held_bytes = bytearray(), 0  # an unfinished line, emptied once it is over the limit
    for piece in iter(partial(stream.read, block_bytes), b""):
        begin = 0
        if held_bytes:
            begin = piece.find(b"\n") + 1
            part = piece[: begin - 1] if begin else piece
            held_bytes += len(part)
            if held_bytes > max_line_bytes:
                held = bytearray()
            else:
                held += part
            if not begin:
                continue
            yield _line_block(line, offset, held, held_bytes, max_line_bytes)
            line, offset = line + 1, offset + held_bytes + 1
        end = piece.rfind(b"\n") + 1
        if end > begin:
            data = piece[begin : end - 1]
            yield from _split_long(_block(line, offset, data), max_line_bytes)
            num_newlines = np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n"))
            line, offset = line + int(num_newlines) + 1, offset + len(data) + 1
        rest = max(begin, end)
        held, held_bytes = bytearray(piece[rest:]), len(piece) - rest
    if held_bytes:
        yield _line_block(line, offset, held, held_bytes, max_line_bytes)


def _line_block(line: int, offset: int, held: bytearray, size: int, limit: int) -> Block:
    if size > limit:
        return Block(line, offset, b"", too_long=size)
    return _block(line, offset, held)


def _block(line: int, offset: int, data: Line) -> Block:
    if offset == 0 and data.startswith(_BOM):
        return Block(line, len(_BOM), data[len(_BOM) :])
    return Block(line, offset, data)


def _split_long(block: Block, limit: int) -> Iterator[Block]:
    """Let only blocks through whose lines keep the limit, which matters when it is tiny."""
    if len(block.data) <= limit:
        yield block
        return
    offset = block.offset
    for number, data in enumerate(block.lines(), block.first_line):
        long = len(data) > limit
        yield Block(number, offset, b"" if long else data, len(data) if long else 0)
        offset += len(data) + 1


def iter_lines(
    stream: Readable, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, int, Line]]:
    """Each line with its number from 1 and its byte offset, without its newline.

    Raises:
        DataError: A line is longer than `max_line_bytes`.
    """
    for block in iter_blocks(stream, max_line_bytes=max_line_bytes):
        if block.too_long:
            raise DataError(too_long_message(block, max_line_bytes), code="line_too_long")
        offset = block.offset
        for number, line in enumerate(block.lines(), block.first_line):
            yield number, offset, line
            offset += len(line) + 1


def too_long_message(block: Block, limit: int) -> str:
    return f"line {block.first_line} has {block.too_long:,} bytes; the limit is {limit:,}"


def read_rows(source: Source, format: Format | None = None) -> Iterator[Row]:
    """The typed rows of a file that was validated; blank lines are skipped.

    Args:
        source: A path or a binary stream.
        format: The format that all rows must have; None takes the first row's.

    Raises:
        DataError: At the first bad line, with what is wrong with it.
    """
    for _, rows in read_row_blocks(source, format):
        yield from rows


def read_numbered_rows(source: Source, format: Format | None = None) -> Iterator[tuple[int, Row]]:
    """As `read_rows`, each row with the number of its line."""
    for lines, rows in read_row_blocks(source, format):
        yield from zip(lines, rows, strict=True)


def read_row_blocks(
    source: Source, format: Format | None = None
) -> Iterator[tuple[Sequence[int], Sequence[Row]]]:
    """As `read_rows`, in runs of some thousand rows: their line numbers, and the rows."""
    parser = RowParser(format)
    name = source_name(source)
    with open_source(source) as stream:
        for block in iter_blocks(stream):
            if block.too_long:
                raise DataError(f"{name}: {too_long_message(block, MAX_LINE_BYTES)}")
            rows = parser.parse_block(block.data)
            if rows is not None:
                yield range(block.first_line, block.first_line + len(rows)), rows
                continue
            numbered = [
                (number, _good_row(parser, name, number, line))
                for number, line in enumerate(block.lines(), block.first_line)
                if not is_blank_line(line)
            ]
            yield [number for number, _ in numbered], [row for _, row in numbered]


def _good_row(parser: RowParser, name: str, number: int, line: Line) -> Row:
    parsed = parser.parse_line(number, line)
    if parsed.row is None:
        found = "; ".join(finding.message for finding in parsed.findings)
        raise DataError(f"{name}:{number}: {found}", code=parsed.findings[0].code)
    return parsed.row


def is_blank_line(line: Line) -> bool:
    return not line or line.isspace()


def source_name(source: Source) -> str:
    """What to call a source in messages: its path, or the name that a stream carries."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return str(getattr(source, "name", "<stream>"))

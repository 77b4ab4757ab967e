"""Reading JSONL in blocks, lines and rows, against a reading of the whole file at once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.jsonl import iter_blocks, iter_lines, read_numbered_rows, read_rows
from data.locate import column_of
from data.rows import Chat, Format, PromptCompletion


class Trickle(io.BytesIO):
    """A stream that gives at most three bytes at a time, as a socket may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(3, size) if size is not None and size >= 0 else 3)


def lines_by_splitting(data: bytes) -> list[tuple[int, bytes]]:
    """Every line with its offset, by splitting the whole."""
    parts = data.split(b"\n")
    if not parts[-1]:
        parts.pop()  # the last newline ends a line and begins none
    lines, offset = [], 0
    for part in parts:
        lines.append((offset, part))
        offset += len(part) + 1
    if data.startswith(b"\xef\xbb\xbf"):
        lines[0] = (3, lines[0][1][3:])
    return lines


pieces = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"\xef\xbb\xbf", b"{}", b'{"a": 1}', b"\xff", b" ", b"abcdef"])
).map(b"".join)


@given(data=pieces, block_bytes=st.integers(1, 40), trickle=st.booleans())
def test_blocks_hold_every_line_once(data: bytes, block_bytes: int, trickle: bool) -> None:
    stream = Trickle(data) if trickle else io.BytesIO(data)
    found: list[tuple[int, bytes]] = []
    for block in iter_blocks(stream, block_bytes=block_bytes):
        offset = block.offset
        assert block.first_line == len(found) + 1
        for line in block.lines():
            found.append((offset, bytes(line)))
            offset += len(line) + 1
    assert found == lines_by_splitting(data)


@given(data=pieces, limit=st.integers(0, 12), block_bytes=st.integers(1, 40))
def test_only_lines_over_the_limit_are_dropped(data: bytes, limit: int, block_bytes: int) -> None:
    data = data.replace(b"\xef\xbb\xbf", b"bom")
    found: list[int | bytes] = []
    for block in iter_blocks(io.BytesIO(data), max_line_bytes=limit, block_bytes=block_bytes):
        found += [block.too_long] if block.too_long else map(bytes, block.lines())
    expected = [line for _, line in lines_by_splitting(data)]
    assert found == [len(line) if len(line) > limit else line for line in expected]


def test_lines_have_numbers_and_offsets() -> None:
    data = b'\xef\xbb\xbf{"a":1}\r\n\n{"b":2}'
    assert list(iter_lines(io.BytesIO(data))) == [
        (1, 3, b'{"a":1}\r'),
        (2, 12, b""),
        (3, 13, b'{"b":2}'),
    ]


def test_line_over_the_limit_stops_iter_lines() -> None:
    with pytest.raises(DataError, match=r"line 2 has 9 bytes; the limit is 5"):
        list(iter_lines(io.BytesIO(b"abc\nabcdefghi\n"), max_line_bytes=5))


texts = st.text(max_size=20)
answers = texts.filter(lambda text: bool(text.strip()))


@given(rows=st.lists(st.tuples(texts, answers), max_size=20), ascii_only=st.booleans())
def test_rows_come_back_as_written(rows: list[tuple[str, str]], ascii_only: bool) -> None:
    lines = [
        json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=ascii_only)
        for prompt, completion in rows
    ]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if any("\ud800" <= char <= "\udfff" for row in rows for text in row for char in text):
        return  # lone surrogates are no text; test_data_validate.py has them refused
    assert list(read_rows(io.BytesIO(data))) == [PromptCompletion(p, c) for p, c in rows]


def test_rows_from_a_path_carry_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "assistant", "content": "é"}]}
    path.write_text(f"{json.dumps(row)}\n\n  \n{json.dumps(row | {'id': 1})}\n", encoding="utf-8")
    numbered = list(read_numbered_rows(path, Format.CHAT))
    assert [number for number, _ in numbered] == [1, 4]
    assert all(isinstance(row, Chat) and row.messages[0].content == "é" for _, row in numbered)


def test_first_bad_row_is_raised_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: \"completion\" is empty") as caught:
        list(read_rows(path))
    assert caught.value.code == "empty_completion"


def test_missing_file_is_told() -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is not a file"):
        list(read_rows("nowhere.jsonl"))


@pytest.mark.parametrize(
    ("line", "path", "column"),
    [
        ('{"a": 1, "b": 2}', ("b",), 15),
        ('{"é日😀": 1, "b": 2}', ("b",), 17),
        ('  { "a" : [ {"x": 1} , {"y": [true, null]} ] }', ("a", 1, "y", 1), 37),
        ('{"a": {"b": "}"}, "c": 3}', ("a", "b"), 13),
        ('{"a": 1, "a": 2}', ("a",), 15),
        ('{"a": 1}', ("missing",), 1),
        ('{"a": [1]}', ("a", 5), 7),
        ('{"a": "text"}', ("a", "b"), 7),
    ],
)
def test_column_of_a_value(line: str, path: tuple[str | int, ...], column: int) -> None:
    assert column_of(line.encode(), path) == column

"""Where in a line of JSON a value begins, so that a report can point at it.

Parsers do not keep positions, so the few lines that are reported in full are walked once more, from
the start of the object along the keys and indices of a path, skipping every value on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

Path = Sequence[str | int]

_SPACE = re.compile(r"[ \t\r\n]*")
_decoder = json.JSONDecoder()


def column_of(line: bytes | bytearray, path: Path) -> int:
    """The 1-based character column of the value at `path`; of its nearest parent if it is absent.

    Args:
        line: Valid JSON in UTF-8.
        path: Keys of objects and indices of arrays, outermost first.
    """
    text = line.decode()
    position = _skip_space(text, 0)
    try:
        for step in path:
            inner = _enter(text, position, step)
            if inner is None:
                break
            position = inner
    except RecursionError:  # a sibling nested deeper than Python's own parser can skip
        pass
    return position + 1


def _enter(text: str, position: int, step: str | int) -> int | None:
    """Where the member named by `step` of the container at `position` begins, if there is one."""
    opening = text[position]
    if opening == "{" and isinstance(step, str):
        return _find_key(text, position, step)
    if opening == "[" and isinstance(step, int):
        return _find_index(text, position, step)
    return None


def _find_key(text: str, position: int, key: str) -> int | None:
    found = None
    position = _skip_space(text, position + 1)
    while text[position] != "}":
        name, position = _decoder.raw_decode(text, position)
        position = _skip_space(text, _skip_space(text, position) + 1)  # past the colon
        if name == key:
            found = position  # of a repeated key, parsers keep the last
        position = _next_member(text, position)
    return found


def _find_index(text: str, position: int, index: int) -> int | None:
    position = _skip_space(text, position + 1)
    count = 0
    while text[position] != "]":
        if count == index:
            return position
        position = _next_member(text, position)
        count += 1
    return None


def _next_member(text: str, position: int) -> int:
    """Skip the value at `position`, and the comma after it if there is one."""
    _, position = _decoder.raw_decode(text, position)
    position = _skip_space(text, position)
    return _skip_space(text, position + 1) if text[position] == "," else position


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position

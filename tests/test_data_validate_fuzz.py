"""Validation of made-up bytes and rows, against the standard library and against itself."""

from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.checks import check_row
from data.fast_rows import FastReader
from data.rows import Format, detect, to_row
from data.validate import validate

snippets = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\r\n", b"\r", b" ", b"\\", b"\xff",
        b"\xef\xbb\xbf", b"null", b"NaN", b"1e999", b"true", b"\\ud800", b"\\u0041", b"\xc3\xa9",
        b'{"prompt": "a", "completion": "b"}', b'{"messages": [{"role": "user", "content": "x"}]}',
        b'"prompt"', b'"messages"', b'{}\n{}', b'{"a": {}}\n{"b": 1}\n', b"[" * 70, b"}\n{",
    ]
)  # fmt: skip


@given(data=st.one_of(st.binary(max_size=200), st.lists(snippets, max_size=30).map(b"".join)))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_are_read_as_json_reads_them(data: bytes) -> None:
    validate(io.BytesIO(data))  # any bytes: a report, no exception
    report = validate(io.BytesIO(data), level="syntax")
    bad = {problem.line for problem in report.problems if problem.line is not None}
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert bad == {number for number, line in filled if not is_object(line)}
    assert report.num_examples == len(filled) - len(bad)


def is_object(line: bytes) -> bool:
    """Whether the standard library reads a line as an object of finite numbers and sound text."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=refuse, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    except ValueError:
        return False
    return isinstance(value, dict)


def refuse(text: str) -> float:
    raise ValueError(text)


def finite(text: str) -> float:
    if abs(float(text)) == float("inf"):
        raise ValueError(text)
    return float(text)


content: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["", " ", "a", "b\u3000", None, 5]), st.just([])
)
message: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "bot", 1, None]),
        "content": content,
        "weight": st.sampled_from([0, 1, 2, True, 1.0, None]),
        "name": st.sampled_from(["x", 1, None]),
        "tool_calls": st.sampled_from([[], [{}], "x", None]),
        "mood": st.just("good"),
    },
)
part = st.one_of(content, st.lists(message, max_size=3), message)
keys = [
    "prompt", "completion", "messages", "chosen", "rejected", "label", "labeler", "text", "tools",
    "input", "preferred_output", "non_preferred_output", "id",
]  # fmt: skip
row = st.one_of(
    st.dictionaries(st.sampled_from(keys), part, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(message, max_size=3)}),
    st.fixed_dictionaries({"prompt": part, "completion": part, "label": st.integers(0, 6)}),
    st.fixed_dictionaries({"prompt": part, "chosen": part, "rejected": part}),
)


@given(row=row, format=st.sampled_from(list(Format)))
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_quick_and_exact_readings_agree(row: dict[str, Any], format: Format) -> None:
    """What the quick reading accepts, the exact one finds good, and makes the same row of."""
    line = json.dumps(row).encode()
    quick = FastReader(format).read_line(line)
    present = {key: value for key, value in row.items() if value is not None}
    findings = check_row(present, format)
    if quick is not None:
        assert findings == []
        assert to_row(present, format) == quick
        assert FastReader(format).read_block(line + b"\n" + line) in (None, [quick, quick])
    elif not findings:
        to_row(present, format)  # whatever passes the checks becomes a row
    report = validate(io.BytesIO(line), format, min_examples=1)
    assert report.ok == (not findings) or detect(present) != format

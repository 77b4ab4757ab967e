"""Validation: every fault at its line and column, nothing crashes, memory stays bounded."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.report import SYNTAX_CODES, Report
from data.rows import Format
from data.validate import upload_error_message, validate

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}
OTHER = {"role": "assistant", "content": "no"}


def check(rows: Iterable[Any], format: Format | str = "auto", **options: Any) -> Report:
    """Validate rows, each a JSON value or a line as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return validate(
        io.BytesIO(b"\n".join(lines)), format, **{"min_examples": 1, "name": "f.jsonl", **options}
    )


def found(report: Report) -> list[tuple[int | None, int | None, str]]:
    return [(problem.line, problem.column, problem.code) for problem in report.problems]


GOOD: dict[Format, list[Any]] = {
    Format.PROMPT_COMPLETION: [
        {"prompt": "", "completion": "b"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
    Format.CHAT: [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "developer", "content": "d"}, USER, {**ASSISTANT, "weight": 1}]},
        {"messages": [USER, {**OTHER, "content": "", "weight": 0}, USER, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "y"}]}]},
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
                {**ASSISTANT, "name": "bob"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "parallel_tool_calls": False,
        },
    ],
    Format.PREFERENCE: [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        {
            "input": {"messages": [USER], "tools": [{"type": "function"}]},
            "preferred_output": [ASSISTANT],
            "non_preferred_output": [OTHER],
        },
        {
            "input": {"messages": [USER]},
            "preferred_completion": [OTHER],
            "non_preferred_completion": [ASSISTANT],
        },
        {"prompt": "a", "chosen": "b", "rejected": "c", "label_prob": 0.5, "margin": 2},
        {"prompt": "a", "chosen": "b", "rejected": "c", "labeler": "kim", "confidence": 7},
        {"chosen": [USER, USER, OTHER], "rejected": [USER, USER, ASSISTANT]},
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello",
            "rejected": "\n\nHuman: hi\n\nAssistant: hem",
        },
    ],
    Format.UNPAIRED: [
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": [USER], "completion": [ASSISTANT], "label": 5, "labeler": "kim"},
    ],
    Format.TEXT: [{"text": "once upon a time"}],
    Format.REINFORCEMENT: [{"messages": [USER], "answer": {"any": ["value", None]}}],
    Format.RANKING: [
        {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 2]},
        {"prompt": [USER], "completions": [[ASSISTANT], [OTHER]], "ranks": [2, 1]},
    ],
    Format.PROMPT_ONLY: [{"prompt": "a", "answer": 4}, {"prompt": [USER]}],
}


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("auto", [True, False])
def test_good_rows_pass(format: Format, auto: bool) -> None:
    if auto and format is Format.PROMPT_ONLY:
        pytest.skip("is read only where it is asked for")
    report = check(GOOD[format], "auto" if auto else format)
    assert report.ok, report.summary()
    assert report.warnings == []
    assert report.format == format
    assert report.num_examples == len(GOOD[format])


# format, row, code, a part of the message, and the JSON at which the column points
BAD: list[tuple[Format, Any, str, str, str]] = [
    (Format.PROMPT_COMPLETION, {"prompt": "a"}, "missing_key", "completion", '{"prompt'),
    (Format.PROMPT_COMPLETION, {"prompt": "a", "completion": None}, "missing_key", "", '{"prompt'),
    (Format.PROMPT_COMPLETION, {"prompt": "é", "completion": ""}, "empty_completion", "", '""}'),
    (Format.PROMPT_COMPLETION, {"prompt": "a", "completion": " "}, "empty_completion", "", '" "}'),
    (Format.PROMPT_COMPLETION, {"prompt": 5, "completion": "b"}, "invalid_type", "is 5", "5, "),
    (Format.PROMPT_COMPLETION, {"prompt": [USER], "completion": "b"}, "invalid_type", "", '"b"}'),
    (Format.PROMPT_COMPLETION, {"prompt": "", "completion": [USER]}, "invalid_type", "", "[{"),
    (
        Format.CHAT,
        {"messages": [{"role": "user", "content": "é"}, {"role": "bot", "content": "b"}]},
        "invalid_role",
        '"messages[1].role" is "bot"',
        '"bot"',
    ),
    (Format.CHAT, {"messages": [{"role": 5, "content": "b"}]}, "invalid_role", "is 5", "5, "),
    (Format.CHAT, {"messages": [{"content": "b"}]}, "missing_key", "messages[0]", '{"content'),
    (Format.CHAT, {"messages": [ASSISTANT, {"role": "user"}]}, "missing_key", "", '{"role": "user'),
    (Format.CHAT, {"messages": [USER]}, "no_assistant_message", "", "[{"),
    (Format.CHAT, {"messages": [{**ASSISTANT, "weight": 0}]}, "no_assistant_message", "", "[{"),
    (Format.CHAT, {"messages": [{**ASSISTANT, "weight": 2}]}, "invalid_weight", "is 2", "2}"),
    (Format.CHAT, {"messages": [{**ASSISTANT, "weight": True}]}, "invalid_weight", "", "true"),
    (Format.CHAT, {"messages": [{**ASSISTANT, "content": ""}]}, "empty_completion", "", '""}'),
    (Format.CHAT, {"messages": []}, "invalid_type", "", "[]"),
    (Format.CHAT, {"messages": "hi"}, "invalid_type", "", '"hi"'),
    (Format.CHAT, {"messages": [ASSISTANT, "hi"]}, "invalid_type", "messages[1]", '"hi"'),
    (Format.CHAT, {"messages": [{**ASSISTANT, "content": 5}]}, "invalid_type", "is 5", "5}"),
    (
        Format.CHAT,
        {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
        "invalid_type",
        "messages[0].content[0]",
        '{"type',
    ),
    (Format.CHAT, {"messages": [ASSISTANT], "tools": {}}, "invalid_type", "tools", "{}"),
    (Format.PREFERENCE, {"prompt": "a", "chosen": "b"}, "missing_key", "rejected", '{"prompt'),
    (
        Format.PREFERENCE,
        {"preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]},
        "missing_key",
        '"input"',
        '{"preferred',
    ),
    (
        Format.PREFERENCE,
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "identical_outputs",
        '"chosen" and "rejected"',
        '"b"}',
    ),
    (
        Format.PREFERENCE,
        {"prompt": "a", "chosen": "", "rejected": "b"},
        "empty_completion",
        '"chosen" is empty',
        '"", ',
    ),
    (
        Format.PREFERENCE,
        {"prompt": [OTHER], "chosen": [{**USER, "role": "assistant"}], "rejected": [ASSISTANT]},
        "invalid_role",
        "the prompt ends before the answer",
        '"assistant", "content": "no"',
    ),
    (
        Format.PREFERENCE,
        {
            "input": {"messages": [USER]},
            "preferred_output": [OTHER, ASSISTANT],
            "non_preferred_output": [ASSISTANT],
        },
        "invalid_type",
        "exactly one assistant message",
        '[{"role": "assistant", "content": "no"',
    ),
    (
        Format.PREFERENCE,
        {"prompt": "a", "chosen": "b", "rejected": "c", "label_prob": 1.5},
        "invalid_type",
        "a number from 0 to 1",
        "1.5}",
    ),
    (
        Format.PREFERENCE,
        {"prompt": "a", "chosen": "b", "rejected": "c", "batch": True},
        "invalid_type",
        "a string or a number",
        "true}",
    ),
    (
        Format.RANKING,
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "labeler": ["kim"]},
        "invalid_type",
        "a string or a number",
        '["kim"]}',
    ),
    (
        Format.PREFERENCE,
        {"chosen": "one thing", "rejected": "another"},
        "missing_key",
        '"prompt" is missing',
        '{"chosen',
    ),
    (
        Format.RANKING,
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1]},
        "invalid_type",
        "2 whole numbers",
        "[1]",
    ),
    (
        Format.RANKING,
        {"prompt": "a", "completions": ["b"], "ranks": [1]},
        "invalid_type",
        "a list of 2 to 9 answers",
        '["b"]',
    ),
    (
        Format.RANKING,
        {"prompt": "a", "completions": ["b", "b"], "ranks": [1, 2]},
        "identical_outputs",
        '"completions[0]" and "completions[1]"',
        '"b"]',
    ),
    (Format.PROMPT_ONLY, {"prompt": [USER, ASSISTANT]}, "invalid_role", "before the answer", '"as'),
    (Format.UNPAIRED, {"prompt": "a", "completion": "b", "label": 6}, "invalid_label", "", "6}"),
    (Format.UNPAIRED, {"prompt": "a", "completion": "b", "label": "y"}, "invalid_label", "", '"y"'),
    (Format.TEXT, {"text": ""}, "empty_completion", "", '""'),
    (
        Format.REINFORCEMENT,
        {"messages": [USER, ASSISTANT], "answer": "4"},
        "invalid_role",
        "the model answers a user",
        '"assistant"',
    ),
]


@pytest.mark.parametrize(("format", "row", "code", "message", "pointed"), BAD)
def test_bad_rows_are_told(format: Format, row: Any, code: str, message: str, pointed: str) -> None:
    line = json.dumps(row, ensure_ascii=False)
    report = check([GOOD[format][0], line.encode()], format)
    assert found(report) == [(2, line.index(pointed) + 1, code)]
    assert message in report.problems[0].message
    assert report.problems[0].fix
    assert (report.num_examples, report.num_bad_lines) == (1, 1)


@pytest.mark.parametrize(
    ("line", "code", "column"),
    [
        (b"[1]", "not_an_object", 1),
        (b'"text"', "not_an_object", 1),
        (b"null", "not_an_object", 1),
        (b'{"prompt": "a",}', "invalid_json", 15),
        ('{"é😀": tru}'.encode(), "invalid_json", 8),
        (b"{'prompt': 'a'}", "invalid_json", 2),
        (b'{"prompt": "a"', "invalid_json", 15),
        (b'{"prompt": NaN}', "invalid_json", 12),
        (b'{"prompt": -Infinity}', "invalid_json", 13),
        (b'{"prompt": "\\ud800"}', "invalid_json", 13),
        (b'{"prompt": "a\tb"}', "invalid_json", 14),
        (b'{"prompt": "a"} {}', "invalid_json", 17),
        ('{"é": "'.encode() + b"\xff" + b'"}', "invalid_utf8", 8),
        (b"\xed\xa0\x80", "invalid_utf8", 1),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json", 1025),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "too_deep", 1),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "duplicate_key", 46),
        (b"x" * 101, "line_too_long", 1),
    ],
)
def test_broken_lines_are_told(line: bytes, code: str, column: int) -> None:
    good = {"prompt": "a", "completion": "b"}
    limit = 100 if code == "line_too_long" else 1 << 20
    report = check([good, line, good], max_line_bytes=limit)
    assert [(p.line, p.code) for p in report.problems] == [(2, code)]
    if code != "invalid_json" or len(line) < 100:
        assert report.problems[0].column == column
    assert report.num_examples == 2
    syntax = check([good, line, good], max_line_bytes=limit, level="syntax")
    assert syntax.ok == (code not in SYNTAX_CODES)


def test_mixed_formats_name_both() -> None:
    report = check([{"prompt": "a", "completion": "b"}, {"messages": [ASSISTANT]}])
    assert found(report) == [(2, 1, "mixed_formats")]
    message = report.problems[0].message
    assert message == "this is a chat row; expected a prompt_completion row as line 1 is"
    wanted = check([{"messages": [ASSISTANT]}], "preference")
    assert wanted.problems[0].message == "this is a chat row; expected a preference row"


def test_misspelt_key_is_named() -> None:
    report = check([{"Prompt": "a", "completion": "b"}])
    assert report.problems[0].fix == 'Rename "Prompt" to "prompt".'
    report = check([{"question": "a", "answer": "b"}])
    assert found(report) == [(1, 1, "missing_key")]
    assert "question, answer" in report.problems[0].message


def test_extra_columns_warn_once_a_name() -> None:
    rows = [{"prompt": str(n), "completion": "b", "id": n} for n in range(300)]
    rows[7]["note"] = "x"
    report = check(rows)
    assert report.ok
    assert report.num_examples == 300
    assert report.warning_counts == {"extra_column": 301}
    first, second = report.warnings
    assert (first.line, first.column) == (1, 42)
    assert '"id" is not used' in first.message
    assert "300 (lines 1, 2, 3, 4, 5, ...)" in first.message
    assert "1 (lines 8)" in second.message
    refused = check([{"messages": [{**ASSISTANT, "refusal": "none"}]}])
    assert '"messages[].refusal"' in refused.warnings[0].message


def test_null_keys_count_as_absent() -> None:
    row = {"prompt": "a", "completion": "b", "messages": None, "id": None}
    report = check([row] * 2)
    assert report.ok
    assert report.format == Format.PROMPT_COMPLETION
    assert report.warning_counts == {"duplicate_examples": 1}


def test_first_hundred_in_full_and_all_counted() -> None:
    report = check([{"prompt": "a", "completion": ""}] * 250 + [{"prompt": "a"}] * 50)
    assert len(report.problems) == 100
    assert report.counts == {"empty_completion": 250, "missing_key": 50}
    assert report.num_bad_lines == 300


def test_bom_crlf_and_blank_lines_are_fine() -> None:
    rows = [json.dumps({"prompt": f"{n}é", "completion": "b"}) for n in range(3)]
    data = b"\xef\xbb\xbf" + "\r\n".join([*rows[:2], "", " \t", rows[2], ""]).encode()
    report = validate(io.BytesIO(data), min_examples=3)
    assert report.ok, report.summary()
    assert (report.num_lines, report.num_blank, report.num_examples) == (5, 2, 3)
    assert report.bytes == len(data)
    assert report.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("level", ["rows", "syntax"])
def test_empty_file_is_told(data: bytes, level: Any) -> None:
    report = validate(io.BytesIO(data), level=level)
    assert found(report) == [(None, None, "empty_file")]
    assert "no lines" in (upload_error_message(report) or "")


def test_number_of_examples() -> None:
    rows = [{"prompt": str(n), "completion": "b"} for n in range(9)]
    report = check(rows, min_examples=10)
    assert found(report) == [(None, None, "invalid_n_examples")]
    assert report.problems[0].message == "the file has 9 examples; at least 10 are needed"
    assert check(rows, min_examples=9).ok


def test_duplicates_warn_with_the_line_they_repeat() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}] * 2
    reordered = b'{"completion":  "b","prompt":"\\u0061"}'
    report = check([*rows, reordered])
    assert report.ok
    assert report.warning_counts == {"duplicate_examples": 3}
    assert [(w.line, w.message) for w in report.warnings] == [
        (3, "the row says the same as line 1"),
        (4, "the row says the same as line 2"),
        (5, "the row says the same as line 1"),
    ]


@pytest.mark.parametrize("escape", [False, True])
@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<｜end▁of▁sentence｜>", 'q"\\n'])
def test_special_tokens_are_found_however_written(token: str, escape: bool) -> None:
    rows = [{"prompt": str(n), "completion": "fine"} for n in range(5)]
    text = json.dumps({"prompt": f"a{token}b", "completion": "c"}, ensure_ascii=escape)
    if escape:
        text = text.replace("<", "\\u003c").replace("/", "\\/")
    report = check([*rows, text.encode()], special_tokens=["<|endoftext|>", token])
    assert found(report) == [(6, 12, "forbidden_special_token")]
    assert token in report.problems[0].message
    assert check([*rows, text.encode()]).ok


def test_summary_reads_as_a_compiler_would_write() -> None:
    rows = [{"messages": [{"role": "bot", "content": "a"}]}] * 30
    summary = check([{"messages": [USER, ASSISTANT]}, *rows]).summary(max_lines=20)
    lines = summary.splitlines()
    assert lines[0] == (
        'f.jsonl:2:24: invalid_role: "messages[0].role" is "bot"; '
        "expected system, developer, user, assistant or tool"
    )
    assert lines[1].startswith("    fix: ")
    assert sum(line.startswith("f.jsonl:") for line in lines) == 21
    assert lines[-2] == "... and 10 more (invalid_role: 30)"
    assert lines[-1].startswith("f.jsonl: not usable: 1 good chat examples in 31 lines, 30 bad")


def test_report_is_plain_json() -> None:
    report = check([{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b", "c": 1}])
    told = json.loads(json.dumps(report.to_dict()))
    assert told == report.to_dict()
    assert told["format"] == "prompt_completion"
    assert told["problems"][0]["code"] == "empty_completion"
    assert told["warnings"][0]["code"] == "extra_column"


def test_upload_message_names_the_lines() -> None:
    rows: list[Any] = [{"a": n} for n in range(200)]
    for line in (3, 17, 90):
        rows[line - 1] = b"[1]"
    message = upload_error_message(check(rows, level="syntax")) or ""
    assert message.startswith(
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        "Line 3, 17, 90 (3 of 200) "
    )
    assert 'line starts with: "[1]"' in message
    assert upload_error_message(check(rows[:2], level="syntax")) is None


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "abc"}\n' * 50_000)
    seen: list[int] = []
    report = validate(path, on_progress=seen.append)
    assert report.name == str(path)
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size
    assert len(seen) > 3


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        validate(tmp_path / "none.jsonl")


def test_a_long_line_is_read_and_a_longer_one_passed_over() -> None:
    line = json.dumps({"prompt": "a", "completion": "b" * (3 << 20)}).encode()
    report = check(
        [line, line + b" ", b'{"prompt": "a", "completion": "c"}'], max_line_bytes=len(line)
    )
    assert found(report) == [(2, 1, "line_too_long")]
    assert report.num_examples == 2


def test_one_bad_line_deep_in_a_file_is_found_where_it_is() -> None:
    rows: list[Any] = [{"prompt": f"{n}é", "completion": "b"} for n in range(20_000)]
    rows[12_344] = {"prompt": "a", "completion": ""}
    rows[19_999] = b"{"
    report = check(rows)
    assert [(p.line, p.code) for p in report.problems] == [
        (12_345, "empty_completion"),
        (20_000, "invalid_json"),
    ]
    assert report.num_examples == 19_998

"""Preparing a dataset: every kind of file read, the advice that fits, the rows written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.advice import Advice, Example, Task, advise, common_prefix, common_suffix, task_of
from data.errors import DataError, InvalidInput
from data.prepare import inspect
from data.validate import validate

ROWS = [
    {"prompt": "How do I reset my password?", "completion": " Open the settings, é."},
    {"prompt": "Where is my order, 12?", "completion": " On its way."},
    {"prompt": "Can I pay\nlater?", "completion": ' Yes, "in parts".'},
]


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_separated(path: Path, rows: list[dict[str, str]], separator: str) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_xlsx(path: Path, rows: list[dict[str, str]], other_sheet: bool = False) -> None:
    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    for cells in [list(rows[0]), *[list(row.values()) for row in rows]]:
        sheet.append(cells)
    if other_sheet:
        book.create_sheet("Notes").append(["nothing"])
    book.save(path)


def codes(advice: Any) -> list[str]:
    return [item.code for item in advice]


def advice_on(pairs: list[tuple[str, str]]) -> dict[str, Advice]:
    examples = [Example(n, prompt, completion) for n, (prompt, completion) in enumerate(pairs, 1)]
    return {item.code: item for item in advise(examples)}


def changed(advice: Advice, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    examples = [Example(n, prompt, completion) for n, (prompt, completion) in enumerate(pairs, 1)]
    assert advice.change is not None
    return [(example.prompt, example.completion) for example in advice.change(examples)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "json", "jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"tickets.{kind}"
    if kind in ("csv", "tsv"):
        write_separated(path, ROWS, "," if kind == "csv" else "\t")
    elif kind == "xlsx":
        write_xlsx(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    preparation = inspect(path)
    assert preparation.rows == ROWS
    assert ("converted" in codes(preparation.advice)) == (kind != "jsonl")
    written = preparation.apply(set()).write()
    assert written == [tmp_path / "tickets_prepared.jsonl"]
    assert read_jsonl(written[0]) == ROWS
    assert validate(written[0], min_examples=3).ok


def test_lines_of_text_become_completions(tmp_path: Path) -> None:
    path = tmp_path / "poems.txt"
    path.write_bytes("one é\r\n\r\ntwo\n".encode())
    preparation = inspect(path)
    assert preparation.task == Task.OPEN_ENDED
    assert preparation.rows == [
        {"prompt": "", "completion": "one é"},
        {"prompt": "", "completion": "two"},
    ]
    assert [example.row for example in preparation.examples] == [1, 3]


def test_columns_are_matched_and_the_rest_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_separated(path, [{"Prompt": "a", "COMPLETION ": " b", "id": "1"}], ",")
    preparation = inspect(path)
    assert preparation.rows == [{"prompt": "a", "completion": " b"}]
    told = {item.code: item for item in preparation.advice}
    assert "id" in told["extra_columns"].message
    assert told["renamed_column"].necessary
    named = inspect(path, prompt_column="id", completion_column="prompt")
    assert named.rows == [{"prompt": "1", "completion": "a"}]


def test_empty_and_duplicate_rows_have_the_numbers_of_the_sheet(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('prompt,completion\na," x\ny"\n\nb,\nc, z\na," x\ny"\n')
    preparation = inspect(path)
    told = {item.code: item for item in preparation.advice}
    assert told["empty_completion"].rows == (4,)
    assert told["duplicate_rows"].rows == (6,)
    assert len(preparation.rows) == 3
    assert len(preparation.apply({"duplicate_rows"}).rows) == 2


def test_numbers_in_cells_become_text(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "t.xlsx", [{"prompt": 5, "completion": True}], other_sheet=True)  # type: ignore[dict-item]
    preparation = inspect(tmp_path / "t.xlsx")
    assert preparation.rows == [{"prompt": "5", "completion": "true"}]
    assert "Only the first sheet" in preparation.advice[0].message


def test_names_that_do_not_fit_the_content_are_told(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.json").write_text(lines)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS, indent=1))
    for name, note in (("a.json", "one object a line"), ("b.jsonl", "one JSON document")):
        preparation = inspect(tmp_path / name)
        assert preparation.rows == ROWS
        assert note in preparation.advice[0].message


def test_chat_rows_are_only_converted(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "é"}]}] * 2
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(rows))
    preparation = inspect(path)
    assert preparation.task is None
    assert codes(preparation.advice) == ["converted", "num_examples"]
    assert read_jsonl(preparation.apply().write()[0]) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", "expected one of"),
        ("a.csv", b"prompt,completion\n", "has no rows"),
        ("a.csv", b"question,answer\n1,2\n", r'no column "prompt"; its columns are: question'),
        ("a.csv", b"prompt,prompt\n1,2\n", "several columns named prompt"),
        ("a.csv", b"prompt,completion\n1,2,3\n", "row 2 has 3 cells, the header 2"),
        ("a.csv", b'prompt,completion\n"1"x,2\n', "not valid CSV"),
        ("a.csv", b"prompt,completion\n\xff,2\n", r"a\.csv:2: byte 0xff is not UTF-8"),
        ("a.csv", b"prompt,completion\n1,\n", "all completions are empty"),
        ("a.xlsx", b"not a zip", "cannot be read as an Excel workbook"),
        ("a.json", b'[{"a": 1},]', r"a\.json:1:10: not valid JSON"),
        ("a.json", b"[1]", "item 1 is not an object"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\nx\n', r"a\.jsonl:2:1: invalid_json"),
        ("a.json", b'[{"prompt": [], "completion": "b"}]', "is a list or an object"),
        ("a.txt", b"\n", "has no rows"),
    ],
)
def test_unreadable_files_are_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        inspect(path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        inspect(tmp_path / "none.csv")


def test_few_examples_get_a_hint() -> None:
    pairs = [(f"{n}", f" {n}.") for n in range(100)]
    assert "better" in advice_on(pairs[:99])["num_examples"].message
    assert "better" not in advice_on(pairs)["num_examples"].message


def test_separator_is_one_that_no_prompt_holds() -> None:
    pairs = [("a b", " x"), ("c d", " y")]
    assert changed(advice_on(pairs)["prompt_separator"], pairs)[0] == ("a b ->", " x")
    pairs = [("a -> b", " x"), ("c d", " y")]
    assert changed(advice_on(pairs)["prompt_separator"], pairs)[1] == ("c d\n\n###\n\n", " y")
    pairs = [("a\nb\n\n###\n\nc", " x"), ("c d", " y")]
    assert changed(advice_on(pairs)["prompt_separator"], pairs)[1] == ("c d\n\n===\n\n", " y")


def test_common_endings_of_prompts_are_told() -> None:
    told = advice_on([("a ->", " x"), ("b -> c ->", " y")])
    assert "prompt_separator" not in told
    assert "more than once" in told["prompt_suffix"].message
    long = advice_on([("a, and the answer is:", " x"), ("b, and the answer is:", " y")])
    assert "It is long" in long["prompt_suffix"].message
    assert "identical_prompts" in advice_on([("a", " x"), ("a", " y")])


def test_long_prompt_prefix_can_go_and_a_short_one_stays() -> None:
    pairs = [("Classify this: cat", " x"), ("Classify this: cow", " y")]
    assert changed(advice_on(pairs)["prompt_prefix"], pairs) == [("at", " x"), ("ow", " y")]
    assert "prompt_prefix" not in advice_on([("Answer: cat", " x"), ("Answer: dog", " y")])


def test_common_beginnings_and_endings_of_completions() -> None:
    pairs = [("a", " Answer: x."), ("b", " Answer: y.")]
    assert changed(advice_on(pairs)["completion_prefix"], pairs) == [("a", " x."), ("b", " y.")]
    assert "completion_prefix" not in advice_on([("a", "refund"), ("b", "refund status")])
    told = advice_on([("a", " x. Kind regards"), ("b", " y. Kind regards")])
    assert "end of text token" in told["completion_suffix"].message
    assert "identical_completions" in advice_on([("a", " x"), ("b", " x")])


def test_leading_space_is_added_where_it_is_missing() -> None:
    pairs = [("a", "x"), ("b", " y"), ("c", "\nz")]
    advice = advice_on(pairs)["leading_space"]
    assert advice.rows == (1,)
    assert changed(advice, pairs) == [("a", " x"), ("b", " y"), ("c", "\nz")]


def test_upper_case_is_told_but_kept_unless_asked(tmp_path: Path) -> None:
    pairs = [("WHERE IS it", " ok."), ("WHO IS it", " fine")]
    advice = advice_on(pairs)["uppercase_prompt"]
    assert not advice.fix_applied_by_default
    assert changed(advice, pairs)[0] == ("where is it", " ok.")
    assert "uppercase_completion" not in advice_on(pairs)


def test_long_examples_are_told() -> None:
    pairs = [("a", " b"), ("c", " d" * 5_000), ("e", " f")]
    advice = advice_on(pairs)["long_examples"]
    assert advice.rows == (2,)
    assert changed(advice, pairs) == [("a", " b"), ("e", " f")]


def test_classification_is_split_at_random_into_files_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"question {n} ->", "completion": f" {n % 3}"} for n in range(50)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    preparation = inspect(path)
    assert preparation.task == Task.CLASSIFICATION
    assert "3 classes" in preparation.advice[-1].message
    train, valid = preparation.apply({"split"}).write(tmp_path / "out")
    assert (train.name, valid.name) == (
        "labels_prepared_train.jsonl",
        "labels_prepared_valid.jsonl",
    )
    train_rows, valid_rows = read_jsonl(train), read_jsonl(valid)
    assert (len(train_rows), len(valid_rows)) == (40, 10)
    assert sorted(map(str, train_rows + valid_rows)) == sorted(map(str, rows))
    assert preparation.apply({"split"}).rows == preparation.rows


@pytest.mark.parametrize(("num", "held_out"), [(50, 10), (4000, 800), (9000, 1000)])
def test_at_most_a_thousand_are_held_out(tmp_path: Path, num: int, held_out: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(f'{{"prompt":"{n} ->","completion":" x{n % 2}"}}' for n in range(num))
    )
    assert inspect(path).apply({"split"}).held_out == held_out


def test_defaults_are_applied_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_separated(path, [{"prompt": f"q{n}", "completion": f"a{n}"} for n in (1, 2, 3, 1)], ",")
    prepared = inspect(path).apply()
    assert prepared.rows == [{"prompt": f"q{n} ->", "completion": f" a{n}"} for n in (1, 2, 3)]
    assert prepared.estimate_s(tokens_per_s=100) < inspect(path).estimate_s(tokens_per_s=10)


def test_unknown_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    with pytest.raises(InvalidInput, match="named lower; known: none"):
        inspect(path).apply({"lower"})


def test_no_file_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n")
    prepared = inspect(path).apply()
    assert prepared.write()[0].name == "a_prepared.jsonl"
    assert prepared.write()[0].name == "a_prepared-2.jsonl"
    target = tmp_path / "mine.jsonl"
    assert prepared.write(target) == [target]
    with pytest.raises(DataError, match=r"mine\.jsonl exists"):
        prepared.write(target)


@given(texts=st.lists(st.text("ab", max_size=6), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(texts: list[str]) -> None:
    prefix = common_prefix(texts)
    assert all(text.startswith(prefix) for text in texts)
    longer = {text[: len(prefix) + 1] for text in texts}
    assert len(longer) > 1 or longer == {prefix}
    assert common_suffix([text[::-1] for text in texts]) == prefix[::-1]


def test_task_is_guessed_from_how_often_completions_repeat() -> None:
    def examples(completions: str, prompt: str = "a") -> list[Example]:
        return [Example(n, prompt, text) for n, text in enumerate(completions)]

    assert task_of(examples("xxxxyyyy")) == Task.CLASSIFICATION
    assert task_of(examples("xxxyyy")) == Task.CONDITIONAL
    assert task_of(examples("xxxxyyyy", prompt="")) == Task.OPEN_ENDED

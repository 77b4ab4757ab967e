"""From a file as people keep it to a JSONL dataset, with advice on the way.

    preparation = inspect("tickets.csv")
    for advice in preparation.advice:
        print(advice.message, advice.fix)
    paths = preparation.apply().write()

`inspect` reads the file and looks at all rows, `apply` makes the changes that were accepted,
`write` saves the rows: as one file, or as two when a part is held out for validation. The source is
never changed. Rows of other formats than prompt and completion (chat, preference, text) are only
converted; `data/validate.py` checks them.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import orjson

from data.advice import Advice, Example, Task, advise, listed, num_held_out, task_of
from data.check_parts import is_blank
from data.errors import DataError, InvalidInput
from data.rows import Format, detect
from data.tabular import Record, Table, cell_text, read_table

SPLIT_SEED = 42
CHARS_PER_TOKEN = 4  # of English; a rule of thumb, for the estimate only
CPU_TOKENS_PER_S = 300.0  # LoRA on SmolLM2-135M with two CPU cores, about


@dataclass(frozen=True, slots=True)
class Preparation:
    """A file that was read: its rows as they would be written now, and the advice on them."""

    path: Path
    kind: str
    task: Task | None
    rows: Sequence[dict[str, Any]]
    advice: Sequence[Advice]
    examples: Sequence[Example] = field(default=(), repr=False)
    held_out: int = 0

    def apply(self, accept: Collection[str] | None = None) -> Preparation:
        """Make the changes whose advice is accepted, by code; None accepts those on by default.

        Raises:
            InvalidInput: A code in `accept` names no advice of this file with a change to make.
        """
        offered = {
            advice.code: advice for advice in self.advice if advice.fix and not advice.necessary
        }
        unknown = sorted(set(accept or ()) - set(offered))
        if unknown:
            known = ", ".join(offered) or "none"
            raise InvalidInput(
                f"No change to accept is named {', '.join(unknown)}; known: {known}."
            )
        if accept is None:
            accept = {code for code, advice in offered.items() if advice.fix_applied_by_default}
        examples = list(self.examples)
        for advice in offered.values():
            if advice.code in accept and advice.change is not None:
                examples = advice.change(examples)
        rows = [_row(example) for example in examples] if self.examples else self.rows
        held_out = num_held_out(len(rows)) if "split" in accept else 0
        return replace(self, rows=rows, examples=examples, held_out=held_out, advice=())

    def write(self, dest: str | Path | None = None) -> list[Path]:
        """Write the rows as JSONL: training rows first, then those held out, if any.

        Args:
            dest: A `.jsonl` path, which must not exist, or a folder; by default the folder of the
                source. In a folder, a name is taken from the source that is still free.
        """
        parts = _split(self.rows, self.held_out)
        paths = _free_paths(self.path, dest, ["_train", "_valid"] if len(parts) > 1 else [""])
        for path, rows in zip(paths, parts, strict=True):
            with path.open("xb") as file:
                file.writelines(orjson.dumps(row) + b"\n" for row in rows)
        return paths

    def estimate_s(
        self, num_epochs: int = 3, tokens_per_s: float = CPU_TOKENS_PER_S, start_s: float = 20.0
    ) -> float:
        """About how many seconds training takes, to within a factor of a few."""
        num_chars = sum(len(orjson.dumps(row)) for row in self.rows)
        return start_s + num_epochs * num_chars / CHARS_PER_TOKEN / tokens_per_s


def inspect(
    path: str | Path, *, prompt_column: str = "prompt", completion_column: str = "completion"
) -> Preparation:
    """Read a CSV, TSV, XLSX, JSON, JSONL or TXT file and look at its rows.

    Args:
        path: The file, whose extension tells its kind.
        prompt_column: The column of the prompts.
        completion_column: The column of the completions.

    Raises:
        DataError: The file cannot be read, or lacks a column.
    """
    table = read_table(path)
    notes = [Advice("note", note) for note in table.notes]
    if table.kind != "JSONL":
        fix = "Convert the file to JSONL."
        message = f"The file is {table.kind}."
        notes.append(Advice("converted", message, fix=fix, necessary=True))
    if completion_column == "completion" and _is_other_format(table):
        rows = [record.cells for record in table.records]
        notes.append(Advice("num_examples", f"The file has {len(rows)} {detect(rows[0])} rows."))
        return Preparation(Path(path), table.kind, None, rows, notes)
    names = {
        "prompt": _column(table, prompt_column, path),
        "completion": _column(table, completion_column, path),
    }
    notes += _column_advice(table, names)
    examples = [_example(record, names, path) for record in table.records]
    empty = tuple(example.row for example in examples if is_blank(example.completion))
    if empty:
        message = f"{len(empty)} completions are empty: {listed(empty)}."
        fix = f"Remove {len(empty)} rows without a completion."
        notes.append(Advice("empty_completion", message, empty, fix, necessary=True))
        examples = [example for example in examples if not is_blank(example.completion)]
    if not examples:
        raise DataError(
            f"{path}: all completions are empty; fill the column {names['completion']}."
        )
    rows = [_row(example) for example in examples]
    advice = [*notes, *advise(examples)]
    return Preparation(Path(path), table.kind, task_of(examples), rows, advice, examples)


def _is_other_format(table: Table) -> bool:
    """Whether the rows are of a known format that is not made of a prompt and a completion."""
    if table.kind not in ("JSON", "JSONL"):
        return False
    format = detect(table.records[0].cells)
    return format not in (None, Format.PROMPT_COMPLETION)


def _column(table: Table, wanted: str, path: str | Path) -> str:
    """The column that is meant by a name, whatever its case."""
    if wanted in table.columns:
        return wanted
    same = [name for name in table.columns if name.strip().lower() == wanted.lower()]
    if len(same) != 1:
        raise DataError(
            f'{path} has no column "{wanted}"; its columns are: {", ".join(table.columns)}. '
            "Rename one of them, or name the columns of prompts and completions.",
            code="missing_key",
        )
    return same[0]


def _column_advice(table: Table, names: dict[str, str]) -> Iterator[Advice]:
    for key, name in names.items():
        if name != key:
            message = f'The column "{name}" holds the {key}s.'
            yield Advice("renamed_column", message, fix=f'Name it "{key}".', necessary=True)
    extra = [name for name in table.columns if name not in names.values()]
    if extra:
        message = f"Columns other than prompt and completion are not used: {', '.join(extra)}."
        yield Advice("extra_columns", message, fix="Leave them out.", necessary=True)


def _example(record: Record, names: dict[str, str], path: str | Path) -> Example:
    texts = {key: cell_text(record.cells.get(name)) for key, name in names.items()}
    for key, text in texts.items():
        if text is None:
            raise DataError(
                f'{path}: row {record.number}: "{names[key]}" is a list or an object; '
                "expected text.",
                code="invalid_type",
            )
    return Example(record.number, texts["prompt"] or "", texts["completion"] or "")


def _row(example: Example) -> dict[str, Any]:
    return {"prompt": example.prompt, "completion": example.completion}


def _split(rows: Sequence[dict[str, Any]], held_out: int) -> list[list[dict[str, Any]]]:
    """The rows, and apart from them a random choice of `held_out`, both in their order."""
    if not held_out:
        return [list(rows)]
    chosen = set(random.Random(SPLIT_SEED).sample(range(len(rows)), held_out))
    return [
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    ]


def _free_paths(source: Path, dest: str | Path | None, suffixes: Sequence[str]) -> list[Path]:
    """Where to write: never over a file that exists."""
    target = source.parent if dest is None else Path(dest)
    if target.suffix == ".jsonl":
        paths = [target.with_name(f"{target.stem}{suffix}.jsonl") for suffix in suffixes]
        taken = [str(path) for path in paths if path.exists()]
        if taken:
            raise DataError(f"{', '.join(taken)} exists; give another name or remove it.")
        return paths
    target.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        tail = "" if number == 1 else f"-{number}"
        paths = [target / f"{source.stem}_prepared{suffix}{tail}.jsonl" for suffix in suffixes]
        if not any(path.exists() for path in paths):
            break
    return paths

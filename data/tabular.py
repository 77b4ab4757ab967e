"""Tables of examples out of the files that people keep them in: CSV, TSV, XLSX, JSON, JSONL, TXT.

Every row keeps the number under which its owner finds it: the row of a spreadsheet (the header is
row 1), the line of a JSONL or text file, the position in a JSON list. Tables are held in memory.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import orjson

from data.errors import DataError
from data.parse import decode_object
from data.validate import validate


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was found: its number in the source, and its cells by column."""

    number: int
    cells: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """All rows of a file, and what is worth telling about how they were read."""

    kind: str
    columns: list[str]
    records: list[Record]
    notes: list[str] = field(default_factory=list)


def read_table(path: str | Path) -> Table:
    """Read a file by its extension.

    Raises:
        DataError: The file is missing, of another kind, not UTF-8, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the path of an existing one.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise DataError(f"{path} has the extension {path.suffix!r}; expected one of {known}.")
    table = reader(path)
    if not table.records:
        raise DataError(f"{path} has no rows; add examples.")
    return table


def _read_csv(path: Path) -> Table:
    return _read_separated(path, "CSV", ",")


def _read_tsv(path: Path) -> Table:
    return _read_separated(path, "TSV", "\t")


def _read_separated(path: Path, kind: str, separator: str) -> Table:
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=separator, strict=True)
    try:
        return _table_of_rows(path, kind, enumerate(rows, 1))
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not valid {kind}: {error}.") from error


def _read_xlsx(path: Path) -> Table:
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, InvalidFileException, KeyError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an Excel workbook: {error}.") from error
    try:
        names = book.sheetnames
        rows = book[names[0]].iter_rows(values_only=True)
        table = _table_of_rows(path, "XLSX", enumerate(rows, 1))
    finally:
        book.close()
    if len(names) > 1:
        others = ", ".join(names[1:])
        table.notes.append(f"Only the first sheet, {names[0]}, was read; not: {others}.")
    return table


def _table_of_rows(path: Path, kind: str, rows: Iterable[tuple[int, Sequence[Any]]]) -> Table:
    """A table from a header and rows of cells; rows without any content are left out."""
    filled = (
        (number, cells) for number, cells in rows if any(cell not in ("", None) for cell in cells)
    )
    header = next(filled, None)
    if header is None:
        return Table(kind, [], [])
    columns = ["" if name is None else str(name).strip() for name in header[1]]
    while columns and not columns[-1]:
        columns.pop()
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has several columns named {', '.join(repeated)}; rename them.")
    records = []
    for number, cells in filled:
        if any(cell not in ("", None) for cell in cells[len(columns) :]):
            raise DataError(
                f"{path}: row {number} has {len(cells)} cells, the header {len(columns)}; "
                "quote cells that hold the separator."
            )
        padded = [*cells, *[""] * (len(columns) - len(cells))]
        records.append(Record(number, dict(zip(columns, padded, strict=False))))
    return Table(kind, columns, records)


def _read_json(path: Path) -> Table:
    text = _read_text(path)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if validate(path, level="syntax").ok:
            table = _read_lines_of_json(path)
            table.notes.append("The file is named JSON but holds one object a line: JSONL.")
            return table
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}."
        ) from error
    rows = value if isinstance(value, list) else [value]
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if wrong:
        raise DataError(f"{path}: item {wrong[0]} is not an object; expected a list of objects.")
    return _table_of_objects("JSON", list(enumerate(rows, 1)))


def _read_jsonl(path: Path) -> Table:
    report = validate(path, level="syntax")
    if report.ok or report.counts.keys() == {"empty_file"}:
        return _read_lines_of_json(path)
    try:
        table = _read_json(path)
    except DataError:
        lines = [problem.to_dict() for problem in report.problems]
        raise DataError(report.summary(), lines=lines) from None
    table.notes.append("The file is named JSONL but holds one JSON document.")
    return table


def _read_lines_of_json(path: Path) -> Table:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    objects = [
        (number, decode_object(line)) for number, line in enumerate(lines, 1) if line.strip()
    ]
    return _table_of_objects("JSONL", [(n, row) for n, row in objects if isinstance(row, dict)])


def _table_of_objects(kind: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    return Table(kind, columns, [Record(number, row) for number, row in rows])


def _read_txt(path: Path) -> Table:
    records = [
        Record(number, {"prompt": "", "completion": line})
        for number, line in enumerate(_read_text(path).splitlines(), 1)
        if line.strip()
    ]
    notes = ["Every line was taken as a completion with an empty prompt."]
    return Table("TXT", ["prompt", "completion"], records, notes)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8.",
            code="invalid_utf8",
        ) from error


def cell_text(value: Any) -> str | None:
    """A cell as text; None for a list or an object, which no column of text may hold."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None if isinstance(value, list | dict) else str(value)


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".xlsx": _read_xlsx,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
}

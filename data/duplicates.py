"""Rows that say the same, found by 64-bit hashes in constant memory a row.

16 bytes a row (hash and line number) are kept, in memory up to `SPILL_ROWS` rows and beyond that in
a temporary file, parted by the top bits of the hash so that each part is compared on its own.
Two different rows are taken for equal with a chance of about n²/2⁶⁵: 3 in a million for ten million
rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.jsonl import Source, read_row_blocks
from data.report import KEEP, Problem
from data.rows import Format, Row, fingerprint

SPILL_ROWS = 1 << 20  # 16 MiB of pairs
_PARTS = 64
_PART_SHIFT = np.uint64(58)  # leaves the top six bits
_VALID = np.uint64(1 << 63)  # marks a line number as one of the validation file
Lines = NDArray[np.uint64]
Pairs = NDArray[np.uint64]  # (rows, 2): hash, line


class Repeats(NamedTuple):
    """How many rows repeat an earlier one, and the first of them: (line, line it repeats)."""

    total: int
    first: list[tuple[int, int]]


class RowIndex:
    """The hashes of all rows seen, with their line numbers."""

    def __init__(self, spill_rows: int = SPILL_ROWS):
        self._spill_rows = spill_rows
        self._pending: list[Pairs] = []
        self._num_pending = 0
        self._file: BinaryIO | None = None
        self._spilled: list[list[tuple[int, int]]] = [[] for _ in range(_PARTS)]

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rows: Sequence[Row], lines: NDArray[np.uint64]) -> None:
        """Add rows with their line numbers."""
        pairs = np.empty((len(rows), 2), np.uint64)
        pairs[:, 0] = _hashes(rows)
        pairs[:, 1] = lines
        self._pending.append(pairs)
        self._num_pending += len(rows)
        if self._num_pending >= self._spill_rows:
            self._spill()

    def repeats(self) -> Repeats:
        """The rows that say what a row on an earlier line says."""
        return _collect(
            (lines[again], origins[again])
            for lines, origins in self.groups()
            for again in [origins != lines]
        )

    def groups(self) -> Iterator[tuple[Lines, Lines]]:
        """All rows that are not alone, in parts: their lines, and the first that says the same."""
        for pairs in self._parts():
            ordered = np.sort(pairs[:, 0])
            shared = ordered[1:][ordered[1:] == ordered[:-1]]
            if not len(shared):
                continue
            pairs = pairs[np.isin(pairs[:, 0], shared)]
            pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
            starts = np.flatnonzero(np.r_[True, pairs[1:, 0] != pairs[:-1, 0]])
            lengths = np.diff(np.r_[starts, len(pairs)])
            yield pairs[:, 1], np.repeat(pairs[starts, 1], lengths)

    def _spill(self) -> None:
        """Move what is pending to the file, part by part."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the index
        for part, pairs in enumerate(self._take_pending()):
            self._spilled[part].append((self._file.tell(), len(pairs)))
            self._file.write(pairs.tobytes())

    def _take_pending(self) -> list[Pairs]:
        """What is pending, parted by the top bits of the hash."""
        pairs = _concatenate(self._pending)
        self._pending, self._num_pending = [], 0
        parts = (pairs[:, 0] >> _PART_SHIFT).astype(np.uint8)
        order = np.argsort(parts, kind="stable")  # a radix sort for bytes
        return np.split(pairs[order], np.cumsum(np.bincount(parts, minlength=_PARTS))[:-1])

    def _parts(self) -> Iterator[Pairs]:
        if self._file is None:
            yield _concatenate(self._pending)
            return
        self._spill()
        for segments in self._spilled:
            chunks = []
            for position, count in segments:
                self._file.seek(position)
                chunks.append(np.frombuffer(self._file.read(count * 16), np.uint64).reshape(-1, 2))
            yield _concatenate(chunks)


def _hashes(rows: Sequence[Row]) -> NDArray[np.uint64]:
    try:
        hashes = np.fromiter(map(hash, rows), np.int64, len(rows))
    except TypeError:  # some row has tools
        hashes = np.fromiter(map(fingerprint, rows), np.int64, len(rows))
    return hashes.view(np.uint64)


def _concatenate(chunks: Sequence[Pairs]) -> Pairs:
    return np.concatenate([np.empty((0, 2), np.uint64), *chunks])


def _collect(found: Iterable[tuple[Lines, Lines]]) -> Repeats:
    """Count the rows found, and keep those of the smallest lines."""
    total, first = 0, list[tuple[int, int]]()
    for lines, origins in found:
        total += len(lines)
        keep = np.argsort(lines)[:KEEP]
        first += zip(lines[keep].tolist(), origins[keep].tolist(), strict=True)
    return Repeats(total, sorted(first)[:KEEP])


def find_overlap(
    train: Source, valid: Source, format: Format | None = None
) -> tuple[int, list[Problem]]:
    """The rows of a validation file that the training file holds too: how many, and the first 100.

    Both files must have passed validation; the problems are on lines of the validation file.
    """
    with RowIndex() as index:
        for lines, rows in read_row_blocks(train, format):
            index.add(rows, np.asarray(lines, np.uint64))
        for lines, rows in read_row_blocks(valid, format):
            index.add(rows, np.asarray(lines, np.uint64) | _VALID)
        shared = _collect(
            (lines[held] ^ _VALID, origins[held])
            for lines, origins in index.groups()
            for held in [(lines & _VALID != 0) & (origins & _VALID == 0)]
        )
    return shared.total, [
        Problem(
            line,
            1,
            "train_valid_overlap",
            f"the row is also line {origin} of the training file",
            "Remove it from one of the two files, or the validation loss will flatter the model.",
        )
        for line, origin in shared.first
    ]

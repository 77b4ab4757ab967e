"""Rows that say the same, found by 64-bit hashes in constant memory a row.

16 bytes a row (hash and line number) are kept, in memory up to `SPILL_ROWS` rows and beyond that in
a temporary file, parted by the top bits of the hash so that each part is compared on its own.
Two different rows are taken for equal with a chance of about n²/2⁶⁵: 3 in a million for ten million
rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.report import KEEP
from data.rows import Row, fingerprint

SPILL_ROWS = 1 << 20  # 16 MiB of pairs
_PARTS = 64
_PART_SHIFT = np.uint64(58)  # leaves the top six bits
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
        self._num_collapsed = 0
        self._collapsed: Pairs = np.empty((0, 2), np.uint64)
        self._spilled: list[list[tuple[int, int]]] = [[] for _ in range(_PARTS)]

    def __enter__(self) -> RowIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rows: Sequence[Row], lines: NDArray[np.uint64]) -> None:
        """Add rows with their line numbers."""
        pairs = np.empty((len(rows), 2), np.uint64)
        pairs[:, 0] = hashes_of(rows)
        pairs[:, 1] = lines
        self._pending.append(pairs)
        self._num_pending += len(rows)
        if self._num_pending >= self._spill_rows:
            self._collapse()
            self._spill()

    def repeats(self) -> Repeats:
        """The rows that say what a row on an earlier line says."""
        self._collapse()
        total = self._num_collapsed - len(self._collapsed)
        self._pending.append(self._collapsed)
        first: list[tuple[int, int]] = []
        for pairs in self._parts():
            lines, origins = _repeated(pairs)
            total += len(lines)
            keep = np.argsort(lines)[:KEEP]
            first += zip(lines[keep].tolist(), origins[keep].tolist(), strict=True)
        return Repeats(total, sorted(first)[:KEEP])

    def _collapse(self) -> None:
        """Keep one row of those pending that are the same; of the others, count and first lines.

        So a file of one row repeated takes no more memory than one of rows all different.
        """
        pairs = _concatenate(self._pending)
        self._pending = [pairs]
        if not len(_shared(pairs)):
            return
        order = np.argsort(pairs[:, 0], kind="stable")  # equal rows stay in the order of lines
        ordered = pairs[order, 0]
        again = order[1:][ordered[1:] == ordered[:-1]]
        self._num_collapsed += len(again)
        repeated = np.concatenate([self._collapsed, pairs[np.sort(again)[:KEEP]]])
        self._collapsed = repeated[np.argsort(repeated[:, 1])][:KEEP]
        self._pending = [np.delete(pairs, again, axis=0)]

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


def hashes_of(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """The 64-bit hash of each row."""
    try:
        hashes = np.fromiter(map(hash, rows), np.int64, len(rows))
    except TypeError:  # some row has tools
        hashes = np.fromiter(map(fingerprint, rows), np.int64, len(rows))
    return hashes.view(np.uint64)


def _concatenate(chunks: Sequence[Pairs]) -> Pairs:
    return np.concatenate([np.empty((0, 2), np.uint64), *chunks])


def _shared(pairs: Pairs) -> NDArray[np.uint64]:
    """The hashes that occur more than once, which sorting alone finds many times faster."""
    ordered = np.sort(pairs[:, 0])
    return ordered[1:][ordered[1:] == ordered[:-1]]


def _repeated(pairs: Pairs) -> tuple[Lines, Lines]:
    """The lines of rows that say what an earlier one says, and the first such line of each."""
    pairs = pairs[np.isin(pairs[:, 0], np.unique(_shared(pairs)))]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    _, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    lines, origins = pairs[:, 1], np.repeat(pairs[starts, 1], counts)
    return lines[lines != origins], origins[lines != origins]

"""Rendered rows on disk, so that a dataset may be larger than memory.

Rows are written in one pass and read one by one. Two files hold them: `tokens.bin`, int32, a token
that is learned as its id and any other as `~id`, which is negative; and `rows.npy`, one record a
row, which is mapped. Tokens are read from the file when a batch asks for them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.render import IGNORED, Example, truncate

TOKENS, ROWS = "tokens.bin", "rows.npy"
FLUSH_ROWS = 8192
ROW = np.dtype([("end", np.int64), ("line", np.int64), ("learned", np.int32), ("mark", np.int64)])


class TokenRows(Sequence[Example]):
    """The rows of a store, or some of them, each cut to a length where one is set.

    Attributes:
        max_length: Rows are truncated to so many tokens (`data.render.truncate`); None: not at all.
    """

    def __init__(
        self,
        file: _File,
        rows: NDArray[np.void],
        chosen: NDArray[np.int64] | None = None,
        max_length: int | None = None,
    ) -> None:
        self._file = file
        self._rows = rows
        self._chosen = chosen
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self._rows) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index % len(self) if self._chosen is None else int(self._chosen[index])
        start = int(self._rows["end"][row - 1]) if row else 0
        example = self._file.read(start, int(self._rows["end"][row]))
        return example if self.max_length is None else truncate(example, self.max_length)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row: [rows]."""
        ends = self._rows["end"]
        lengths = np.empty(len(ends), np.int32)
        lengths[:1] = ends[:1]
        np.subtract(ends[1:], ends[:-1], out=lengths[1:], casting="unsafe")
        if self._chosen is not None:
            lengths = lengths[self._chosen]
        return lengths if self.max_length is None else lengths.clip(max=self.max_length)

    @property
    def lines(self) -> NDArray[np.int64]:
        """The line of each row in its file: [rows]."""
        return self._column("line")

    @property
    def num_learned(self) -> int:
        """Tokens with loss, of all rows."""
        return int(self._learned().sum())

    @property
    def lost_learned(self) -> NDArray[np.bool_]:
        """Whether a row lost tokens with loss to the cut: [rows]."""
        return self._learned() < self._column("learned")

    def _learned(self) -> NDArray[np.int64]:
        counts = self._column("learned").astype(np.int64)
        if self.max_length is not None:
            whole = TokenRows(self._file, self._rows, self._chosen).lengths
            for row in np.flatnonzero(whole > self.max_length).tolist():
                counts[row] = self[row].num_trained
        return counts

    @property
    def num_repeated(self) -> int:
        """Rows whose tokens, before any cut, are those of an earlier row."""
        return len(self) - len(np.unique(self.marks))

    @property
    def marks(self) -> NDArray[np.int64]:
        """A hash of each row's tokens before any cut, the same for equal rows: [rows]."""
        return self._column("mark")

    def select(self, chosen: NDArray[np.int64]) -> TokenRows:
        """Return some of these rows, by index and in this order."""
        if self._chosen is not None:
            chosen = self._chosen[chosen]
        return TokenRows(self._file, self._rows, chosen, self.max_length)

    def cut(self, max_length: int) -> TokenRows:
        """Return these rows, truncated to a length as they are read."""
        return TokenRows(self._file, self._rows, self._chosen, max_length)

    def _column(self, name: str) -> NDArray[np.int64]:
        column: NDArray[np.int64] = self._rows[name]
        return column if self._chosen is None else column[self._chosen]


class _File:
    """Tokens on disk; reads do not move the file's position, so threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, end: int) -> Example:
        data = os.pread(self._handle, 4 * (end - start), 4 * start)
        if len(data) != 4 * (end - start):
            raise DataError(
                f"{self._path} was cut short: it has {len(data)} of the {4 * (end - start)} bytes "
                f"from byte {4 * start} on. Remove {self._path.parent}, so that the rows are "
                "rendered again",
                code="invalid_training_file",
            )
        codes = np.frombuffer(data, np.int32)
        ids = np.where(codes < 0, ~codes, codes)
        labels = np.where(codes < 0, IGNORED, codes)
        return Example(tuple(ids.tolist()), tuple(labels.tolist()))


def write_rows(folder: Path, rows: Iterable[tuple[int, Example]]) -> None:
    """Write (line, example) pairs into a folder, and have them on disk.

    Raises:
        OSError: The disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = 0
    records: list[tuple[int, int, int, int]] = []
    codes: list[int] = []
    with (folder / TOKENS).open("wb") as tokens, (folder / ROWS).open("wb") as index:

        def flush() -> None:
            tokens.write(np.array(codes, np.int32).tobytes())
            index.write(np.array(records, ROW).tobytes())
            codes.clear()
            records.clear()

        for line, example in rows:
            ids, labels = example.input_ids, example.labels
            end += len(ids)
            codes += [
                ~token if label == IGNORED else token
                for token, label in zip(ids, labels, strict=True)
            ]
            records.append((end, line, len(labels) - labels.count(IGNORED), hash(ids)))
            if len(records) == FLUSH_ROWS:
                flush()
        flush()
        for stream in (tokens, index):
            stream.flush()
            os.fsync(stream.fileno())


def is_whole(folder: Path) -> bool:
    """Tell whether a store has all that its rows name; a crash of the machine may cut it short."""
    tokens, index = folder / TOKENS, folder / ROWS
    if not tokens.exists() or not index.exists() or index.stat().st_size % ROW.itemsize:
        return False
    ends = _map(index)["end"]
    return tokens.stat().st_size == 4 * int(ends[-1] if len(ends) else 0)


def open_rows(folder: Path) -> TokenRows:
    """Open what `write_rows` wrote; the folder may be removed while the rows are in use."""
    return TokenRows(_File(folder / TOKENS), _map(folder / ROWS))


def _map(path: Path) -> NDArray[np.void]:
    has_rows = path.stat().st_size > 0  # an empty file cannot be mapped
    return np.memmap(path, ROW, "r") if has_rows else np.empty(0, ROW)

"""From files to batches: rendered examples, and an order that wastes little padding.

A file is rendered in one pass into a store on disk (`token_store`), which a resumed run finds
again. The order depends on the seed and the epoch alone, so a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import Sampler

from data.errors import DataError
from data.jsonl import read_row_blocks
from data.render import Example, render, render_pairs
from data.rows import Format, Row
from data.token_count import special_tokens
from data.validate import validate
from train.run import write_json
from train.token_store import TokenRows, is_whole, open_rows, write_rows

if TYPE_CHECKING:
    from datasets import Dataset

POOL_BATCHES = 50  # batches that are sorted by length together
LISTED = 20  # lines named in a message
BAR_ROWS = 20_000  # a shorter file needs no progress bar
META = "meta.json"  # of a store that is whole
RENDERING = 1  # raised when rows are rendered otherwise, so that no older store is used


@dataclass(frozen=True)
class Rendered:
    """The examples of one file.

    Attributes:
        examples: On disk; each knows its line.
        digest: SHA-256 of the file.
        kind: Of its rows.
        long: Lines that were longer than the limit: [long rows].
    """

    path: Path
    digest: str
    examples: TokenRows
    kind: Format | None = None
    long: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def lines(self) -> NDArray[np.int64]:
        """The line of each example, for messages about it."""
        return self.examples.lines

    @property
    def num_tokens(self) -> int:
        return int(self.examples.lengths.sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        return int(self.examples.lengths.max(initial=0))


def load_file(
    path: Path, tokenizer: Any, min_examples: int, store: Path | None = None, base: str = ""
) -> Rendered:
    """Check and render a dataset.

    Args:
        store: Where the rendered rows are kept, and found again by a resumed run and by the other
            processes of this machine; without one they go with the process.
        base: Fingerprint of the base model, which a kept store must be of.

    Raises:
        DataError: The file is absent or has problems; the message lists the first of them.
    """
    if store is None:
        with tempfile.TemporaryDirectory(prefix="hone-tokens-") as folder:
            return _load(path, tokenizer, min_examples, Path(folder), base)
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{store}.lock"):
        return _load(path, tokenizer, min_examples, store, base)


def _load(path: Path, tokenizer: Any, min_examples: int, store: Path, base: str) -> Rendered:
    meta = store / META
    if meta.exists():
        kept = json.loads(meta.read_text("utf-8"))
        if kept["key"] == _key(_digest(path), tokenizer, base) and is_whole(store):
            kind = None if kept["kind"] is None else Format(kept["kind"])
            return Rendered(path, kept["sha256"], open_rows(store), kind)
        meta.unlink()
    markers = special_tokens(tokenizer)
    report = validate(path, min_examples=min_examples, special_tokens=markers)
    if not report.ok:
        code = "invalid_n_examples" if "invalid_n_examples" in report.counts else None
        raise DataError(report.summary(LISTED), code=code or "invalid_training_file")
    examples = _render_file(path, tokenizer, report.format)
    show = report.num_examples > BAR_ROWS and sys.stderr.isatty()
    bar = track(
        examples,
        "rendering",
        total=report.num_examples,
        console=Console(stderr=True),
        disable=not show,
    )
    write_rows(store, bar)
    key = _key(report.sha256, tokenizer, base)
    write_json(meta, {"key": key, "kind": report.format, "sha256": report.sha256})
    return Rendered(path, report.sha256, open_rows(store), report.format)


def _render_file(path: Path, tokenizer: Any, kind: Format | None) -> Iterator[tuple[int, Example]]:
    """Render a file's rows, each with its line, in the order of the file."""
    for lines, rows in read_row_blocks(path, kind):
        pairs = render_pairs(tokenizer, rows)
        if pairs is not None:
            yield from zip(lines, pairs, strict=True)
            continue
        for line, row in zip(lines, rows, strict=True):
            yield line, _render_row(path, line, tokenizer, row)


def _render_row(path: Path, line: int, tokenizer: Any, row: Row) -> Example:
    try:
        return render(tokenizer, row)
    except DataError as error:
        raise DataError(f"{path}:{line}: {error.message}", code=error.code) from error


def limit_length(rendered: Rendered, max_length: int, on_long: str) -> Rendered:
    """Apply the length limit: truncate, drop or refuse longer rows.

    Raises:
        DataError: `on_long` is "error" and a row is longer, or no row is left.
    """
    longer = rendered.examples.lengths > max_length
    long = rendered.lines[longer]
    if len(long) and on_long == "error":
        raise DataError(
            f"{rendered.path}: {len(long)} examples are longer than {max_length} tokens: "
            f"{name_lines(long)}. Shorten them, raise max_length, or set on_long to "
            "truncate or drop",
            code="example_too_long",
        )
    examples = rendered.examples
    if on_long == "drop":
        examples = examples.select(np.flatnonzero(~longer))
    if not len(examples):
        raise DataError(
            f"{rendered.path}: every example is longer than {max_length} tokens; raise max_length",
            code="example_too_long",
        )
    return replace(rendered, examples=examples.cut(max_length), long=long)


def split(rendered: Rendered, fraction: float, seed: int) -> tuple[Rendered, Rendered]:
    """Hold out a random share of the examples, at least one; equal ones stay together.

    Of equal rows the first stands for all, and they are held out only where all of them fit in.

    Raises:
        DataError: All rows are equal.
    """
    count = len(rendered.examples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    _, first, which, sizes = np.unique(
        rendered.examples.marks, return_index=True, return_inverse=True, return_counts=True
    )
    if len(first) == 1:
        raise DataError(
            f"{rendered.path}: all {count} examples are equal, so that none can be held out of "
            "training; give other rows, or leave out validation_fraction",
            code="invalid_training_file",
        )
    wanted = max(1, round(fraction * count), int(sizes.min()))
    kinds = which[order[first[which[order]] == order]]  # in the order of the rows that stand first
    kinds = kinds[sizes[kinds] <= wanted]
    is_kind_held = np.zeros(len(first), bool)
    is_kind_held[kinds[np.cumsum(sizes[kinds]) <= wanted]] = True
    is_held = is_kind_held[which]
    train, held = (
        replace(rendered, examples=rendered.examples.select(np.flatnonzero(chosen)))
        for chosen in (~is_held, is_held)
    )
    return train, held


def as_dataset(examples: TokenRows) -> Dataset:
    """Return the columns that TRL takes as already prepared, each row read when it is asked for."""
    from datasets import Dataset  # takes 90 MB, and PPO needs none of it

    rows = pa.table({"row": np.arange(len(examples), dtype=np.int32)})
    return Dataset(rows, fingerprint="rows").with_transform(_Reader(examples))


class _Reader:
    """Turns row numbers into rows for `datasets`, which pickles what it calls to name the result:
    rows may be many gigabytes, so they are left out of that."""

    def __init__(self, examples: TokenRows) -> None:
        self._examples = examples

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        chosen = [self._examples[row] for row in batch["row"]]
        return {
            "input_ids": [list(example.input_ids) for example in chosen],
            "labels": [list(example.labels) for example in chosen],
        }


def name_lines(lines: Sequence[int] | NDArray[np.int64], count: int | None = None) -> str:
    """Return "lines 4, 90, 107 and 12 more"; `count` where `lines` are only the first of them."""
    count = len(lines) if count is None else count
    shown = lines[:LISTED]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"line{'s' if count > 1 else ''} {', '.join(map(str, shown))}{more}"


class LengthGroupedSampler(Sampler[int]):
    """A random order in which neighbours have similar lengths.

    Rows are shuffled, cut into pools of POOL_BATCHES batches, sorted by length within a pool, cut
    into batches, and those shuffled again; the last batch of an epoch is the only one that may be
    short.
    """

    def __init__(
        self, lengths: Sequence[int] | NDArray[np.int32], batch_size: int, seed: int
    ) -> None:
        self._lengths = np.asarray(lengths, np.int32)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).numpy()
        tail = len(order) % self._batch_size
        full, rest = order[: len(order) - tail], order[len(order) - tail :]
        pool = self._batch_size * POOL_BATCHES
        for start in range(0, len(full), pool):
            rows = full[start : start + pool]
            rows[:] = rows[np.argsort(self._lengths[rows], kind="stable")]
        batches = full.reshape(-1, self._batch_size)
        for index in torch.randperm(len(batches), generator=generator).numpy():
            yield from batches[index].tolist()
        yield from rest.tolist()


def _key(sha256: str, tokenizer: Any, base: str) -> list[Any]:
    """Return what a store's content depends on."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [RENDERING, sha256, base, *ends, tokenizer.chat_template]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

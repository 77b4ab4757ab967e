"""From files to batches: rendered examples, and an order that wastes little padding.

The order depends on the seed and the epoch alone, so a resumed run sees what an uninterrupted one
would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler

from data.errors import DataError
from data.jsonl import read_numbered_rows
from data.render import Example, render, truncate
from data.rows import Format
from data.validate import validate

if TYPE_CHECKING:
    from datasets import Dataset

POOL_BATCHES = 50  # batches that are sorted by length together
LISTED = 20  # lines named in a message


@dataclass
class Rendered:
    """The examples of one file.

    Attributes:
        lines: The line of each example, for messages about it.
        digest: SHA-256 of the file.
        kind: Of its rows.
        long: Lines that were longer than the limit.
    """

    path: Path
    digest: str
    kind: Format | None = None
    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    long: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.examples))

    @property
    def longest(self) -> int:
        return max(map(len, self.examples), default=0)


def load_file(path: Path, tokenizer: Any, min_examples: int) -> Rendered:
    """Check and render a dataset.

    Raises:
        DataError: The file is absent or has problems; the message lists the first of them.
    """
    report = validate(path, min_examples=min_examples, special_tokens=_markers(tokenizer))
    if not report.ok:
        code = "invalid_n_examples" if "invalid_n_examples" in report.counts else None
        raise DataError(report.summary(LISTED), code=code or "invalid_training_file")
    rendered = Rendered(path, _digest(path), report.format)
    for line, row in read_numbered_rows(path, report.format):
        try:
            rendered.examples.append(render(tokenizer, row))
        except DataError as error:
            raise DataError(f"{path}:{line}: {error.message}", code=error.code) from error
        rendered.lines.append(line)
    return rendered


def limit_length(rendered: Rendered, max_length: int, on_long: str) -> None:
    """Apply the length limit: truncate, drop or refuse longer rows.

    Raises:
        DataError: `on_long` is "error" and a row is longer, or no row is left.
    """
    longer = [len(example) > max_length for example in rendered.examples]
    rendered.long = [line for line, is_long in zip(rendered.lines, longer, strict=True) if is_long]
    if rendered.long and on_long == "error":
        raise DataError(
            f"{rendered.path}: {len(rendered.long)} examples are longer than {max_length} tokens: "
            f"{name_lines(rendered.long)}. Shorten them, raise max_length, or set on_long to "
            "truncate or drop",
            code="example_too_long",
        )
    if on_long == "drop":
        kept = [i for i, is_long in enumerate(longer) if not is_long]
        rendered.examples = [rendered.examples[i] for i in kept]
        rendered.lines = [rendered.lines[i] for i in kept]
    rendered.examples = [truncate(example, max_length) for example in rendered.examples]
    if not rendered.examples:
        raise DataError(
            f"{rendered.path}: every example is longer than {max_length} tokens; raise max_length",
            code="example_too_long",
        )


def split(rendered: Rendered, fraction: float, seed: int) -> tuple[Rendered, Rendered]:
    """Hold out a random share of the examples, at least one."""
    order = torch.randperm(
        len(rendered.examples), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    held = set(order[: max(1, round(fraction * len(order)))])
    parts = []
    for chosen in (False, True):
        part = Rendered(rendered.path, rendered.digest, rendered.kind)
        for index, example in enumerate(rendered.examples):
            if (index in held) == chosen:
                part.examples.append(example)
                part.lines.append(rendered.lines[index])
        parts.append(part)
    return parts[0], parts[1]


def as_dataset(examples: Sequence[Example]) -> Dataset:
    """Return the columns that TRL takes as already prepared."""
    from datasets import Dataset  # takes 90 MB, and PPO needs none of it

    return Dataset.from_dict(
        {
            "input_ids": [list(example.input_ids) for example in examples],
            "labels": [list(example.labels) for example in examples],
        }
    )


def name_lines(lines: Sequence[int], count: int | None = None) -> str:
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

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self._lengths = lengths
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
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        tail = len(order) % self._batch_size
        full, rest = order[: len(order) - tail], order[len(order) - tail :]
        batches = []
        pool = self._batch_size * POOL_BATCHES
        for start in range(0, len(full), pool):
            rows = sorted(full[start : start + pool], key=self._lengths.__getitem__)
            batches += [
                rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)
            ]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from rest


def _markers(tokenizer: Any) -> list[str]:
    """Return the special tokens that a row must not spell out."""
    return [token for token in tokenizer.all_special_tokens if len(token) > 2]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

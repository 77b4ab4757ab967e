"""Rows that say the same, within a file and across two, against brute force."""

from __future__ import annotations

import io
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.duplicates import RowIndex
from data.rows import Text
from data.validate import find_overlap


@given(
    texts=st.lists(st.sampled_from("abcdefgh"), max_size=300),
    spill_rows=st.integers(1, 400),
    block=st.integers(1, 50),
)
@settings(deadline=None, max_examples=60)
def test_duplicates_agree_with_brute_force(texts: list[str], spill_rows: int, block: int) -> None:
    with RowIndex(spill_rows=spill_rows) as index:
        for start in range(0, len(texts), block):
            part = texts[start : start + block]
            lines = np.arange(start + 1, start + 1 + len(part), dtype=np.uint64)
            index.add([Text(text) for text in part], lines)
        repeats = index.repeats()
    pairs = [(n, texts.index(t) + 1) for n, t in enumerate(texts, 1) if texts.index(t) + 1 != n]
    assert repeats == (len(pairs), pairs[:100])


def test_overlap_of_training_and_validation_rows() -> None:
    train = [{"prompt": str(n), "completion": "b"} for n in (5, 1, 2, 2, 3)]
    valid = [{"prompt": str(n), "completion": "b"} for n in (9, 3, 2, 3, 8)]
    first, second = (
        io.BytesIO("\n".join(map(json.dumps, rows)).encode()) for rows in (train, valid)
    )
    total, problems = find_overlap(first, second)
    assert total == 3
    assert [(p.line, p.message) for p in problems] == [
        (2, "the row is also line 5 of the training file"),
        (3, "the row is also line 3 of the training file"),
        (4, "the row is also line 5 of the training file"),
    ]
    assert find_overlap(io.BytesIO(b""), io.BytesIO(b"")) == (0, [])

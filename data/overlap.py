"""Rows that a validation file shares with the training file, which make its loss look too good."""

from __future__ import annotations

import numpy as np

from data.duplicates import hashes_of
from data.jsonl import Source, read_row_blocks
from data.report import KEEP, Problem
from data.rows import Format


def find_overlap(
    train: Source, valid: Source, format: Format | None = None
) -> tuple[int, list[Problem]]:
    """The rows of a validation file that the training file holds too: how many, and the first 100.

    Both files must have passed validation. Memory grows with the rows of the validation file, by
    some 50 bytes each, and not with the training file.
    """
    blocks = [
        (np.asarray(n, np.uint64), hashes_of(rows)) for n, rows in read_row_blocks(valid, format)
    ]
    if not blocks:
        return 0, []
    lines = np.concatenate([block[0] for block in blocks])
    hashes, row_of = np.unique(np.concatenate([b[1] for b in blocks]), return_inverse=True)
    origins = np.zeros(len(hashes), np.uint64)  # the first training line that says the same, or 0
    for numbers, rows in read_row_blocks(train, format):
        found = hashes_of(rows)
        places = np.searchsorted(hashes, found).clip(max=len(hashes) - 1)
        new = (hashes[places] == found) & (origins[places] == 0)
        origins[places[new][::-1]] = np.asarray(numbers, np.uint64)[new][::-1]
    shared = np.flatnonzero(origins[row_of])
    return len(shared), [
        _problem(int(lines[row]), int(origins[row_of[row]])) for row in shared[:KEEP]
    ]


def _problem(line: int, origin: int) -> Problem:
    message = f"the row is also line {origin} of the training file"
    fix = "Remove it from one of the two files, or the validation loss will flatter the model."
    return Problem(line, 1, "train_valid_overlap", message, fix)

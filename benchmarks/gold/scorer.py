"""The gold score: a ridge regression of people's sentiment ratings on words and pairs of words.

`score` is a reward function (TRL's signature); the weights' file is in HONE_GOLD.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 8192
RIDGE = 3.0


def features(text: str) -> dict[int, float]:
    """Return the hashed words and pairs of words of a text, of length 1."""
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    found: dict[int, float] = {}
    for gram in grams:
        index = zlib.crc32(gram.encode()) % SIZE
        found[index] = 1.0
    norm = max(1.0, len(found)) ** 0.5
    return {index: value / norm for index, value in found.items()}


def matrix(texts: Sequence[str]) -> np.ndarray:
    found = np.zeros((len(texts), SIZE + 1), dtype=np.float32)
    found[:, SIZE] = 1.0
    for row, text in enumerate(texts):
        for index, value in features(text).items():
            found[row, index] = value
    return found


def fit(texts: Sequence[str], ratings: Sequence[float]) -> np.ndarray:
    """Return the weights [SIZE + 1]; solved in the rows' space, which is smaller."""
    x, y = matrix(texts).astype(np.float64), np.asarray(ratings, dtype=np.float64)
    kernel = x @ x.T + RIDGE * np.eye(len(x))
    return x.T @ np.linalg.solve(kernel, y)  # type: ignore[no-any-return]


def score(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the predicted rating of prompt and completion together, about -3 to 3."""
    texts = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
    return [float(value) for value in matrix(texts) @ _weights()]


@cache
def _weights() -> np.ndarray:
    return np.load(Path(os.environ["HONE_GOLD"]))["weights"]  # type: ignore[no-any-return]

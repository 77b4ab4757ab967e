"""The moderation classifier: one logistic regression a category over hashed n-grams.

It runs in numpy within a millisecond a text. `weights.npz` beside this file is what hone ships;
`python -m data.moderation.train` makes another. What it was trained on, and how well it does, is in
docs/moderation.md. A category without weights scores 0.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.errors import InvalidInput
from data.moderation.features import NUM_FEATURES, pieces, stack

SHIPPED = Path(__file__).with_name("weights.npz")
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)  # of the official API, in its words
MAX_CHARS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """Weights of a set of categories.

    Attributes:
        name: What answers call it.
        categories: Those that it knows; `CATEGORIES`, or others that only rules use.
        weights: [categories, NUM_FEATURES], float32.
        bias: [categories].
        idf: [NUM_FEATURES]: inverse document frequency of the training texts.
        thresholds: [categories]: the score from which a category is flagged.
    """

    name: str
    categories: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray
    idf: np.ndarray
    thresholds: np.ndarray

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability of each category: [texts, categories].

        A long text has the highest score of its pieces.
        """
        cut = [pieces(text[:MAX_CHARS]) for text in texts]
        flat, starts = stack([piece for parts in cut for piece in parts])
        values = self.idf[flat]
        sizes = np.diff(starts)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        norms = np.sqrt(np.bincount(owners, values**2, len(sizes)))
        logits = np.stack(
            [np.bincount(owners, row[flat] * values, len(sizes)) for row in self.weights], axis=1
        )
        logits = logits / np.maximum(norms, 1e-9)[:, None] + self.bias
        probabilities = 1 / (1 + np.exp(-logits))
        ends = np.cumsum([0, *map(len, cut)])
        return np.stack([probabilities[a:b].max(axis=0) for a, b in pairwise(ends)])

    def judge(self, text: str) -> dict[str, float]:
        """Return the score of each category that it knows."""
        row = self.scores([text])[0]
        return {name: float(score) for name, score in zip(self.categories, row, strict=True)}

    def threshold(self, category: str) -> float:
        """Return from which score a category is flagged."""
        return float(self.thresholds[self.categories.index(category)])

    def flagged(self, scores: Mapping[str, float]) -> list[str]:
        """Return the official categories whose score reaches its threshold."""
        known = [name for name in self.categories if name in CATEGORIES]
        return [name for name in known if scores[name] >= self.threshold(name)]


def save(classifier: Classifier, path: Path) -> None:
    """Write the weights as 8-bit numbers with a scale for each category."""
    scale = np.maximum(np.abs(classifier.weights).max(axis=1), 1e-9) / 127
    np.savez_compressed(
        path,
        name=np.array(classifier.name),
        categories=np.array(classifier.categories),
        weights=np.round(classifier.weights / scale[:, None]).astype(np.int8),
        scale=scale.astype(np.float32),
        bias=classifier.bias.astype(np.float32),
        idf=classifier.idf.astype(np.float16),
        thresholds=classifier.thresholds.astype(np.float32),
    )


@lru_cache(maxsize=2)
def load(path: Path | None = None) -> Classifier:
    """Read a classifier; None is the one that hone ships.

    Raises:
        InvalidInput: The file is absent or holds something else.
    """
    source = path or SHIPPED
    try:
        with np.load(source, allow_pickle=False) as found:
            weights = found["weights"].astype(np.float32) * found["scale"][:, None]
            classifier = Classifier(
                str(found["name"]),
                tuple(str(name) for name in found["categories"]),
                weights,
                found["bias"].astype(np.float64),
                found["idf"].astype(np.float32),
                found["thresholds"].astype(np.float64),
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f'moderation_weights "{source}" holds no moderation classifier ({error}); '
            "`python -m data.moderation.train` makes one",
            param="moderation_weights",
        ) from error
    if classifier.weights.shape != (len(classifier.categories), NUM_FEATURES):
        raise InvalidInput(
            f'moderation_weights "{source}" has weights of the shape {classifier.weights.shape}; '
            f"expected ({len(classifier.categories)}, {NUM_FEATURES})",
            param="moderation_weights",
        )
    return classifier

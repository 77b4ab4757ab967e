"""How well a classifier tells labelled texts apart, with 95 % intervals.

    python -m data.moderation.measure FILE... [--label VALUE=CATEGORY ...] [--weights FILE]

Prints one JSON object a category: area under the ROC curve, average precision, and precision and
recall at the category's threshold. Intervals are percentiles of 1,000 bootstrap samples of the
texts (Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import ToolkitError
from data.moderation import classifier as classifiers
from data.moderation.classifier import Classifier
from data.moderation.labelled import Labelled, read, read_map

SAMPLES = 1000
Measure = Callable[[np.ndarray, np.ndarray], float]


def auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a 1 scores above a 0, ties by half."""
    order = np.argsort(scores, kind="stable")
    _, inverse, counts = np.unique(scores[order], return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]
    ones = truth[order] == 1
    num_ones, num_zeros = int(ones.sum()), int((~ones).sum())
    if not num_ones or not num_zeros:
        return float("nan")
    return float((ranks[ones].sum() - num_ones * (num_ones + 1) / 2) / (num_ones * num_zeros))


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the precision-recall curve, as steps; ties count together."""
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(truth[order] == 1), scores[order]
    if not len(hits) or not hits[-1]:
        return float("nan")
    last = np.append(ranked[1:] != ranked[:-1], True)  # of each run of equal scores
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def precision_at(threshold: float) -> Measure:
    """Return the share of flagged texts that are 1."""

    def precision(truth: np.ndarray, scores: np.ndarray) -> float:
        flagged = scores >= threshold
        return float(truth[flagged].mean()) if flagged.any() else float("nan")

    return precision


def recall_at(threshold: float) -> Measure:
    """Return the share of 1s that are flagged."""

    def recall(truth: np.ndarray, scores: np.ndarray) -> float:
        ones = truth == 1
        return float((scores[ones] >= threshold).mean()) if ones.any() else float("nan")

    return recall


def with_interval(
    measure: Measure, truth: np.ndarray, scores: np.ndarray, seed: int = 0
) -> list[float]:
    """Return the value and its 95 % interval, rounded."""
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(SAMPLES):
        chosen = draw.integers(0, len(truth), len(truth))
        samples.append(measure(truth[chosen], scores[chosen]))
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if not np.isnan(samples).all() else (0, 1)
    return [round(float(value), 3) for value in (measure(truth, scores), low, high)]


def report(model: Classifier, labelled: Labelled) -> dict[str, dict[str, Any]]:
    """Measure every category that both the classifier and the texts know."""
    scores = model.scores(labelled.texts)
    found = {}
    for column, category in enumerate(model.categories):
        known = labelled.of(category)
        truth, own = known[known >= 0], scores[known >= 0, column]
        if not (truth == 1).any():
            continue
        threshold = model.threshold(category)
        measures: dict[str, Measure] = {
            "auc": auc,
            "average_precision": average_precision,
            "precision": precision_at(threshold),
            "recall": recall_at(threshold),
        }
        found[category] = {
            "texts": len(truth),
            "positive": int(truth.sum()),
            "threshold": round(threshold, 3),
            **{name: with_interval(measure, truth, own) for name, measure in measures.items()},
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.moderation.measure")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="labelled JSONL")
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=CATEGORY")
    parser.add_argument("--weights", type=Path, help="default: the ones that hone ships")
    options = parser.parse_args(arguments)
    try:
        model = classifiers.load(options.weights)
        labelled = read(options.files, read_map(options.label))
        print(json.dumps(report(model, labelled), indent=2))
    except (ToolkitError, OSError) as error:
        print(f"data.moderation.measure: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

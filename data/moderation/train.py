"""Train a moderation classifier on labelled JSONL.

    python -m data.moderation.train FILE... [--label VALUE=CATEGORY ...] [--benign FILE ...]
        --out weights.npz

One logistic regression a category with an L2 penalty, fitted by Adam over all texts at once; the
threshold is the lowest at which nine in ten flagged texts of a held-back tenth are right, or else
the one with the best F1. The same files and seed give the same weights. See `labelled` for rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import ToolkitError
from data.moderation import classifier as classifiers
from data.moderation.classifier import Classifier
from data.moderation.features import NUM_FEATURES, stack
from data.moderation.labelled import Labelled, read, read_benign, read_map

NAME = "hone-moderation-1"
STEPS = 300
LEARNING_RATE = 0.1
PENALTY = 1e-4
WANTED_PRECISION = 0.9
HELD_BACK = 10  # one text in this many sets the threshold


def fit(labelled: Labelled, name: str = NAME, seed: int = 0) -> Classifier:
    """Train one regression for each category with both 1s and 0s among its texts."""
    flat, starts = stack(labelled.texts)
    sizes = np.diff(starts)
    document_counts = np.bincount(flat, minlength=NUM_FEATURES)
    idf = np.log((1 + len(sizes)) / (1 + document_counts)).astype(np.float16).astype(np.float32) + 1
    idf = idf.astype(np.float16).astype(np.float32)  # as it is stored
    owners = np.repeat(np.arange(len(sizes)), sizes)
    norms = np.sqrt(np.bincount(owners, idf[flat] ** 2, len(sizes)))
    values = idf[flat] / np.maximum(norms, 1e-9)[owners]
    held = np.random.default_rng(seed).permutation(len(sizes)) % HELD_BACK == 0
    categories, weights, biases, thresholds = [], [], [], []
    for category in sorted(labelled.known):
        truth = labelled.of(category)
        used = (truth >= 0) & ~held
        if len(np.unique(truth[used])) < 2:
            continue
        weight, bias = _regress(flat, values, owners, truth, used)
        scores = _sigmoid(np.bincount(owners, weight[flat] * values, len(sizes)) + bias)
        checked = (truth >= 0) & held
        categories.append(category)
        weights.append(weight)
        biases.append(bias)
        thresholds.append(choose_threshold(truth[checked], scores[checked]))
    return Classifier(
        name,
        tuple(categories),
        np.array(weights, dtype=np.float32).reshape(-1, NUM_FEATURES),
        np.array(biases),
        idf,
        np.array(thresholds),
    )


def choose_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the lowest score with `WANTED_PRECISION` from there up, else that of the best F1."""
    order = np.argsort(-scores)
    ranked, hits = scores[order], np.cumsum(truth[order])
    precision = hits / np.arange(1, len(hits) + 1)
    enough = np.flatnonzero((precision >= WANTED_PRECISION) & (hits >= 10))
    if len(enough):
        return float(ranked[enough[-1]])
    recall = hits / max(1, hits[-1])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return float(ranked[int(f1.argmax())])


def _regress(
    flat: np.ndarray,
    values: np.ndarray,
    owners: np.ndarray,
    truth: np.ndarray,
    used: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Minimise the mean log loss plus `PENALTY` times half the squared weights.

    Adam as in Kingma and Ba 2015 (arXiv 1412.6980), with the paper's constants, on the whole set.
    """
    count = len(truth)
    share = used / used.sum()
    theta, first, second = (np.zeros(NUM_FEATURES + 1) for _ in range(3))
    for step in range(1, STEPS + 1):
        logits = np.bincount(owners, theta[flat] * values, count) + theta[-1]
        slope = (_sigmoid(logits) - truth) * share
        gradient = np.append(
            np.bincount(flat, values * slope[owners], NUM_FEATURES) + PENALTY * theta[:-1],
            slope.sum(),
        )
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        theta -= LEARNING_RATE * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return theta[:-1], float(theta[-1])


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -60, 60))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.moderation.train")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="labelled JSONL")
    parser.add_argument("--label", action="append", default=[], metavar="VALUE=CATEGORY")
    parser.add_argument("--benign", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--name", default=NAME, help="what answers call it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        labelled = read(options.files, read_map(options.label))
        read_benign(labelled, options.benign, list(labelled.known))
        model = fit(labelled, options.name)
        classifiers.save(model, options.out)
    except (ToolkitError, OSError) as error:
        print(f"data.moderation.train: {error}", file=sys.stderr)
        return 2
    told = {name: model.threshold(name) for name in model.categories}
    print(json.dumps({"texts": len(labelled.texts), "thresholds": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How moderation results look to clients, and the names that the moderation model answers to."""

from __future__ import annotations

from typing import Any

from data.content import Verdict
from data.errors import InvalidInput
from data.moderation.classifier import CATEGORIES

# What scripts for the hosted API ask for; one classifier answers them all.
MODEL_NAMES = (
    "omni-moderation-latest",
    "omni-moderation-2024-09-26",
    "text-moderation-latest",
    "text-moderation-stable",
)


def moderation_result(verdict: Verdict) -> dict[str, Any]:
    """Return one result: categories that the classifier does not know score 0."""
    flagged = set(verdict.flagged)
    return {
        "flagged": bool(flagged & set(CATEGORIES)),
        "categories": {name: name in flagged for name in CATEGORIES},
        "category_scores": {name: verdict.scores.get(name, 0.0) for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
    }


def check_model(name: str | None, classifier: str, param: str) -> None:
    """Make sure that a request names a moderation model of this server; raises InvalidInput."""
    if name is not None and name not in (*MODEL_NAMES, classifier):
        raise InvalidInput(
            f"Invalid '{param}': '{name}'. The moderation model of this server is '{classifier}', "
            f"which also answers to {', '.join(MODEL_NAMES)}.",
            param=param,
        )

"""Checks of single values that a client gives a job; each error names the field and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.errors import InvalidInput
from data.settings import nearest


def check_number(name: str, value: Any, rule: tuple[type, float | None, float]) -> None:
    """Raise InvalidInput unless a value is of a rule's type and range."""
    kind, low, high = rule
    wanted = "an integer" if kind is int else "a number"
    fits = isinstance(value, int) if kind is int else isinstance(value, int | float)
    if isinstance(value, bool) or not fits:
        raise wrong_type(name, wanted, value)
    below = value <= 0 if low is None else value < low
    if below or not value <= high:  # NaN is refused too
        bounds = f"more than 0 and at most {high}" if low is None else f"{low} to {high}"
        raise InvalidInput(
            f"Invalid '{name}': expected {wanted} of {bounds}, but got {value!r} instead.",
            param=name,
        )


def check_text(name: str, value: Any) -> None:
    """Raise InvalidInput unless a value is a string."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise InvalidInput unless a value is one of the choices."""
    if value not in choices:
        raise InvalidInput(
            f"Invalid value: {value!r} for '{name}'. Supported values are: "
            f"{', '.join(map(repr, choices))}.",
            param=name,
        )


def check_keys(name: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise InvalidInput unless all keys are known."""
    for key in value:
        if key not in known:
            raise unknown(f"{name}.{key}", key, list(known))


def unknown(name: str, last: str, known: list[str]) -> InvalidInput:
    """Return the error for a name that is not known, with the nearest one that is."""
    guess = nearest(last, known)
    hint = f"Did you mean '{guess}'?" if guess else f"Known: {', '.join(known)}."
    return InvalidInput(
        f"Unknown parameter: '{name}'. {hint}", param=name, code="unknown_parameter"
    )


def wrong_type(name: str, wanted: str, value: Any) -> InvalidInput:
    """Return the error for a value of another type than is wanted."""
    return InvalidInput(
        f"Invalid type for '{name}': expected {wanted}, but got {value!r} instead.",
        param=name,
        code="invalid_type",
    )

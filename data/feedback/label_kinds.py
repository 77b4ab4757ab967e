"""The kinds of labeling task: what is shown, which answers there are, and how they are kept.

Labelers see candidates as A, B, C ... in an order of their own; what is kept names candidates by
their position in the task, so that judgements of different orders compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from data.errors import InvalidInput
from data.settings import nearest

Kind = Literal["pairwise", "ranking", "likert", "thumbs", "edit"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LETTERS = "ABCDEFGHI"
CANDIDATES = {"pairwise": (2, 2), "ranking": (2, 9), "likert": (1, 1), "thumbs": (1, 1)}
CANDIDATES |= {"edit": (1, 1)}
DEFAULTS: dict[str, dict[str, Any]] = {
    "pairwise": {"tie": True, "both_bad": True, "strength": 0},
    "ranking": {"ties": True},
    "likert": {"axes": ["overall"], "scale": 5},
    "thumbs": {},
    "edit": {},
}
STRENGTHS = 4
SCALES = (5, 7)
MAX_AXES = 8
MAX_TEXT = 200_000


def check_kind(kind: str) -> Kind:
    """Return a kind by its name; raises InvalidInput."""
    for known in KINDS:
        if known == kind:
            return known
    raise InvalidInput(
        f"Invalid 'kind': '{kind}'. Supported values are: {', '.join(map(repr, KINDS))}.",
        param="kind",
    )


def check_label(kind: str, label: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a kind, defaults filled in; raises InvalidInput.

    `pairwise`: `tie`, `both_bad`, and `strength`: 0, or 4 for answers from 1 (slightly) to 4.
    `ranking`: `ties`. `likert`: `axes`, and `scale`: 5 or 7.
    """
    found = dict(DEFAULTS[kind])
    for name, value in label.items():
        if name not in found:
            guess = nearest(name, list(found))
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise InvalidInput(f"Unknown setting 'label.{name}' of {kind}{hint}", param="label")
        found[name] = value
    for name in ("tie", "both_bad", "ties"):
        if name in found and not isinstance(found[name], bool):
            raise _wrong(name, found[name], "true or false")
    if kind == "pairwise" and found["strength"] not in (0, STRENGTHS):
        raise _wrong("strength", found["strength"], f"0 or {STRENGTHS}")
    if kind == "likert":
        axes = found["axes"]
        good = isinstance(axes, list) and 1 <= len(axes) <= MAX_AXES and len(set(axes)) == len(axes)
        if not good or not all(isinstance(axis, str) and 0 < len(axis) <= 64 for axis in axes):
            raise _wrong("axes", axes, f"1 to {MAX_AXES} different names")
        if found["scale"] not in SCALES:
            raise _wrong("scale", found["scale"], "5 or 7")
    return found


def check_count(kind: str, count: int) -> None:
    """Make sure that a task has as many candidates as its kind needs; raises InvalidInput."""
    low, high = CANDIDATES[kind]
    if not low <= count <= high:
        wanted = str(low) if low == high else f"{low} to {high}"
        raise InvalidInput(
            f"A {kind} task has {wanted} candidate{'s' if high > 1 else ''}, got {count}.",
            param="candidates",
        )


def read_answer(
    kind: str, label: Mapping[str, Any], order: Sequence[int], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return an answer by positions.

    Args:
        order: `order[i]` is the position of what was shown as the i-th letter.
        given: `{"choice": "A" | ... | "tie" | "both_bad", "strength": 2}`,
            `{"ranking": {"A": 1, "B": 2}}`, `{"axes": {"overall": 4}}`, `{"thumb": true}` or
            `{"text": "..."}`.

    Raises:
        InvalidInput: It is no answer to such a task.
    """
    fields = {"pairwise": {"choice", "strength"}, "ranking": {"ranking"}, "likert": {"axes"}}
    known = {**fields, "thumbs": {"thumb"}, "edit": {"text"}}[kind]
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() - known:
        raise InvalidInput(
            f"An answer to a {kind} task has {' and '.join(sorted(known))}; got "
            f"{', '.join(sorted(given))}.",
            param="answer",
        )
    reader = {"pairwise": _pairwise, "ranking": _ranking, "likert": _likert}.get(kind)
    if reader is not None:
        return reader(label, order, given)
    if kind == "thumbs":
        if not isinstance(given.get("thumb"), bool):
            raise _wrong("thumb", given.get("thumb"), "true or false", "answer")
        return {"thumb": given["thumb"]}
    text = given.get("text")
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise InvalidInput(
            f"Invalid 'answer.text': give the better answer, 1 to {MAX_TEXT} characters.",
            param="answer",
        )
    return {"text": text}


def _pairwise(
    label: Mapping[str, Any], order: Sequence[int], given: Mapping[str, Any]
) -> dict[str, Any]:
    shown = [LETTERS[index] for index in range(len(order))]
    others = [name for name in ("tie", "both_bad") if label[name]]
    choice = given.get("choice")
    if choice not in (*shown, *others):
        raise _wrong("choice", choice, ", ".join((*shown, *others)), "answer")
    if choice in others:
        if "strength" in given:
            raise InvalidInput("A tie has no strength.", param="answer")
        return {"choice": choice}
    found: dict[str, Any] = {"choice": order[shown.index(choice)]}
    strength = given.get("strength")
    if strength is not None:
        if not label["strength"]:
            raise InvalidInput("This project does not ask for strengths.", param="answer")
        if isinstance(strength, bool) or strength not in range(1, label["strength"] + 1):
            raise _wrong("strength", strength, f"1 to {label['strength']}", "answer")
        found["strength"] = strength
    return found


def _ranking(
    label: Mapping[str, Any], order: Sequence[int], given: Mapping[str, Any]
) -> dict[str, Any]:
    ranks, shown = given.get("ranking"), LETTERS[: len(order)]
    if not isinstance(ranks, Mapping) or set(ranks) != set(shown):
        raise _wrong("ranking", ranks, f"a rank for each of {', '.join(shown)}", "answer")
    values = [ranks[letter] for letter in shown]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= 9 for v in values):
        raise _wrong("ranking", ranks, "ranks from 1 (best) to 9", "answer")
    if not label["ties"] and len(set(values)) < len(values):
        raise InvalidInput("This project allows no ties in a ranking.", param="answer")
    places = {value: place + 1 for place, value in enumerate(sorted(set(values)))}
    found = [0] * len(order)
    for index, position in enumerate(order):
        found[position] = places[values[index]]
    return {"ranks": found}


def _likert(
    label: Mapping[str, Any], order: Sequence[int], given: Mapping[str, Any]
) -> dict[str, Any]:
    axes = given.get("axes")
    if not isinstance(axes, Mapping) or set(axes) != set(label["axes"]):
        raise _wrong("axes", axes, f"a number for each of {', '.join(label['axes'])}", "answer")
    for value in axes.values():
        if isinstance(value, bool) or value not in range(1, label["scale"] + 1):
            raise _wrong("axes", value, f"1 to {label['scale']}", "answer")
    return {"axes": dict(axes)}


def _wrong(name: str, value: Any, wanted: str, where: str = "label") -> InvalidInput:
    shown = repr(value)[:60]
    return InvalidInput(f"Invalid '{where}.{name}': {shown}; expected {wanted}.", param=where)

"""What a grader in a run's settings may say; checked when they are read, before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data.errors import ConfigError, InvalidInput
from data.formula import Formula
from data.grader_text import check_places
from data.settings import nearest
from data.similarity import METRICS

OPERATIONS = ("eq", "ne", "like", "ilike")
TEXTS = ("input", "reference")
# Beside type and name: what a grader of a type needs, and what else it may have.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "string_check": ((*TEXTS, "operation"), ()),
    "text_similarity": ((*TEXTS, "evaluation_metric"), ()),
    "score_model": ((), ("model",)),
    "multi": (("graders", "calculate_output"), ()),
}
CHOICES = {"operation": OPERATIONS, "evaluation_metric": METRICS}


def check_grader(grader: object, has_model: bool, at: str = "reward.grader") -> None:
    """Check a grader and all its parts.

    Args:
        grader: As the settings have it: of type string_check, text_similarity, score_model or
            multi, with the API's keys.
        has_model: There is a reward model for `score_model`.
        at: What to call it in messages.

    Raises:
        ConfigError: Training cannot run it, with every problem found.
    """
    problems = list(_problems(grader, has_model, at, parts=True))
    if problems:
        raise ConfigError(problems)


def _problems(grader: object, has_model: bool, at: str, parts: bool) -> Iterator[str]:
    """Yield what is wrong; `parts` tells whether it may hold graders of its own."""
    if not isinstance(grader, Mapping):
        yield f"{at} is {grader!r}; give a mapping with a type"
        return
    kind = grader.get("type")
    kinds = [name for name in KEYS if parts or name != "multi"]
    if kind not in kinds:
        inside = "" if parts else ": a multi grader cannot hold another" * (kind == "multi")
        yield f"{at}.type is {kind!r}{inside}; expected one of {', '.join(kinds)}"
        return
    needed, further = KEYS[kind]
    yield from _unknown(grader, ("type", "name", *needed, *further), at)
    for name in needed:
        if grader.get(name) is None:
            yield f"{at}.{name} is missing: a {kind} grader needs {', '.join(needed)}"
    for name in ("name", "model", "calculate_output", *TEXTS):
        if not isinstance(grader.get(name), str | None):
            yield f"{at}.{name} is {grader[name]!r}; give a text"
    for name in TEXTS:
        if isinstance(grader.get(name), str):
            yield from _told(f"{at}.{name}", check_places, grader[name])
    for name, known in CHOICES.items():
        if grader.get(name) is not None and grader[name] not in known:
            yield f"{at}.{name} is {grader[name]!r}; expected one of {', '.join(known)}"
    if kind == "score_model" and not has_model:
        yield (
            f"{at} is a score_model, which scores by the reward model beside it; set model, as in "
            "reward.model, to its folder"
        )
    if kind == "multi":
        yield from _problems_of_parts(grader, has_model, at)


def _problems_of_parts(grader: Mapping[str, Any], has_model: bool, at: str) -> Iterator[str]:
    graders, formula = grader.get("graders"), grader.get("calculate_output")
    if graders is None:
        return
    if not isinstance(graders, Mapping) or not graders:
        yield f"{at}.graders is {graders!r}; give a mapping of names to graders"
        return
    for name, part in graders.items():
        yield from _problems(part, has_model, f"{at}.graders.{name}", parts=False)
    if isinstance(formula, str):
        names = [str(name) for name in graders]
        yield from _told(f"{at}.calculate_output", Formula, formula, names)


def _unknown(grader: Mapping[str, Any], known: tuple[str, ...], at: str) -> Iterator[str]:
    for key in grader:
        if key not in known:
            guess = nearest(str(key), known)
            fix = f'did you mean "{guess}"?' if guess else f"known keys: {', '.join(known)}"
            yield f'unknown key "{at}.{key}"; {fix}'


def _told(at: str, check: Callable[..., object], *values: object) -> Iterator[str]:
    try:
        check(*values)
    except InvalidInput as error:
        yield f"{at}: {error.message}"

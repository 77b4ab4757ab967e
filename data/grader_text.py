"""Texts of graders with places for what is graded, such as `{{ item.question }}`.

`item` is a row of the dataset; `sample` is what the model said, as text and, where it is JSON, as
`output_json`. A place is a path of names and indexes, never code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from data.errors import InvalidInput

PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*")
STEP = re.compile(r"\w+")
SAMPLE_FIELDS = ("output_text", "output_json")


class MissingVariable(LookupError):
    """The row or the sample has no such field."""


class SampleNotJson(ValueError):
    """A text names `sample.output_json`, but the sample is not JSON."""


def check_places(text: str) -> None:
    """Check the places of a text without filling them.

    Raises:
        InvalidInput: One of them can never be filled.
    """
    for place in PLACE.findall(text):
        path = place.strip()
        steps = STEP.findall(path)
        if not PATH.fullmatch(path) or steps[0] not in ("item", "sample"):
            raise InvalidInput(
                f"`{{{{{place}}}}}` cannot be filled; write a path such as "
                "{{ item.answer }} or {{ sample.output_text }}."
            )
        if steps[0] == "sample" and (len(steps) < 2 or steps[1] not in SAMPLE_FIELDS):
            raise InvalidInput(
                f"`{{{{{place}}}}}` cannot be filled; a sample has "
                f"{' and '.join(SAMPLE_FIELDS)} here."
            )


def fill(text: str, sample: str, item: Mapping[str, Any]) -> str:
    """Return a checked text with its places filled; what is no string is written as JSON.

    Raises:
        MissingVariable: A field does not exist.
        SampleNotJson: The sample is not JSON, and a place needs it to be.
    """
    return PLACE.sub(lambda match: _as_text(_find(match[1].strip(), sample, item)), text)


def _find(path: str, sample: str, item: Mapping[str, Any]) -> Any:
    root, *steps = STEP.findall(path)
    value: Any = item
    if root == "sample":
        value = sample
        if steps.pop(0) == "output_json":
            try:
                value = json.loads(sample)
            except (ValueError, RecursionError) as error:
                raise SampleNotJson(str(error)) from error
    for step in steps:
        try:
            value = value[int(step)] if isinstance(value, list) else _field(value, step)
        except (LookupError, ValueError) as error:
            raise MissingVariable(path) from error
    return value


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise LookupError(name)
    return value[name]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""What the server's log tells of a job's event: never the rows of a dataset, which some quote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINDINGS = ("errors", "warnings", "content_policy")  # in an event's data: what was found in rows


def words(message: str, code: str | None = None, data: Mapping[str, Any] | None = None) -> str:
    """Return an event's message; of a failure or of findings in files, only codes and counts.

    Args:
        code: Of the failure that the event tells of.
        data: Of the event.
    """
    data = data or {}
    found = [name for name in FINDINGS if name in data]
    if code is None and not found:
        return message
    codes = [code, *(problem["code"] for problem in data.get("warnings", ())[:1])]
    told = [str(part) for part in (*codes, data.get("counts"), data.get("count")) if part]
    return f"{' '.join([*told, *found])} (the job's events tell more)"

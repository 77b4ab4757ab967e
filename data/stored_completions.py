"""Completions that their account asked to store, so that they can be judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.db import Database
from data.tables_feedback import StoredCompletion


def save(
    database: Database,
    project_id: str,
    completion: Mapping[str, Any],
    request: Mapping[str, Any],
    prompt: str,
    end_user: str | None,
) -> None:
    """Keep a completion as it was given.

    Args:
        request: Its sampling fields, and `token_ids` of each choice.
    """
    record = StoredCompletion(
        id=completion["id"],
        project_id=project_id,
        model=completion["model"],
        completion=dict(completion),
        request=dict(request),
        prompt=prompt,
        end_user=end_user,
        created_at=completion["created"],
    )
    with database.write() as session:
        session.add(record)

"""Chat completions that their account asked to keep: to read again, and to judge.

Metadata is how the unmodified official client sends feedback: `update(id, metadata={...})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import InvalidInput, NotFound
from data.tables_surface import ChatRecord

MAX_PAIRS = 16
MAX_KEY = 64
MAX_VALUE = 512


def check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata that can be kept; raises InvalidInput."""
    if len(metadata) > MAX_PAIRS:
        raise InvalidInput(
            f"Invalid 'metadata': {len(metadata)} pairs; at most {MAX_PAIRS} are kept.",
            param="metadata",
        )
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_KEY or len(value) > MAX_VALUE:
            raise InvalidInput(
                f"Invalid 'metadata': the key or the value of '{key[:MAX_KEY]}' is empty or too "
                f"long; keys have 1 to {MAX_KEY} characters, values at most {MAX_VALUE}.",
                param="metadata",
            )
    return dict(metadata)


def save(
    database: Database,
    project_id: str,
    completion: Mapping[str, Any],
    request: Mapping[str, Any],
    messages: list[dict[str, Any]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Keep an answer as it was given, with the conversation before it."""
    record = ChatRecord(
        id=completion["id"],
        project_id=project_id,
        model=completion["model"],
        completion=dict(completion),
        request=dict(request),
        messages=messages,
        metadata_=None if metadata is None else dict(metadata),
        created_at=completion["created"],
    )
    with database.write() as session:
        session.add(record)


def get(database: Database, project_id: str, completion_id: str) -> ChatRecord:
    """Return one.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    with database.read() as session:
        return _find(session, project_id, completion_id)


def update(
    database: Database, project_id: str, completion_id: str, metadata: Mapping[str, str] | None
) -> ChatRecord:
    """Replace the metadata of one; raises NotFound or InvalidInput."""
    checked = None if metadata is None else check_metadata(metadata)
    with database.write() as session:
        record = _find(session, project_id, completion_id)
        record.metadata_ = checked
    return record


def delete(database: Database, project_id: str, completion_id: str) -> None:
    """Forget one; raises NotFound."""
    with database.write() as session:
        session.delete(_find(session, project_id, completion_id))


def list_chats(
    database: Database,
    project_id: str,
    *,
    limit: int = 20,
    order: Literal["asc", "desc"] = "asc",
    after: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[ChatRecord], bool]:
    """Return a page and whether more follow.

    Raises:
        InvalidInput: `after` names none of this account.
    """
    query = select(ChatRecord).where(ChatRecord.project_id == project_id)
    if model is not None:
        query = query.where(ChatRecord.model == model)
    up = order == "asc"
    with database.read() as session:
        if after is not None:
            mark = session.get(ChatRecord, after)
            if mark is None or mark.project_id != project_id:
                raise InvalidInput(f"Invalid 'after': no chat completion {after}", param="after")
            time, key = ChatRecord.created_at, ChatRecord.id
            later = time > mark.created_at if up else time < mark.created_at
            tied = (time == mark.created_at) & (key > mark.id if up else key < mark.id)
            query = query.where(or_(later, tied))
        keys = (ChatRecord.created_at, ChatRecord.id)
        ordered = query.order_by(*(keys if up else (key.desc() for key in keys)))
        with session.scalars(ordered.execution_options(yield_per=limit + 1)) as found:
            # Metadata is matched here: databases disagree about quotes and accents in JSON paths.
            matching = (r for r in found if (metadata or {}).items() <= (r.metadata_ or {}).items())
            page = list(islice(matching, limit + 1))
    return page[:limit], len(page) > limit


def _find(session: Session, project_id: str, completion_id: str) -> ChatRecord:
    record = session.get(ChatRecord, completion_id)
    if record is None or record.project_id != project_id:
        raise NotFound(f"No such ChatCompletion object: {completion_id}", param="id")
    return record

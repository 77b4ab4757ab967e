"""The audit log: who changed what, written in the transaction that changes it, never rewritten.

Whoever acts is known by a context variable that the server sets for each request; without one, it
is the command line or a program of the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import InvalidInput
from data.tables import new_id
from data.tables_accounts import AuditEntry


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, from where, in which request."""

    key_id: str | None
    address: str | None
    request_id: str | None


NOBODY = Actor(None, None, None)
actor: ContextVar[Actor] = ContextVar("hone_actor", default=NOBODY)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which entries to list; empty tuples and None take all. Times are unix seconds."""

    event_types: tuple[str, ...] = ()
    project_ids: tuple[str, ...] = ()
    actor_ids: tuple[str, ...] = ()
    actor_emails: tuple[str, ...] = ()  # keys act here, which have none: any takes no entry
    resource_ids: tuple[str, ...] = ()
    at_least: int | None = None
    at_most: int | None = None


def record(
    session: Session, kind: str, subject_id: str, project_id: str | None, /, **details: Any
) -> None:
    """Add an entry inside the caller's transaction; details must hold no secrets."""
    who = actor.get()
    session.add(
        AuditEntry(
            id=new_id("audit_log-"),
            type=kind,
            subject_id=subject_id,
            project_id=project_id,
            actor_id=who.key_id,
            address=who.address,
            request_id=who.request_id,
            details=details,
        )
    )


def entries(
    database: Database,
    wanted: Filter,
    limit: int,
    after: str | None = None,
    before: str | None = None,
) -> tuple[Sequence[AuditEntry], bool]:
    """Return a page, newest first, and whether more follow in its direction.

    Args:
        after: Id of the entry that the page follows.
        before: Id of the entry that the page comes right before: the previous page.

    Raises:
        InvalidInput: `after` or `before` names no entry.
    """
    if wanted.actor_emails:
        return [], False
    query = select(AuditEntry)
    for column, values in (
        (AuditEntry.type, wanted.event_types),
        (AuditEntry.project_id, wanted.project_ids),
        (AuditEntry.actor_id, wanted.actor_ids),
        (AuditEntry.subject_id, wanted.resource_ids),
    ):
        if values:
            query = query.where(column.in_(values))
    if wanted.at_least is not None:
        query = query.where(AuditEntry.effective_at >= wanted.at_least)
    if wanted.at_most is not None:
        query = query.where(AuditEntry.effective_at <= wanted.at_most)
    with database.read() as session:
        if after is not None:
            query = query.where(AuditEntry.seq < _place(session, "after", after))
        if before is not None:
            query = query.where(AuditEntry.seq > _place(session, "before", before))
        order = AuditEntry.seq.desc() if before is None else AuditEntry.seq.asc()
        found = session.scalars(query.order_by(order).limit(limit + 1)).all()
    page = found[:limit]
    return page if before is None else page[::-1], len(found) > limit


def _place(session: Session, name: str, entry_id: str) -> int:
    seq = session.scalar(select(AuditEntry.seq).where(AuditEntry.id == entry_id))
    if seq is None:
        raise InvalidInput(f"Invalid '{name}': no entry {entry_id}", param=name)
    return seq

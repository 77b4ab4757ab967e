"""Answers to POSTs that may be sent again, so that a call repeated is a call made once.

A call is begun, then finished with its answer or released. Who begins a call that another began
gets what is known of it. Whoever makes a call renews it every few seconds; one that is neither
finished, released nor renewed has lost its server, and may be begun anew.
"""

from __future__ import annotations

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError

from data.db import Database
from data.errors import IdempotencyMismatch
from data.tables import now
from data.tables_metering import KeptAnswer

KEEP_S = 24 * 3600
RENEW_S = 10.0  # between two signs of life of whoever makes a call
ABANDONED_S = 45  # without one: longer than a busy database may hold it up


def begin(
    database: Database,
    scope: str,
    key: str,
    body_hash: str,
    *,
    max_age_s: int = KEEP_S,
    anew: bool = False,
) -> KeptAnswer | None:
    """Begin a call, unless it was begun before.

    Args:
        scope: Whose call it is; nobody else can learn of it.
        key: Names the call, at most 64 characters.
        body_hash: Of what was sent.
        max_age_s: An older answer is not used.
        anew: Begin it in any case.

    Returns:
        None when the caller is to make the call, else the call that was begun before; its `status`
        is None while it is still being made.

    Raises:
        IdempotencyMismatch: The key named another call.
    """
    try:
        return _begin(database, scope, key, body_hash, max_age_s, anew)
    except IntegrityError:  # on PostgreSQL, two may begin at the same moment
        return _begin(database, scope, key, body_hash, max_age_s, anew)


def is_being_made(database: Database, scope: str, key: str) -> bool:
    """Tell whether somebody makes the call now; if not, `begin` tells what became of it."""
    with database.read() as session:
        record = session.get(KeptAnswer, (scope, key))
        return record is not None and record.status is None and not _is_stale(record, 0)


def renew(database: Database, scope: str, key: str) -> None:
    """Tell that a call is still being made."""
    with database.write() as session:
        session.execute(
            update(KeptAnswer)
            .where(KeptAnswer.scope == scope, KeptAnswer.key == key, KeptAnswer.status.is_(None))
            .values(created_at=now())
        )


def finish(
    database: Database, scope: str, key: str, status: int, content_type: str | None, body: bytes
) -> None:
    """Keep the answer of a call that was begun."""
    with database.write() as session:
        record = session.get(KeptAnswer, (scope, key))
        if record is not None:
            record.status, record.content_type, record.body = status, content_type, body


def release(database: Database, scope: str, key: str) -> None:
    """Forget a call that came to nothing, so that it can be made again."""
    with database.write() as session:
        record = session.get(KeptAnswer, (scope, key))
        if record is not None and record.status is None:
            session.delete(record)


def _begin(
    database: Database, scope: str, key: str, body_hash: str, max_age_s: int, anew: bool
) -> KeptAnswer | None:
    moment = now()
    with database.write() as session:
        session.execute(delete(KeptAnswer).where(KeptAnswer.created_at <= moment - KEEP_S))
        record = session.get(KeptAnswer, (scope, key), with_for_update=True)
        if record is not None:
            if not _is_stale(record, max_age_s) and not anew:
                if record.body_hash != body_hash:
                    raise IdempotencyMismatch(
                        "The header Idempotency-Key names another request: the same key was sent "
                        "with another path or body within 24 hours. Send a new key with a new "
                        "request."
                    )
                return record
            session.delete(record)
            session.flush()
        session.add(KeptAnswer(scope=scope, key=key, body_hash=body_hash, created_at=moment))
    return None


def _is_stale(record: KeptAnswer, max_age_s: int) -> bool:
    """Whether an answer is too old to be told, or a call that is being made is abandoned."""
    limit_s = ABANDONED_S if record.status is None else max_age_s
    return now() - record.created_at >= limit_s

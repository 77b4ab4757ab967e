"""What broke a content policy: noted without the text, counted, and answered.

When an account's violations of the last day reach `case_after`, a safety case opens; when those of
one end user reach `block_user_after`, that user is shut out and the account's webhooks are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data import audit, projects, safety, webhooks
from data.content import Policy, Side
from data.db import Database
from data.errors import InvalidInput, NotFound
from data.tables import new_id, now
from data.tables_content import BlockedUser, ContentEvent

DAY_S = 86400
MAX_IDENTIFIER = 255


def note(
    database: Database,
    project_id: str,
    policy: Policy,
    side: Side,
    matched: Sequence[str],
    *,
    end_user: str | None = None,
    model: str | None = None,
    request_id: str | None = None,
) -> None:
    """Keep a violation, and do what the policy says about repeated ones."""
    with database.write() as session:
        event = ContentEvent(
            id=new_id("cevt_"),
            project_id=project_id,
            side=side,
            mode=policy.mode(side),
            matched=list(matched),
            end_user=None if end_user is None else end_user.replace("\0", "\ufffd"),
            model=model,
            request_id=request_id,
        )
        session.add(event)
        session.flush()
        most, user = policy.block_user_after, event.end_user
        if most and user and _count(session, project_id, user) >= most:
            _shut_out(session, project_id, user, matched[0], event)
        if policy.case_after:
            _open_case(session, project_id, policy.case_after)


def list_events(
    database: Database, project_id: str, limit: int, after: str | None = None
) -> tuple[Sequence[ContentEvent], bool]:
    """Return a page of an account's violations, newest first, and whether more follow."""
    query = select(ContentEvent).where(ContentEvent.project_id == project_id)
    with database.read() as session:
        projects.find(session, project_id)
        if after is not None:
            seq = session.scalar(select(ContentEvent.seq).where(ContentEvent.id == after))
            if seq is None:
                raise InvalidInput(f"Invalid 'after': no event {after}", param="after")
            query = query.where(ContentEvent.seq < seq)
        found = session.scalars(query.order_by(ContentEvent.seq.desc()).limit(limit + 1)).all()
    return found[:limit], len(found) > limit


def block_user(database: Database, project_id: str, identifier: str) -> BlockedUser:
    """Shut an end user out; raises NotFound or InvalidInput."""
    if not 0 < len(identifier) <= MAX_IDENTIFIER or "\0" in identifier:
        raise InvalidInput(
            f"Invalid 'identifier': expected 1 to {MAX_IDENTIFIER} characters, but got "
            f"{len(identifier)}.",
            param="identifier",
        )
    with database.write() as session:
        projects.find(session, project_id)
        return _shut_out(session, project_id, identifier, "operator", None)


def unblock_user(database: Database, project_id: str, identifier: str) -> None:
    """Let an end user call again; raises NotFound."""
    with database.write() as session:
        found = session.get(BlockedUser, (project_id, identifier))
        if found is None:
            raise NotFound(f"No such blocked identifier: {identifier}", param="identifier")
        session.delete(found)
        audit.record(session, "safety_identifier.unblocked", identifier, project_id)


def list_blocked(database: Database, project_id: str) -> list[BlockedUser]:
    """Return the end users of an account who are shut out, oldest first; raises NotFound."""
    query = select(BlockedUser).where(BlockedUser.project_id == project_id)
    with database.read() as session:
        projects.find(session, project_id)
        order = (BlockedUser.created_at, BlockedUser.identifier)
        return list(session.scalars(query.order_by(*order)))


def all_blocked(database: Database) -> frozenset[tuple[str, str]]:
    """Return account and identifier of everybody who is shut out."""
    with database.read() as session:
        rows = session.execute(select(BlockedUser.project_id, BlockedUser.identifier)).all()
    return frozenset((row[0], row[1]) for row in rows)


def _count(session: Session, project_id: str, end_user: str | None = None) -> int:
    query = select(func.count()).where(
        ContentEvent.project_id == project_id, ContentEvent.created_at > now() - DAY_S
    )
    if end_user is not None:
        query = query.where(ContentEvent.end_user == end_user)
    return session.scalar(query) or 0


def _shut_out(
    session: Session, project_id: str, identifier: str, reason: str, event: ContentEvent | None
) -> BlockedUser:
    name = identifier[:MAX_IDENTIFIER]
    found = session.get(BlockedUser, (project_id, name))
    if found is not None:
        return found
    made = BlockedUser(project_id=project_id, identifier=name, reason=reason, created_at=now())
    session.add(made)
    audit.record(session, "safety_identifier.blocked", name, project_id, reason=reason)
    data = {"safety_identifier": name, "safety_category": reason, "project_id": project_id}
    if event is not None:
        data |= {"model": event.model or "", "request_id": event.request_id or ""}
    webhooks.enqueue(session, project_id, "safety_identifier.blocked", now(), data)
    return made


def _open_case(session: Session, project_id: str, after: int) -> None:
    """Open a case when the day's violations reach a multiple of `after`."""
    count = _count(session, project_id)
    if count % after == 0:
        reason = f"{count} texts of the last 24 hours broke the account's content policy."
        safety.open_warning(session, project_id, reason)

"""Consent, retention and deletion: what an account keeps of what its users say."""

from __future__ import annotations

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import InvalidInput, NotFound
from data.tables import Project, now
from data.tables_feedback import (
    Candidate,
    Feedback,
    FeedbackPolicy,
    Judgement,
    LabelProject,
    LabelTask,
    StoredCompletion,
)
from data.tables_surface import ChatRecord

DAY_S = 24 * 3600
ERASED = "[deleted]"


def policy_of(session: Session, project_id: str) -> FeedbackPolicy:
    """Return an account's policy; by default feedback is kept until it is deleted."""
    found = session.get(FeedbackPolicy, project_id)
    return found or FeedbackPolicy(project_id=project_id, consent=True, retention_days=None)


def set_policy(
    database: Database, project_id: str, *, consent: bool, retention_days: int | None
) -> FeedbackPolicy:
    """Give or withdraw an account's consent, and say how long feedback is kept.

    Raises:
        InvalidInput: A retention beyond 1 to 3650 days.
    """
    if retention_days is not None and not 1 <= retention_days <= 3650:
        raise InvalidInput(
            f"Invalid 'retention_days': {retention_days}; expected 1 to 3650, or null.",
            param="retention_days",
        )
    with database.write() as session:
        made = FeedbackPolicy(project_id=project_id, consent=consent, retention_days=retention_days)
        session.merge(made)
        audit.record(
            session,
            "feedback_policy.updated",
            project_id,
            project_id,
            consent=consent,
            retention_days=retention_days,
        )
    return made


def get_policy(database: Database, project_id: str) -> FeedbackPolicy:
    """Return an account's policy."""
    with database.read() as session:
        return policy_of(session, project_id)


def expire(database: Database) -> int:
    """Delete what is older than its account keeps it; returns how many rows."""
    count = 0
    with database.write() as session:
        query = select(FeedbackPolicy).where(FeedbackPolicy.retention_days.is_not(None))
        for policy in session.scalars(query).all():
            oldest = now() - DAY_S * (policy.retention_days or 0)
            for table in (Feedback, StoredCompletion):
                mine = (table.project_id == policy.project_id, table.created_at < oldest)
                count += session.execute(delete(table).where(*mine)).rowcount  # type: ignore[attr-defined]
    return count


def delete_end_user(database: Database, project_id: str, end_user: str) -> dict[str, int]:
    """Delete what is known of an end user of an account; returns how much of each.

    Their tasks leave the queue and lose their texts; who judged them stays known, what not.

    Raises:
        NotFound: Nothing is known.
    """
    with database.write() as session:
        if session.get(Project, project_id) is None:
            raise NotFound(f"No such account: {project_id}")
        counts = {}
        for name, table in (("feedback", Feedback), ("completions", StoredCompletion)):
            mine = (table.project_id == project_id, table.end_user == end_user)
            counts[name] = session.execute(delete(table).where(*mine)).rowcount  # type: ignore[attr-defined]
        chats = select(ChatRecord).where(ChatRecord.project_id == project_id)
        theirs = [c for c in session.scalars(chats) if c.request.get("user") == end_user]
        for chat in theirs:
            session.delete(chat)
        counts["chat_completions"] = len(theirs)
        counts["tasks"] = _erase_tasks(session, project_id, end_user)
        if not any(counts.values()):
            raise NotFound(f"Nothing is kept of an end user '{end_user}'.", param="end_user")
        audit.record(session, "end_user.deleted", project_id, project_id, **counts)
    return counts


def _erase_tasks(session: Session, project_id: str, end_user: str) -> int:
    query = (
        select(LabelTask.id)
        .join(LabelProject, LabelProject.id == LabelTask.label_project_id)
        .where(LabelProject.project_id == project_id, LabelTask.end_user == end_user)
    )
    ids = list(session.scalars(query))
    if ids:
        erased = {"status": "dropped", "prompt": ERASED, "end_user": None, "settled": None}
        session.execute(update(LabelTask).where(LabelTask.id.in_(ids)).values(erased))
        session.execute(
            update(Candidate).where(Candidate.task_id.in_(ids)).values(text=ERASED, origin={})
        )
        session.execute(
            update(Judgement).where(Judgement.task_id.in_(ids)).values(answer={}, counts=False)
        )
    return len(ids)

"""What an account may hold at a time: jobs that wait or run, and bytes of files and adapters.

An account without caps of its own has those of the deployment's settings. The checks run inside the
transaction that adds what they allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import NotFound, QuotaExceeded
from data.metering import FINAL_JOBS
from data.settings import Limits
from data.tables import AdapterVersion, File, Job, Project
from data.tables_metering import AccountCaps

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Caps:
    """What an account may hold at a time; None is unlimited."""

    concurrent_jobs: int | None
    stored_bytes: int | None


def get_caps(database: Database, project_id: str, limits: Limits) -> Caps:
    """Return what an account may hold.

    Raises:
        NotFound: There is no such account.
    """
    with database.read() as session:
        _project(session, project_id)
        return _caps(session, project_id, limits)


def set_caps(
    database: Database, project_id: str, limits: Limits, changes: Mapping[str, int | None]
) -> Caps:
    """Change what an account may hold; what is not named stays as it is.

    Raises:
        NotFound: There is no such account.
    """
    with database.write() as session:
        _project(session, project_id)
        record = session.get(AccountCaps, project_id)
        if record is None:
            caps = _caps(session, project_id, limits)
            record = AccountCaps(
                project_id=project_id,
                concurrent_jobs=caps.concurrent_jobs,
                stored_bytes=caps.stored_bytes,
            )
            session.add(record)
        for name, value in changes.items():
            setattr(record, name, value)
        session.flush()
        audit.record(session, "caps.updated", project_id, project_id, **changes)
        return _caps(session, project_id, limits)


def clear_caps(database: Database, project_id: str) -> None:
    """Give an account the deployment's caps again.

    Raises:
        NotFound: There is no such account, or it has no caps of its own.
    """
    with database.write() as session:
        _project(session, project_id)
        record = session.get(AccountCaps, project_id)
        if record is None:
            raise NotFound(f"The project {project_id} has no caps of its own", param="project_id")
        session.delete(record)


def check_job_cap(session: Session, project_id: str, limits: Limits) -> None:
    """Make sure that the account may have one more job; called in the job's own transaction.

    Raises:
        QuotaExceeded: It has as many as it may.
    """
    session.get(Project, project_id, with_for_update=True)  # one at a time, on PostgreSQL too
    most = _caps(session, project_id, limits).concurrent_jobs
    if most is None:
        return
    query = select(func.count()).where(Job.project_id == project_id, Job.status.not_in(FINAL_JOBS))
    live = session.scalar(query) or 0
    if live >= most:
        raise QuotaExceeded(
            f"You exceeded your current quota: {live} fine-tuning jobs wait or run, and the "
            f"account may have {most} at a time. Cancel one, or wait until one has ended."
        )


def check_stored_bytes(session: Session, project_id: str, limits: Limits, more: int) -> None:
    """Make sure that the account may store more; called in the file's own transaction.

    Raises:
        QuotaExceeded: It would hold more bytes of files and adapters than it may.
    """
    session.get(Project, project_id, with_for_update=True)
    most = _caps(session, project_id, limits).stored_bytes
    if most is None:
        return
    held = 0
    for table in (File, AdapterVersion):
        query = select(func.coalesce(func.sum(table.bytes), 0))
        held += int(
            session.scalar(query.where(table.project_id == project_id, table.deleted_at.is_(None)))
            or 0
        )
    if held + more > most:
        raise QuotaExceeded(
            f"You exceeded your current quota: files and adapters of the account hold {held} "
            f"bytes, this adds {more}, and {most} are allowed. Delete what is no longer needed."
        )


def _project(session: Session, project_id: str) -> Project:
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"No such project: {project_id}", param="project_id")
    return project


def _caps(session: Session, project_id: str, limits: Limits) -> Caps:
    own = session.get(AccountCaps, project_id)
    if own is not None:
        return Caps(own.concurrent_jobs, own.stored_bytes)
    stored = None if limits.stored_mb is None else limits.stored_mb * MIB
    return Caps(limits.concurrent_jobs, stored)

"""A job's events as they come: what a stream of them reads."""

from __future__ import annotations

from sqlalchemy import select

from data import jobs
from data.db import Database
from data.errors import InvalidInput
from data.tables import JobEvent


def position_of(database: Database, project_id: str, job_id: str, event_id: str | None) -> int:
    """Return where a stream begins that goes on after an event; at the start without one.

    Raises:
        NotFound: There is no such job.
        InvalidInput: The job has no such event.
    """
    with database.read() as session:
        jobs.find(session, project_id, job_id)
        if event_id is None:
            return 0
        named = (JobEvent.id == event_id) & (JobEvent.job_id == job_id)
        seq = session.scalar(select(JobEvent.seq).where(named))
        if seq is None:
            raise InvalidInput(f"Invalid 'after': no event {event_id}", param="after")
        return seq


def events_since(
    database: Database, project_id: str, job_id: str, seq: int
) -> tuple[list[JobEvent], bool]:
    """Return the events after a position, oldest first, and whether the job has ended.

    Both are of one moment: of a job that has ended, no event follows.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > seq)
    with database.read() as session:
        ended = jobs.find(session, project_id, job_id).status in jobs.FINAL
        return list(session.scalars(query.order_by(JobEvent.seq))), ended

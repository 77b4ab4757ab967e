"""Who works on a fine-tuning job.

A job is claimed by one write transaction and held by a lease that the worker renews. A worker that
falls silent loses the job, which the next claim takes over as it stands. Only the holder of the
lease changes a job's state, so that a worker that was thought dead cannot undo what its successor
did.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import StateConflict
from data.jobs import FINAL
from data.tables import Job, Project

CLAIMABLE = ("validating_files", "queued", "running")


class Standing(Enum):
    """What a worker learns when it renews its lease."""

    KEEP = "keep"
    PAUSE = "pause"
    LOST = "lost"


def claim(
    database: Database, worker_id: str, lease_s: float, states: Sequence[str] = CLAIMABLE
) -> Job | None:
    """Take the next job that nobody works on, or None.

    Accounts take turns: the one with the fewest jobs held comes first, then the oldest job.

    Args:
        states: Only jobs in one of these.
    """
    with database.read() as session:  # an idle worker takes no write lock
        if session.scalar(_unheld(states).limit(1)) is None:
            return None
    with database.write() as session:
        held = _held_by_project(session)
        waiting = session.scalars(_unheld(states).with_for_update(skip_locked=True)).all()
        if not waiting:
            return None
        job = min(waiting, key=lambda job: (held.get(job.project_id, 0), job.created_at, job.id))
        job.worker_id = worker_id
        job.lease_expires_at = time.time() + lease_s
        job.pause_requested = False  # of a worker that died; the job was resumed since
        return job


def heartbeat(database: Database, job_id: str, worker_id: str, lease_s: float) -> Standing:
    """Renew a lease and learn whether to go on."""
    with database.write() as session:
        job = session.get_one(Job, job_id)
        found = _standing(job, worker_id)
        if found is not Standing.LOST:
            job.lease_expires_at = time.time() + lease_s
        return found


def standing(database: Database, job_id: str, worker_id: str) -> Standing:
    """Learn whether to go on, without renewing the lease."""
    with database.read() as session:
        return _standing(session.get_one(Job, job_id), worker_id)


def release(database: Database, job_id: str, worker_id: str) -> None:
    """Give a job back as it stands, so that the next claim takes it at once."""
    with database.write() as session:
        job = session.get_one(Job, job_id)
        if job.worker_id == worker_id:
            job.worker_id = job.lease_expires_at = None


def held(session: Session, job_id: str, worker_id: str) -> Job:
    """Return a job for writing, if this worker still holds it.

    Raises:
        StateConflict: The lease was lost to another worker.
    """
    job = session.get_one(Job, job_id, with_for_update=True)
    if job.worker_id != worker_id:
        raise StateConflict(f"The worker {worker_id} no longer holds the job {job_id}")
    return job


def _standing(job: Job, worker_id: str) -> Standing:
    if job.worker_id != worker_id or job.status in FINAL:
        return Standing.LOST
    return Standing.PAUSE if job.pause_requested else Standing.KEEP


def is_held(job: Job) -> bool:
    """Tell whether a worker works on a job."""
    return job.worker_id is not None and (job.lease_expires_at or 0) >= time.time()


def _unheld(states: Sequence[str]) -> Select[Job]:
    free = or_(Job.worker_id.is_(None), Job.lease_expires_at < time.time())
    closed = select(Project.id).where(Project.status != "active")
    query = select(Job).where(Job.status.in_(states), free, Job.project_id.not_in(closed))
    return query.order_by(Job.created_at, Job.id)


def _held_by_project(session: Session) -> dict[str, int]:
    query = select(Job.project_id, func.count()).where(Job.lease_expires_at >= time.time())
    return {row[0]: row[1] for row in session.execute(query.group_by(Job.project_id))}

"""Pausing a job and letting it go on.

A paused job is in no worker's queue, whatever dies meanwhile. When a worker holds it, the state
changes at once and the worker is told (`pause_requested`): it stops the trainer at a checkpoint and
lets go of the job. A job that is resumed before that waits until then.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from data import audit, job_lease, jobs
from data.db import Database
from data.errors import StateConflict
from data.tables import Job


def pause(database: Database, project_id: str, job_id: str) -> Job:
    """Stop a job so that it can go on later.

    Raises:
        NotFound: There is no such job.
        StateConflict: The job is paused already, or has ended.
    """
    with database.write() as session:
        job = jobs.find(session, project_id, job_id)
        if not hold(session, job):
            raise StateConflict(
                f"The job {job_id} is {job.status}, so it cannot be paused.", param="id"
            )
        audit.record(session, "job.paused", job_id, project_id)
    return job


def hold(session: Session, job: Job) -> bool:
    """Pause a job inside the caller's transaction; False if it cannot be paused."""
    if "paused" not in jobs.TRANSITIONS.get(job.status, ()):
        return False
    job.pause_requested = job_lease.is_held(job)
    if not job.pause_requested:
        job.worker_id = job.lease_expires_at = None
    jobs.move(session, job, "paused", estimated_finish=None)
    jobs.record_event(session, job.id, "Fine-tuning job paused")
    return True


def resume(database: Database, project_id: str, job_id: str) -> Job:
    """Queue a paused job again; its trainer goes on from the newest checkpoint.

    Raises:
        NotFound: There is no such job.
        StateConflict: The job is not paused.
    """
    with database.write() as session:
        job = jobs.find(session, project_id, job_id)
        if not let_go_on(session, job):
            raise StateConflict(
                f"The job {job_id} is {job.status}, so it cannot be resumed; only a paused job "
                "can.",
                param="id",
            )
    return job


def let_go_on(session: Session, job: Job) -> bool:
    """Resume a job inside the caller's transaction; False if it is not paused."""
    if job.status != "paused":
        return False
    jobs.move(session, job, "queued")
    jobs.record_event(session, job.id, "Fine-tuning job resumed")
    jobs.tell_position(session, job)
    audit.record(session, "job.resumed", job.id, job.project_id)
    return True


def settle(session: Session, job: Job) -> bool:
    """Let go of a held job that is to pause, inside the worker's transaction; False if none is.

    The job may have been resumed meanwhile: it is queued then, and free for any worker.
    """
    if not job.pause_requested:
        return False
    job.pause_requested = False
    job.worker_id = job.lease_expires_at = job.estimated_finish = None
    return True

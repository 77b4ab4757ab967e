"""Fine-tuning jobs: the state machine and its events.

Every change of state is made with its event in one transaction. Who works on a job is
`data.job_lease`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from data import audit, caps, webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.files import LIVE_JOBS
from data.job_log import words
from data.job_spec import JobSpec
from data.job_start import check_file, find_start, pin_grader, pin_reward_model
from data.settings import Limits
from data.tables import AdapterVersion, Checkpoint, Job, JobEvent, new_id, now

FINAL = ("succeeded", "failed", "cancelled")
# Where each state may lead. A job taken over after a crash stays in its state.
TRANSITIONS: dict[str, tuple[str, ...]] = {
    "validating_files": ("queued", "paused", "failed", "cancelled"),
    "queued": ("running", "paused", "failed", "cancelled"),
    "running": ("queued", "paused", "succeeded", "failed", "cancelled"),
    "paused": ("queued", "cancelled"),
}
LOG_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}

log = logging.getLogger("hone.jobs")


def create(
    database: Database,
    project_id: str,
    spec: JobSpec,
    base_models: Sequence[str],
    limits: Limits | None = None,
    upgrade: Mapping[str, Any] | None = None,
) -> Job:
    """Store a job that waits to be validated.

    Args:
        upgrade: What makes it the move of a version to a new base, see `data.upgrades`.

    Raises:
        QuotaExceeded: The account has as many jobs as it may have at a time; `limits` says how
            many where the account has no cap of its own.
        InvalidInput: The model is neither a base that is served here nor the account's own, or a
            file is absent or of a wrong purpose.
    """
    hyperparameters = spec.resolved_hyperparameters()
    with database.write() as session:
        caps.check_job_cap(session, project_id, limits or Limits())
        for name in ("training_file", "validation_file"):
            file_id = getattr(spec, name)
            if file_id is not None:
                check_file(session, project_id, name, file_id)
        start = find_start(session, project_id, spec, base_models)
        base_model = start.base_model if start else spec.model
        grading = pin_grader(session, project_id, spec, base_model)
        judging = pin_reward_model(session, project_id, spec, base_model)
        job = Job(
            id=new_id("ftjob-"),
            project_id=project_id,
            model=spec.model,
            base_model=base_model,
            start_version_id=start.id if start else None,
            method={
                "type": spec.method_type,
                spec.method_type: {"hyperparameters": hyperparameters, **grading},
            },
            hyperparameters=hyperparameters,
            options={**spec.options, **judging, **({"upgrade": dict(upgrade)} if upgrade else {})},
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            suffix=spec.suffix,
            seed=secrets.randbelow(2**31) if spec.seed is None else spec.seed,
            metadata_=dict(spec.metadata) if spec.metadata is not None else None,
            integrations=[dict(item) for item in spec.integrations],
            result_files=[],
        )
        session.add(job)
        session.flush()
        told = {"model": job.model, "method": spec.method_type}
        audit.record(session, "job.created", job.id, project_id, **told)
        record_event(session, job.id, f"Created fine-tuning job: {job.id}")
        record_event(session, job.id, f"Validating training file: {job.training_file}")
    return job


def get(database: Database, project_id: str, job_id: str) -> Job:
    """Return a job.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    with database.read() as session:
        return find(session, project_id, job_id)


def list_jobs(
    database: Database,
    project_id: str,
    limit: int = 20,
    after: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """Return a page of jobs, newest first, and whether more follow.

    Args:
        after: The last id of the page before.
        metadata: Only jobs that carry all of these pairs; if empty, only jobs that carry none.
    """
    query = select(Job).where(Job.project_id == project_id)
    with database.read() as session:
        if after is not None:
            mark = session.scalar(select(Job).where(Job.id == after, Job.project_id == project_id))
            if mark is None:
                raise InvalidInput(f"Invalid 'after': no FineTuningJob {after}", param="after")
            tied = (Job.created_at == mark.created_at) & (Job.id < mark.id)
            query = query.where(or_(Job.created_at < mark.created_at, tied))
        query = query.order_by(Job.created_at.desc(), Job.id.desc())
        with session.scalars(query.execution_options(yield_per=limit + 1)) as newest:
            # Metadata is matched here: databases disagree about quotes and accents in JSON paths.
            matching = (job for job in newest if _matches(metadata, job.metadata_ or {}))
            found = list(islice(matching, limit + 1))
    return found[:limit], len(found) > limit


def list_events(
    database: Database, project_id: str, job_id: str, limit: int = 20, after: str | None = None
) -> tuple[list[JobEvent], bool]:
    """Return a page of a job's events, newest first, and whether more follow."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    with database.read() as session:
        find(session, project_id, job_id)
        if after is not None:
            seq = session.scalar(
                select(JobEvent.seq).where(JobEvent.id == after, JobEvent.job_id == job_id)
            )
            if seq is None:
                raise InvalidInput(f"Invalid 'after': no event {after}", param="after")
            query = query.where(JobEvent.seq < seq)
        found = list(session.scalars(query.order_by(JobEvent.seq.desc()).limit(limit + 1)))
    return found[:limit], len(found) > limit


def _matches(wanted: Mapping[str, str] | None, carried: Mapping[str, str]) -> bool:
    if wanted is None:
        return True
    return wanted.items() <= carried.items() if wanted else not carried


def list_checkpoints(
    database: Database, project_id: str, job_id: str
) -> list[tuple[Checkpoint, AdapterVersion]]:
    """Return a job's usable checkpoints with their versions, newest first."""
    query = (
        select(Checkpoint, AdapterVersion)
        .join(AdapterVersion, Checkpoint.version_id == AdapterVersion.id)
        .where(Checkpoint.job_id == job_id, AdapterVersion.deleted_at.is_(None))
        .order_by(Checkpoint.step_number.desc())
    )
    with database.read() as session:
        find(session, project_id, job_id)
        return [(row[0], row[1]) for row in session.execute(query)]


def request_cancel(database: Database, project_id: str, job_id: str) -> Job:
    """Cancel a job at once; a worker that holds it loses it, and ends its trainer.

    Raises:
        StateConflict: The job has ended.
    """
    with database.write() as session:
        job = find(session, project_id, job_id)
        if job.status in FINAL:
            raise StateConflict(
                f"The job {job_id} has ended ({job.status}), so it cannot be cancelled.",
                param="id",
            )
        audit.record(session, "job.cancelled", job.id, project_id)
        move(session, job, "cancelled")
    return job


def move(session: Session, job: Job, status: str, **fields: Any) -> None:
    """Change a job's state, with the event that tells of it.

    Raises:
        StateConflict: The state machine has no such step.
    """
    if status not in TRANSITIONS.get(job.status, ()):
        raise StateConflict(f"The job {job.id} cannot go from {job.status} to {status}")
    job.status = status
    for name, value in fields.items():
        setattr(job, name, value)
    if status in FINAL:
        job.finished_at = now()
        job.estimated_finish = None
        job.worker_id = job.lease_expires_at = None
        job.pause_requested = False
        webhooks.enqueue(
            session, job.project_id, f"fine_tuning.job.{status}", job.finished_at, {"id": job.id}
        )
    if status == "cancelled":
        record_event(session, job.id, "Fine-tuning job cancelled")


def enqueue(session: Session, job: Job, data: Mapping[str, Any]) -> None:
    """Queue a validated job and let go of it."""
    move(session, job, "queued", validated=True)
    message = "Files validated, moving job to queued state"
    record_event(session, job.id, message, data=data)
    tell_position(session, job)
    job.worker_id = job.lease_expires_at = None


def tell_position(session: Session, job: Job) -> None:
    """Record how many jobs are ahead of one that is queued."""
    position = queue_position(session, job)
    message = f"Job enqueued. Waiting for jobs ahead to complete. Queue number: {position}."
    record_event(session, job.id, message, data={"queue_position": position})


def fail(
    session: Session,
    job: Job,
    code: str,
    message: str,
    param: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """End a job with its cause."""
    move(session, job, "failed", error={"code": code, "message": message, "param": param})
    told = f"Fine-tuning job failed: {message}"
    record_event(session, job.id, told, level="error", data=data, code=code)


def record_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
    source: str | None = None,
    code: str | None = None,
) -> None:
    """Append to a job's history.

    Args:
        source: Names the trainer's line, so that none is told twice.
        code: Of the failure that it tells of, for the log.
    """
    told = select(JobEvent.seq).where(JobEvent.job_id == job_id, JobEvent.source == source)
    if source is not None and session.scalar(told) is not None:
        return
    log.log(LOG_LEVELS[level], "%s: %s", job_id, words(message, code, data))
    session.add(
        JobEvent(
            id=new_id("ftevent-"),
            job_id=job_id,
            level=level,
            type=type,
            message=message,
            data=None if data is None else dict(data),
            source=source,
        )
    )
    session.flush()


def queue_position(session: Session, job: Job) -> int:
    """Return the number of live jobs that were created before this one."""
    earlier = select(func.count()).where(
        Job.status.in_(("queued", "running")), Job.created_at <= job.created_at, Job.id != job.id
    )
    return int(session.scalar(earlier) or 0)


def count_by_status(database: Database) -> dict[str, int]:
    """Return the number of jobs in each state."""
    with database.read() as session:
        rows = session.execute(select(Job.status, func.count()).group_by(Job.status))
        return {row[0]: row[1] for row in rows}


def live_jobs(database: Database, project_id: str) -> int:
    """Return the number of an account's jobs that have not ended."""
    query = select(func.count()).where(Job.project_id == project_id, Job.status.in_(LIVE_JOBS))
    with database.read() as session:
        return int(session.scalar(query) or 0)


def find(session: Session, project_id: str, job_id: str) -> Job:
    """Return a job for reading or writing, inside the caller's transaction.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFound(f"No such FineTuningJob object: {job_id}", param="id")
    return job

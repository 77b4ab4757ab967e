"""Checkpoints of a job as models of their own, usable while the job still runs.

Each is an adapter version with a row that says at which step it was made and how well it did. The
newest few of a job are kept; one that an alias, another account or a waiting job needs stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data.adapter_folders import StagedAdapter
from data.files import LIVE_JOBS
from data.registry import record
from data.tables import AdapterVersion, Alias, Checkpoint, Job, Project, new_id, now
from data.tables_jobs import CheckpointPermission

PREFIX = "ftckpt_"
MARK_LENGTH = 8


def mark_of(job_id: str) -> str:
    """Return the characters that the names of a job's models have in common."""
    return job_id[-MARK_LENGTH:]


def is_recorded(session: Session, job_id: str, step: int) -> bool:
    """Tell whether the checkpoint of a step was published before, even if it is gone again."""
    query = select(Checkpoint.id).where(Checkpoint.job_id == job_id, Checkpoint.step_number == step)
    return session.scalar(query) is not None


def add(
    session: Session,
    job: Job,
    staged: StagedAdapter,
    base_fingerprint: str,
    step: int,
    metrics: Mapping[str, Any],
) -> AdapterVersion:
    """Insert the rows of a staged checkpoint, inside the caller's transaction."""
    version = record(
        session,
        session.get_one(Project, job.project_id),
        staged,
        job.base,
        base_fingerprint,
        suffix=job.suffix,
        job_id=job.id,
        lineage={"step": step, "metrics": dict(metrics), "seed": job.seed},
        mark=mark_of(job.id),
        step=step,
    )
    checkpoint = Checkpoint(
        id=new_id(PREFIX),
        job_id=job.id,
        version_id=version.id,
        step_number=step,
        metrics=dict(metrics),
    )
    session.add(checkpoint)
    session.flush()
    return version


def prune(session: Session, job_id: str, keep: int) -> list[str]:
    """Take all but the newest `keep` checkpoints of a job out of use; returns their names.

    The files go with the registry's next sweep, after the requests that still read them.
    """
    usable = (
        select(AdapterVersion)
        .join(Checkpoint, Checkpoint.version_id == AdapterVersion.id)
        .where(Checkpoint.job_id == job_id, AdapterVersion.deleted_at.is_(None))
        .order_by(Checkpoint.step_number.desc())
    )
    pruned = []
    for version in session.scalars(usable).all()[keep:]:
        if not _is_needed(session, version):
            version.deleted_at = now()
            pruned.append(version.name)
    return pruned


def find_name(session: Session, project_id: str, checkpoint_id: str) -> str | None:
    """Return the model name of an account's checkpoint by the checkpoint's id."""
    query = (
        select(AdapterVersion.name)
        .join(Checkpoint, Checkpoint.version_id == AdapterVersion.id)
        .where(Checkpoint.id == checkpoint_id, AdapterVersion.project_id == project_id)
    )
    return session.scalar(query)


def _is_needed(session: Session, version: AdapterVersion) -> bool:
    users = (
        select(Alias.name).where(Alias.version_id == version.id),
        select(CheckpointPermission.id).where(CheckpointPermission.version_id == version.id),
        select(Job.id).where(Job.start_version_id == version.id, Job.status.in_(LIVE_JOBS)),
    )
    return any(session.scalar(query.limit(1)) is not None for query in users)

"""The records that hone keeps: one class a table, one schema for SQLite and PostgreSQL.

Records hold state only; the rules about them live beside their verbs (`accounts`, `files`, `jobs`,
`registry`). Times are unix seconds. Ids are unguessable and carry the prefix that clients expect.
"""

from __future__ import annotations

import secrets
import string
import time
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID_ALPHABET = string.ascii_letters + string.digits
Sequence64 = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements INTEGER only


def new_id(prefix: str, length: int = 24) -> str:
    """Return `prefix` plus random letters and digits (24 of them carry 142 bits)."""
    base = len(ID_ALPHABET)
    number = secrets.randbelow(base**length)  # one call to the system, not one a letter
    letters = []
    for _ in range(length):
        number, place = divmod(number, base)
        letters.append(ID_ALPHABET[place])
    return prefix + "".join(letters)


def now() -> int:
    """Return the unix time in whole seconds."""
    return int(time.time())


class Record(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[Any]: JSON,
        str: Text,
    }


class Project(Record):
    """An account: a customer of this installation (OpenAI's `organization.project`)."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    slug: Mapped[str] = mapped_column(String(64), unique=True)  # the account part of ft: names
    status: Mapped[str] = mapped_column(String(16), default="active")  # suspended, archived
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    archived_at: Mapped[int | None] = mapped_column(BigInteger)
    case_id: Mapped[str | None] = mapped_column(String(64))  # of the suspension at hand


class ApiKey(Record):
    """A key, stored as its hash; `project_id` is null for an admin key."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # project, admin
    name: Mapped[str]
    hash: Mapped[str] = mapped_column(String(64), unique=True)  # sha256, hex
    redacted: Mapped[str]
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    last_used_at: Mapped[int | None] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)
    service_account_id: Mapped[str | None] = mapped_column(String(64))
    role: Mapped[str] = mapped_column(String(16), default="owner", server_default="owner")


class File(Record):
    """An uploaded or produced file; its bytes lie in the blob store and never change."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    blob: Mapped[str]  # key in the blob store
    status: Mapped[str] = mapped_column(String(16), default="processed")
    status_details: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]  # data.validate's findings, once made
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)


class Job(Record):
    """A fine-tuning job: what was asked, where it stands, and who works on it."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_status_created", "status", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    status: Mapped[str] = mapped_column(String(24), default="validating_files")
    model: Mapped[str]
    method: Mapped[dict[str, Any]]  # {"type": "supervised", "supervised": {"hyperparameters": ...}}
    hyperparameters: Mapped[dict[str, Any]]  # "auto" until the trainer resolved it
    options: Mapped[dict[str, Any]]  # extensions: lora, max_seq_length, n_checkpoints, ...
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSON)
    integrations: Mapped[list[Any]]
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish: Mapped[int | None] = mapped_column(BigInteger)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None]
    result_files: Mapped[list[Any]]
    error: Mapped[dict[str, Any] | None]
    base_model: Mapped[str | None]  # of `model`, where that is a fine-tuned one
    start_version_id: Mapped[str | None] = mapped_column(String(64))  # the adapter to go on from
    tokens_per_s: Mapped[float | None] = mapped_column(Float)  # as measured in training
    validated: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)  # crashes in a row without progress
    progress_step: Mapped[int] = mapped_column(default=0)  # checkpoint that the last start found
    worker_id: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[float | None] = mapped_column(Float)

    @property
    def base(self) -> str:
        """The name of the base model that the job's adapter is made for."""
        return self.base_model or self.model


class JobEvent(Record):
    """One line of a job's history; `seq` orders events exactly."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job_seq", "job_id", "seq"),
        Index("ix_job_events_job_source", "job_id", "source", unique=True),
    )

    seq: Mapped[int] = mapped_column(Sequence64, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    level: Mapped[str] = mapped_column(String(8))  # info, warn, error
    type: Mapped[str] = mapped_column(String(16))  # message, metrics
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    source: Mapped[str | None] = mapped_column(String(64))  # trainer line, so that none repeats


class Checkpoint(Record):
    """A saved state of a job that stays usable as a model of its own."""

    __tablename__ = "job_checkpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"))
    step_number: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class AdapterVersion(Record):
    """A published adapter: immutable, checked, named for ever."""

    __tablename__ = "adapter_versions"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)  # ft:base:account:suffix:8
    base_model: Mapped[str]
    base_fingerprint: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64), index=True)  # of all files: cache key
    path: Mapped[str]  # folder name below the adapters folder
    bytes: Mapped[int] = mapped_column(BigInteger)
    rank: Mapped[int]
    target_modules: Mapped[list[Any]]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    lineage: Mapped[dict[str, Any]]  # dataset hashes, hyperparameters, versions, metrics
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)


class Alias(Record):
    """A movable name of an account: `ft:base:account:suffix` -> the version in use."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"))
    updated_at: Mapped[int] = mapped_column(BigInteger, default=now)


class AliasMove(Record):
    """The history of an alias, append-only: what rollback reads."""

    __tablename__ = "alias_moves"

    seq: Mapped[int] = mapped_column(Sequence64, primary_key=True, autoincrement=True)
    alias: Mapped[str] = mapped_column(String(255), index=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"))
    action: Mapped[str] = mapped_column(String(16))  # promote, rollback
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)

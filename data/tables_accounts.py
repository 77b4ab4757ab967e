"""Records around accounts: service accounts, access requests, cases, the audit log."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from data.tables import Record, Sequence64, now


class ServiceAccount(Record):
    """A program of an account, which keys are made for."""

    __tablename__ = "service_accounts"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    role: Mapped[str] = mapped_column(String(16), default="member", server_default="owner")
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    deleted_at: Mapped[int | None] = mapped_column(BigInteger)


class ModelPermission(Record):
    """Which models an account may use; without a row, all that it could."""

    __tablename__ = "model_permissions"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    mode: Mapped[str] = mapped_column(String(16))  # allow_list, deny_list
    model_ids: Mapped[list[Any]]
    updated_at: Mapped[int] = mapped_column(BigInteger, default=now)


class AccessRequest(Record):
    """Somebody asks for an account."""

    __tablename__ = "access_requests"
    __table_args__ = (Index("ix_access_requests_status_created", "status", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    organization: Mapped[str]
    use_case: Mapped[str]
    volume: Mapped[str | None]
    status: Mapped[str] = mapped_column(String(16), default="pending")
    note: Mapped[str | None]  # of whoever decided
    project_id: Mapped[str | None] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    decided_at: Mapped[int | None] = mapped_column(BigInteger)


class SafetyCase(Record):
    """A warning or a suspension, as the account itself may read it."""

    __tablename__ = "safety_cases"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    notice: Mapped[str] = mapped_column(String(16))  # warning, deactivation
    reason: Mapped[str]
    paused_jobs: Mapped[list[Any]]  # go on when the account does
    appeal: Mapped[dict[str, Any] | None]  # message, created_at, answer, answered_at
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    closed_at: Mapped[int | None] = mapped_column(BigInteger)


class AuditEntry(Record):
    """One line of the audit log; the database refuses to change or delete it."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_project_seq", "project_id", "seq"),)

    seq: Mapped[int] = mapped_column(Sequence64, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    effective_at: Mapped[int] = mapped_column(BigInteger, default=now)
    type: Mapped[str] = mapped_column(String(64), index=True)
    subject_id: Mapped[str] = mapped_column(String(255))
    project_id: Mapped[str | None] = mapped_column(String(64))
    actor_id: Mapped[str | None] = mapped_column(String(64))  # a key; None: the command line
    address: Mapped[str | None] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(64))
    details: Mapped[dict[str, Any]]

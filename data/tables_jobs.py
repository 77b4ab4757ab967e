"""Records beside the jobs: who may use a shared version, and what is told to whom by webhook."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Float, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from data.tables import Record, now


class CheckpointPermission(Record):
    """An account may use one version of another account."""

    __tablename__ = "checkpoint_permissions"
    __table_args__ = (
        Index("ix_checkpoint_permissions_version_project", "version_id", "project_id", unique=True),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    version_id: Mapped[str] = mapped_column(ForeignKey("adapter_versions.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class WebhookEndpoint(Record):
    """Where an account wants to be told of events; the secret signs, so it is kept in plain."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    secret: Mapped[str]
    old_secret: Mapped[str | None]  # signs too, for a day after a rotation that keeps it
    old_secret_until: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    updated_at: Mapped[int] = mapped_column(BigInteger, default=now)


class WebhookDelivery(Record):
    """One event on its way to one endpoint: the outbox, and the history of what came of it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_status_due", "status", "due_at"),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str] = mapped_column(String(64))
    event_type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str]  # the exact bytes that are signed, as UTF-8 text
    status: Mapped[str] = mapped_column(String(16), default="pending")  # delivered, failed
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[float] = mapped_column(Float)  # of the next attempt, unix seconds
    status_code: Mapped[int | None]  # of the last answer
    error: Mapped[str | None]  # why the last attempt failed
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    delivered_at: Mapped[int | None] = mapped_column(BigInteger)

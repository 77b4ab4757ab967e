"""The records of metering: what was used, what may be used, and answers kept for repeated calls.

Money is kept in nano-dollars (1e-9 USD), so that a token at 0.15 USD per million has a whole price.
A missing limit (None) means unlimited.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, String, text
from sqlalchemy.orm import Mapped, mapped_column

from data.tables import Record, Sequence64, now

TRAINING = text("kind = 'training'")


class UsageRecord(Record):
    """One line of the ledger: what one request used, or one training run. Never changed.

    It names no foreign keys: the ledger outlives what it names.
    """

    __tablename__ = "usage_records"
    __table_args__ = (
        Index("ix_usage_records_project_created", "project_id", "created_at"),
        Index(  # a training run is billed once, however many servers look
            "ix_usage_records_training",
            "request_id",
            unique=True,
            sqlite_where=TRAINING,
            postgresql_where=TRAINING,
        ),
    )

    seq: Mapped[int] = mapped_column(Sequence64, primary_key=True, autoincrement=True)
    created_at: Mapped[int] = mapped_column(BigInteger, index=True)
    kind: Mapped[str] = mapped_column(String(24))  # completions, embeddings, training, ...
    project_id: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(255))
    end_user: Mapped[str | None]
    request_id: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16))  # complete, aborted, error
    batch: Mapped[bool] = mapped_column(default=False)
    requests: Mapped[int]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)  # cached ones included
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    prompt_cost: Mapped[int] = mapped_column(BigInteger)  # nano-dollars, at the price of that time
    cached_cost: Mapped[int] = mapped_column(BigInteger)
    completion_cost: Mapped[int] = mapped_column(BigInteger)


class MonthlySpend(Record):
    """The sum of an account's costs in a calendar month (UTC)."""

    __tablename__ = "monthly_spend"

    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)  # 2026-11
    cost: Mapped[int] = mapped_column(BigInteger)  # nano-dollars


class RateLimit(Record):
    """How fast an account may call one model; a base model's limits cover its adapters too."""

    __tablename__ = "rate_limits"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    model: Mapped[str] = mapped_column(String(255), primary_key=True)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_day: Mapped[int | None] = mapped_column(BigInteger)
    updated_at: Mapped[int] = mapped_column(BigInteger, default=now)


class AccountCaps(Record):
    """What an account may hold at a time."""

    __tablename__ = "account_caps"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    concurrent_jobs: Mapped[int | None]
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)


class SpendLimit(Record):
    """The most an account may spend in a calendar month (UTC)."""

    __tablename__ = "spend_limits"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    threshold_cents: Mapped[int] = mapped_column(BigInteger)


class OrganizationLimit(Record):
    """A limit of the whole installation."""

    __tablename__ = "organization_limits"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)  # spend_cents: a month's
    value: Mapped[int] = mapped_column(BigInteger)


class SpendAlert(Record):
    """A monthly sum at which the operator is told, once a month."""

    __tablename__ = "spend_alerts"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    threshold_cents: Mapped[int] = mapped_column(BigInteger)
    recipients: Mapped[list[Any]]
    subject_prefix: Mapped[str | None]
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    fired_month: Mapped[str | None] = mapped_column(String(7))


class KeptAnswer(Record):
    """The answer to a POST that may be sent again; without a status it is still being made.

    `created_at` is the last sign of life of whoever makes it.
    """

    __tablename__ = "kept_answers"

    scope: Mapped[str] = mapped_column(String(64), primary_key=True)  # account, or key of an admin
    key: Mapped[str] = mapped_column(String(64), primary_key=True)  # sha256 of what names the call
    body_hash: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now, index=True)
    status: Mapped[int | None]
    content_type: Mapped[str | None]
    body: Mapped[bytes | None] = mapped_column(LargeBinary)

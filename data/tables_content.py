"""Records of content control: policies, what they found, and end users who are shut out."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from data.tables import Record, Sequence64, now


class ContentPolicy(Record):
    """What is done about an account's texts; without a row, nothing."""

    __tablename__ = "content_policies"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    input: Mapped[str] = mapped_column(String(8))  # off, score, block
    output: Mapped[str] = mapped_column(String(8))
    training: Mapped[str] = mapped_column(String(8))
    rules: Mapped[list[Any]]
    case_after: Mapped[int | None]  # violations a day that open a safety case
    block_user_after: Mapped[int | None]  # violations a day of one end user
    updated_at: Mapped[int] = mapped_column(BigInteger, default=now)


class ContentEvent(Record):
    """A text that broke a rule; the text itself is not kept."""

    __tablename__ = "content_events"
    __table_args__ = (Index("ix_content_events_project_created", "project_id", "created_at"),)

    seq: Mapped[int] = mapped_column(Sequence64, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)
    side: Mapped[str] = mapped_column(String(8))  # input, output, training
    mode: Mapped[str] = mapped_column(String(8))  # score, block
    matched: Mapped[list[Any]]  # names of rules and categories
    end_user: Mapped[str | None]
    model: Mapped[str | None]
    request_id: Mapped[str | None] = mapped_column(String(64))


class BlockedUser(Record):
    """An end user of an account who may not call, by the name that the account sends."""

    __tablename__ = "blocked_users"

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    identifier: Mapped[str] = mapped_column(String(255), primary_key=True)
    reason: Mapped[str]  # the category or rule that led to it, or "operator"
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)

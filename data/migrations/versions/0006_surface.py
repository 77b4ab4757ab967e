"""Uploads in parts, stored chat completions

Revision: 0006_surface; follows 0005_jobs
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006_surface"
down_revision = "0005_jobs"
branch_labels = None
depends_on = None


def _id(name: str = "id", nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length=64), nullable=nullable)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _number(name: str, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "uploads",
        _id(),
        _id("project_id"),
        _text("filename"),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        _text("mime_type"),
        _number("bytes"),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("expires_after_s", sa.Integer(), nullable=True),
        _id("file_id", nullable=True),
        _number("created_at"),
        _number("expires_at"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_uploads_project_id", "uploads", ["project_id"])
    op.create_index("ix_uploads_status", "uploads", ["status"])
    op.create_table(
        "upload_parts",
        _id(),
        _id("upload_id"),
        _number("bytes"),
        _number("created_at"),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])
    op.create_table(
        "chat_completions",
        _id(),
        _id("project_id"),
        _text("model"),
        sa.Column("completion", sa.JSON(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=True),
        _number("created_at"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_chat_completions_project_created", "chat_completions", ["project_id", "created_at"]
    )


def downgrade() -> None:
    for table in ("chat_completions", "upload_parts", "uploads"):
        op.drop_table(table)

"""Batches

Revision: 0009_batches; follows 0008_metering
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009_batches"
down_revision = "0008_metering"
branch_labels = None
depends_on = None


def upgrade() -> None:
    names = ("id", "project_id", "key_id", "endpoint", "input_file_id")
    optional = ("output_file_id", "error_file_id", "worker_id")
    op.create_table(
        "batches",
        *(sa.Column(name, sa.String(length=64), nullable=False) for name in names),
        *(sa.Column(name, sa.String(length=64), nullable=True) for name in optional),
        sa.Column("completion_window", sa.String(length=8), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("errors", sa.JSON(), nullable=False),
        *(sa.Column(n, sa.Integer(), nullable=False) for n in ("total", "completed", "failed")),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("times", sa.JSON(), nullable=False),
        *(sa.Column(n, sa.BigInteger(), nullable=False) for n in ("created_at", "expires_at")),
        sa.Column("lease_expires_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_batches_project_id", "batches", ["project_id"])
    op.create_index("ix_batches_status_created", "batches", ["status", "created_at"])


def downgrade() -> None:
    op.drop_table("batches")

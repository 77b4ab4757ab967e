"""Content control, roles of keys, limits of the whole installation

Revision: 0010_content; follows 0009_batches
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_content"
down_revision = "0009_batches"
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "content_policies",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        *(sa.Column(n, sa.String(length=8), nullable=False) for n in ("input", "output")),
        sa.Column("training", sa.String(length=8), nullable=False),
        sa.Column("rules", sa.JSON(), nullable=False),
        sa.Column("case_after", sa.Integer(), nullable=True),
        sa.Column("block_user_after", sa.Integer(), nullable=True),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("project_id"),
    )
    op.create_table(
        "content_events",
        sa.Column("seq", SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        *(sa.Column(n, sa.String(length=8), nullable=False) for n in ("side", "mode")),
        sa.Column("matched", sa.JSON(), nullable=False),
        *(sa.Column(n, sa.Text(), nullable=True) for n in ("end_user", "model")),
        sa.Column("request_id", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index(
        "ix_content_events_project_created", "content_events", ["project_id", "created_at"]
    )
    op.create_table(
        "blocked_users",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("identifier", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("project_id", "identifier"),
    )
    op.create_table(
        "organization_limits",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    # Keys that are there already keep what they could do.
    for table in ("api_keys", "service_accounts"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(
                sa.Column("role", sa.String(length=16), nullable=False, server_default="owner")
            )


def downgrade() -> None:
    for table in ("service_accounts", "api_keys"):
        with op.batch_alter_table(table) as batch:
            batch.drop_column("role")
    for table in ("organization_limits", "blocked_users", "content_events", "content_policies"):
        op.drop_table(table)

"""People who sign in to the web pages

Revision: 0012_people; follows 0011_feedback
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_people"
down_revision = "0011_feedback"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "people",
        *(sa.Column(n, sa.String(length=64), nullable=False) for n in ("id", "project_id")),
        *(sa.Column(n, sa.String(length=128), nullable=False) for n in ("login", "name")),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("login"),
    )
    op.create_index("ix_people_project_id", "people", ["project_id"])
    op.create_table(
        "web_sessions",
        *(sa.Column(n, sa.String(length=64), nullable=False) for n in ("token_hash", "person_id")),
        *(sa.Column(n, sa.BigInteger(), nullable=False) for n in ("created_at", "seen_at")),
        sa.ForeignKeyConstraint(["person_id"], ["people.id"]),
        sa.PrimaryKeyConstraint("token_hash"),
    )
    op.create_index("ix_web_sessions_person_id", "web_sessions", ["person_id"])


def downgrade() -> None:
    op.drop_table("web_sessions")
    op.drop_table("people")

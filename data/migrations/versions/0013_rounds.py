"""Rounds of learning from a labeling project

Revision: 0013_rounds; follows 0012_people
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013_rounds"
down_revision = "0012_people"
branch_labels = None
depends_on = None

TIMES = ("leased_until", "created_at", "changed_at")
OPTIONAL = ("reward_job_id", "policy_job_id", "comparison_id", "candidate")


def upgrade() -> None:
    op.create_table(
        "label_rounds",
        *(
            sa.Column(n, sa.String(length=64), nullable=False)
            for n in ("id", "project_id", "label_project_id", "file_id", "training_file")
        ),
        *(sa.Column(n, sa.String(length=16), nullable=False) for n in ("method", "status")),
        *(sa.Column(n, sa.Text(), nullable=False) for n in ("model", "suffix")),
        *(sa.Column(n, sa.JSON(), nullable=False) for n in ("rule", "prompts", "options")),
        *(sa.Column(n, sa.Text(), nullable=True) for n in OPTIONAL),
        sa.Column("decision", sa.JSON(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        *(sa.Column(n, sa.BigInteger(), nullable=False) for n in TIMES),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.ForeignKeyConstraint(["label_project_id"], ["label_projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_label_rounds_project_id", "label_rounds", ["project_id"])


def downgrade() -> None:
    op.drop_table("label_rounds")

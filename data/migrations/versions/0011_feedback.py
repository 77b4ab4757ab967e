"""Human feedback: labeling projects, judgements, users' feedback

Revision: 0011_feedback; follows 0010_content
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_feedback"
down_revision = "0010_content"
branch_labels = None
depends_on = None

TABLES = (
    *("feedback_policies", "feedback", "stored_completions", "label_labelers"),
    *("label_judgements", "label_assignments", "label_candidates", "label_tasks"),
    *("label_guidelines", "label_projects"),
)


def _ids(*names: str, optional: bool = False) -> list[sa.Column]:
    return [sa.Column(name, sa.String(length=64), nullable=optional) for name in names]


def _json(*names: str, optional: bool = False) -> list[sa.Column]:
    return [sa.Column(name, sa.JSON(), nullable=optional) for name in names]


def _text(*names: str, optional: bool = False) -> list[sa.Column]:
    return [sa.Column(name, sa.Text(), nullable=optional) for name in names]


def _whole(*names: str) -> list[sa.Column]:
    return [sa.Column(name, sa.Integer(), nullable=False) for name in names]


def _times(*names: str) -> list[sa.Column]:
    return [sa.Column(name, sa.BigInteger(), nullable=False) for name in names]


def _short(name: str, length: int, optional: bool = False) -> sa.Column:
    return sa.Column(name, sa.String(length=length), nullable=optional)


def _flag(name: str) -> sa.Column:
    return sa.Column(name, sa.Boolean(), nullable=False)


def _to(column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target])


def upgrade() -> None:
    op.create_table(
        "label_projects",
        *_ids("id", "project_id"),
        _short("name", 128),
        _short("kind", 16),
        *_json("label", "gates"),
        *_whole("overlap", "training_tasks", "lease_minutes", "seed"),
        *(sa.Column(name, sa.Float(), nullable=False) for name in ("overlap_share", "gold_rate")),
        _short("status", 16),
        *_whole("guidelines_version", "tasks_added"),
        *_times("created_at"),
        _to("project_id", "projects.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_label_projects_project_id", "label_projects", ["project_id"])
    op.create_table(
        "label_guidelines",
        *_ids("label_project_id"),
        *_whole("version"),
        *_text("text"),
        *_times("created_at"),
        _to("label_project_id", "label_projects.id"),
        sa.PrimaryKeyConstraint("label_project_id", "version"),
    )
    op.create_table(
        "label_tasks",
        *_ids("id", "label_project_id"),
        *_whole("number", "priority", "wanted", "judged", "leased"),
        *_json("prompt"),
        *_json("gold", "settled", optional=True),
        _flag("is_training"),
        _short("status", 16),
        _short("end_user", 128, optional=True),
        *_times("created_at"),
        _to("label_project_id", "label_projects.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_label_tasks_queue", "label_tasks", ["label_project_id", "status", "judged", "number"]
    )
    op.create_index("ix_label_tasks_end_user", "label_tasks", ["end_user"])
    op.create_table(
        "label_candidates",
        *_ids("id", "task_id"),
        *_whole("position"),
        *_text("text"),
        *_text("model", optional=True),
        *_json("origin"),
        _to("task_id", "label_tasks.id"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("task_id", "position"),
    )
    op.create_table(
        "label_assignments",
        *_ids("id", "task_id", "label_project_id", "labeler"),
        *_json("shown_order"),
        *_whole("guidelines_version"),
        _short("state", 16),
        *_times("served_at", "expires_at"),
        _to("task_id", "label_tasks.id"),
        _to("label_project_id", "label_projects.id"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("task_id", "labeler"),
    )
    op.create_index("ix_label_assignments_state", "label_assignments", ["state", "expires_at"])
    op.create_index(
        "ix_label_assignments_labeler",
        "label_assignments",
        ["label_project_id", "labeler", "state"],
    )
    op.create_table(
        "label_judgements",
        *_ids("id", "assignment_id", "task_id", "label_project_id", "labeler"),
        _short("kind", 16),
        *_json("answer", "timings"),
        *_whole("shown_first", "guidelines_version"),
        _flag("counts"),
        *_ids("superseded_by", optional=True),
        *_times("created_at"),
        _to("assignment_id", "label_assignments.id"),
        _to("task_id", "label_tasks.id"),
        _to("label_project_id", "label_projects.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    for column in ("assignment_id", "task_id"):
        op.create_index(f"ix_label_judgements_{column}", "label_judgements", [column])
    op.create_index(
        "ix_label_judgements_project", "label_judgements", ["label_project_id", "created_at"]
    )
    op.create_table(
        "label_labelers",
        *_ids("label_project_id", "labeler"),
        _flag("paused"),
        *_text("reason", optional=True),
        *_times("changed_at"),
        _to("label_project_id", "label_projects.id"),
        sa.PrimaryKeyConstraint("label_project_id", "labeler"),
    )
    op.create_table(
        "stored_completions",
        *_ids("id", "project_id"),
        *_text("model", "prompt"),
        *_json("completion", "request"),
        _short("end_user", 128, optional=True),
        *_times("created_at"),
        _to("project_id", "projects.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_stored_completions_project", "stored_completions", ["project_id", "created_at"]
    )
    op.create_index("ix_stored_completions_end_user", "stored_completions", ["end_user"])
    op.create_table(
        "feedback",
        *_ids("id", "project_id", "completion_id"),
        *_whole("choice"),
        *_text("model", "answer"),
        *_json("prompt", "value", "request", "token_ids"),
        _short("kind", 16),
        _short("end_user", 128, optional=True),
        _short("source", 16),
        *_times("created_at"),
        _to("project_id", "projects.id"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_feedback_project_created", "feedback", ["project_id", "created_at"])
    for column in ("completion_id", "end_user"):
        op.create_index(f"ix_feedback_{column}", "feedback", [column])
    op.create_table(
        "feedback_policies",
        *_ids("project_id"),
        _flag("consent"),
        sa.Column("retention_days", sa.Integer(), nullable=True),
        _to("project_id", "projects.id"),
        sa.PrimaryKeyConstraint("project_id"),
    )


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)

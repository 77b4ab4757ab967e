"""Service accounts, model permissions, access requests, cases, the audit log

Revision: 0007_accounts; follows 0006_surface
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_accounts"
down_revision = "0006_surface"
branch_labels = None
depends_on = None

REFUSE_SQLITE = """
CREATE TRIGGER audit_log_no_{name} BEFORE {verb} ON audit_log
{condition} BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
"""
REFUSE_POSTGRESQL = """
CREATE FUNCTION audit_log_refuse() RETURNS trigger AS $$
BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$ LANGUAGE plpgsql
"""
TRIGGER_POSTGRESQL = """
CREATE TRIGGER audit_log_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
FOR EACH STATEMENT EXECUTE FUNCTION audit_log_refuse()
"""


def _text(name: str, size: int | None = None, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length=size) if size else sa.Text(), nullable=nullable)


def _number(name: str, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def upgrade() -> None:
    op.add_column("projects", _number("archived_at", nullable=True))
    op.add_column("projects", _text("case_id", 64, nullable=True))
    op.add_column("api_keys", _text("service_account_id", 64, nullable=True))
    project = sa.ForeignKeyConstraint(["project_id"], ["projects.id"])
    op.create_table(
        "service_accounts",
        _text("id", 64),
        _text("project_id", 64),
        _text("name"),
        _number("created_at"),
        _number("deleted_at", nullable=True),
        project,
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_service_accounts_project_id", "service_accounts", ["project_id"])
    op.create_table(
        "model_permissions",
        _text("project_id", 64),
        _text("mode", 16),
        sa.Column("model_ids", sa.JSON(), nullable=False),
        _number("updated_at"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("project_id"),
    )
    op.create_table(
        "access_requests",
        _text("id", 64),
        *(_text(name) for name in ("name", "email", "organization", "use_case")),
        _text("volume", nullable=True),
        _text("status", 16),
        _text("note", nullable=True),
        _text("project_id", 64, nullable=True),
        _number("created_at"),
        _number("decided_at", nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_access_requests_status_created", "access_requests", ["status", "created_at"]
    )
    op.create_table(
        "safety_cases",
        _text("id", 64),
        _text("project_id", 64),
        _text("notice", 16),
        _text("reason"),
        sa.Column("paused_jobs", sa.JSON(), nullable=False),
        _number("created_at"),
        _number("closed_at", nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_safety_cases_project_id", "safety_cases", ["project_id"])
    op.create_table(
        "audit_log",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        _text("id", 64),
        _number("effective_at"),
        _text("type", 64),
        _text("subject_id", 255),
        *(_text(n, 64, nullable=True) for n in ("project_id", "actor_id", "address", "request_id")),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_audit_log_type", "audit_log", ["type"])
    op.create_index("ix_audit_log_project_seq", "audit_log", ["project_id", "seq"])
    _make_append_only()


def _make_append_only() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(REFUSE_POSTGRESQL)
        op.execute(TRIGGER_POSTGRESQL)
        return
    for name, verb in (("update", "UPDATE"), ("delete", "DELETE")):
        op.execute(REFUSE_SQLITE.format(name=name, verb=verb, condition=""))
    # INSERT OR REPLACE deletes without the delete trigger.
    known = "WHEN EXISTS (SELECT 1 FROM audit_log WHERE seq = NEW.seq OR id = NEW.id)"
    op.execute(REFUSE_SQLITE.format(name="replace", verb="INSERT", condition=known))


def downgrade() -> None:
    op.drop_table("audit_log")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_log_refuse()")
    for table in ("safety_cases", "access_requests", "model_permissions", "service_accounts"):
        op.drop_table(table)
    op.drop_column("api_keys", "service_account_id")
    op.drop_column("projects", "case_id")
    op.drop_column("projects", "archived_at")

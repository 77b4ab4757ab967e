"""Alembic's entry: runs migrations on the connection that `data.db.Database` hands over."""

from __future__ import annotations

from alembic import context

import data.tables_accounts
import data.tables_content
import data.tables_feedback
import data.tables_jobs
import data.tables_metering
import data.tables_people
import data.tables_surface  # noqa: F401 - their tables belong to the metadata
from data.tables import Record

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Record.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()

"""Alembic's entry: runs migrations on the connection that `data.db.Database` hands over."""

from __future__ import annotations

from alembic import context

from data import tables_metering  # noqa: F401  # its tables belong to the schema
from data.tables import Record

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Record.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()

"""A look at a database that changes nothing: its schema's version, and the jobs that wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, make_url, or_, select
from sqlalchemy.exc import SQLAlchemyError

from data.db import MIGRATIONS
from data.errors import InvalidInput
from data.job_lease import CLAIMABLE
from data.tables import Job


@dataclass(frozen=True, slots=True)
class DatabaseState:
    """What was found.

    Attributes:
        exists: False for an SQLite file that is not there yet.
        revision: Of the schema; None where nothing was made yet.
        newest: Of this version of hone.
        known: Whether this version of hone knows the revision.
        waiting: Jobs that no worker holds; None where the schema is not the newest.
        held: Jobs that a worker holds.
    """

    exists: bool
    revision: str | None
    newest: str
    known: bool
    waiting: int | None = None
    held: int = 0


def look(url: str) -> DatabaseState:
    """Return a database's state.

    Raises:
        InvalidInput: It cannot be read.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    newest = scripts.get_current_head() or ""
    place = make_url(url)
    if place.get_backend_name() == "sqlite" and not Path(place.database or "").exists():
        return DatabaseState(False, None, newest, True)
    try:
        with _reading(place) as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision != newest:
                known = {script.revision for script in scripts.walk_revisions()}
                return DatabaseState(True, revision, newest, revision is None or revision in known)
            free = or_(Job.worker_id.is_(None), Job.lease_expires_at < time.time())
            due = select(func.count()).select_from(Job).where(Job.status.in_(CLAIMABLE))
            waiting = connection.execute(due.where(free)).scalar_one()
            held = connection.execute(due.where(~free)).scalar_one()
            return DatabaseState(True, revision, newest, True, waiting, held)
    except SQLAlchemyError as error:
        shown = place.render_as_string(hide_password=True)
        raise InvalidInput(f"{shown} cannot be read: {error.args[0]}") from error


@contextmanager
def _reading(url: sqlalchemy.URL) -> Iterator[Connection]:
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database)).resolve()
        # Without a log beside it nobody has it open, and SQLite would make one to read it.
        mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
        engine = sqlalchemy.create_engine(
            f"sqlite:///file:{path}?{mode}&uri=true", hide_parameters=True
        )
    else:
        options = {"postgresql_readonly": True}
        engine = sqlalchemy.create_engine(url, execution_options=options, hide_parameters=True)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()

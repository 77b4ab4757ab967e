"""The database: opened by URL, migrated by Alembic, used through `read()` and `write()`.

SQLite runs in WAL, and every `write()` starts with BEGIN IMMEDIATE, so a transaction that reads and
then writes (claiming a job, moving an alias) never fails half-way for a lock taken in between. The
writers of one process take turns at a lock of their own first: SQLite's waits by sleeping, up to a
tenth of a second at a time, and whoever comes later may overtake. On PostgreSQL every `write()`
first takes one advisory lock, which has the same effect: writers take turns, readers never wait,
and each `read()` sees one snapshot. PostgreSQL's texts hold no NUL; U+FFFD is written in its place.

An error of the database tells the statement, never the values: those are prompts, keys and rows.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, ExceptionContext, event, make_url
from sqlalchemy.orm import Session

from data.errors import InvalidInput

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 30
SWITCH_PAUSE_S = 0.01
CONNECTIONS = 40  # as many as the threads that a server answers with
WRITERS = 0x686F6E65  # "hone": the advisory lock that writers take turns with on PostgreSQL
MALFORMED = (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError, ValueError)
PASSWORD = re.compile(r"(://[^:/@]*:).*@")


class Database:
    """A pool of connections to one database.

    Args:
        url: SQLAlchemy URL, for example `sqlite:////srv/hone/hone.db` or
            `postgresql+psycopg://user@host/hone`.

    Raises:
        InvalidInput: The URL is malformed, its driver is not installed, its folder cannot be made,
            or it is in memory, which the threads of a server cannot share.
    """

    def __init__(self, url: str):
        shown = PASSWORD.sub(r"\1***@", url)
        try:
            self.url = make_url(url)
            self.is_sqlite = self.url.get_backend_name() == "sqlite"
            if self.is_sqlite:
                _prepare_folder(self.url)
            self.engine = _open(self.url, self.is_sqlite)
            self._turn: AbstractContextManager[object] = (
                threading.Lock() if self.is_sqlite else nullcontext()
            )
        except MALFORMED as error:
            raise InvalidInput(
                f'database_url "{shown}" is not a usable database URL: {error}',
                param="database_url",
            ) from error
        except OSError as error:
            raise InvalidInput(
                f'database_url "{shown}" is in a folder that cannot be made ({error.strerror}); '
                "give a path that can be written to",
                param="database_url",
            ) from error
        except ModuleNotFoundError as error:
            raise InvalidInput(
                f'database_url "{shown}" needs the Python package "{error.name}"; for PostgreSQL '
                "install hone-toolkit[postgres]",
                param="database_url",
            ) from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session on one consistent snapshot; nothing is written."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session that commits at the end, or rolls back on an exception."""
        with (
            self._turn,
            Session(self._writing(), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def migrate(self) -> None:
        """Bring the schema to the newest version; safe to call at every start."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._writing().begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _writing(self) -> Engine:
        options = {} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        return self.engine.execution_options(hone_write=True, **options)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _prepare_folder(url: sqlalchemy.URL) -> None:
    if url.database in (None, "", ":memory:"):
        raise ValueError("it is in memory, which threads cannot share; name a file")
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)


def _open(url: sqlalchemy.URL, is_sqlite: bool) -> Engine:
    options: dict[str, Any] = {"pool_size": CONNECTIONS, "hide_parameters": True}
    if not is_sqlite:
        engine = sqlalchemy.create_engine(
            url, pool_pre_ping=True, isolation_level="REPEATABLE READ", **options
        )
        event.listen(engine, "begin", _begin_postgresql)
        event.listen(engine, "before_cursor_execute", _without_nul, retval=True)
        event.listen(engine, "handle_error", _without_detail)
        return engine
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, **options)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # so that _begin_sqlite decides how a transaction starts
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch a new file to a write-ahead log, however many processes open it at once.

    SQLite waits for other locks, but a switch that meets another fails at once: both hold a
    read lock that the other waits for.
    """
    give_up = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > give_up:
                raise
            time.sleep(SWITCH_PAUSE_S)


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("hone_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("hone_write", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS})")


def _without_nul(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
) -> tuple[str, Any]:
    return statement, _replace_nul(parameters)


def _replace_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {name: _replace_nul(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_replace_nul, value))
    return value


def _without_detail(context: ExceptionContext) -> None:
    """Cut PostgreSQL's message to its first line: the detail repeats the values of the row."""
    original, shown = context.original_exception, context.sqlalchemy_exception
    primary = getattr(getattr(original, "diag", None), "message_primary", None)
    if primary is not None and shown is not None:
        shown.args = tuple(str(part).replace(str(original), primary) for part in shown.args)
        original.args = (primary,)

"""The database: its schema is the records', reads are snapshots, writes wait for each other."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, func, select, text
from sqlalchemy.exc import IntegrityError

import data.tables_accounts
import data.tables_jobs
import data.tables_metering
import data.tables_surface  # noqa: F401 - likewise
from data import accounts, jobs
from data.db import Database
from data.errors import InvalidInput
from data.tables import Job, Project, Record, new_id

COUNT = """
import sys
from sqlalchemy import text
from data.db import Database
database = Database(sys.argv[1])
for _ in range(50):
    with database.write() as session:
        (count,) = session.execute(text("select created_at from projects")).one()
        session.execute(text("update projects set created_at = :count"), {"count": count + 1})
"""


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def test_the_migrations_make_the_schema_of_the_records(database: Database) -> None:
    with database.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Record.metadata)
    assert differences == []


def test_migrating_twice_changes_nothing(database: Database) -> None:
    with database.write() as session:
        session.add(Project(id="proj_1", name="a", slug="a"))
    database.migrate()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Project)) == 1


def test_processes_that_start_together_migrate_once(database_url: str) -> None:
    code = f"from data.db import Database; input(); Database({database_url!r}).migrate()"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(6)
    ]
    time.sleep(2)  # until each waits for its line
    for process in started:
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait() for process in started] == [0] * 6


def test_sqlite_survives_a_power_cut(database: Database) -> None:
    if not database.is_sqlite:
        pytest.skip("of SQLite alone")
    with database.read() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
        assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_write_commits_or_rolls_back(database: Database) -> None:
    with database.write() as session:
        session.add(Project(id="proj_1", name="a", slug="a"))
    with pytest.raises(IntegrityError):
        add_projects(database, "b", "a")
    with database.read() as session:
        assert session.scalars(select(Project.id)).all() == ["proj_1"]


def test_an_error_tells_no_values(database: Database) -> None:
    value = "quokka"
    add_projects(database, value)
    with pytest.raises(IntegrityError) as caught:
        add_projects(database, value)
    told = "".join(traceback.format_exception(caught.value))
    assert "projects" in told
    assert value not in told


def test_a_text_with_nul_can_be_stored(database: Database) -> None:
    odd = "a\0b"
    with database.write() as session:
        session.add(Project(id="proj_1", name=odd, slug="a"))
    with database.read() as session:
        kept = session.scalars(select(Project.name).where(Project.name.in_([odd, "x"]))).all()
    assert kept == [odd if database.is_sqlite else "a\ufffdb"]


def add_projects(database: Database, *slugs: str) -> None:
    with database.write() as session:
        for slug in slugs:
            session.add(Project(id=f"proj_{slug}", name=slug, slug=slug))
            session.flush()


def test_a_read_is_one_snapshot(database: Database) -> None:
    with database.read() as reader:
        assert reader.scalar(select(func.count()).select_from(Project)) == 0
        with database.write() as session:
            session.add(Project(id="proj_1", name="a", slug="a"))
        assert reader.scalar(select(func.count()).select_from(Project)) == 0
    with database.read() as reader:
        assert reader.scalar(select(func.count()).select_from(Project)) == 1


def test_rows_must_belong_to_an_account(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(
            Job(
                id="ftjob-1",
                project_id="proj_missing",
                model="m",
                method={},
                hyperparameters={},
                options={},
                training_file="file-1",
                seed=1,
                integrations=[],
                result_files=[],
            )
        )


def test_no_update_is_lost_between_processes(database: Database) -> None:
    with database.write() as session:
        session.add(Project(id="proj_1", name="a", slug="a", created_at=0))
    url = database.url.render_as_string(hide_password=False)
    started = [subprocess.Popen([sys.executable, "-c", COUNT, url]) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    with database.read() as session:
        assert session.get_one(Project, "proj_1").created_at == 100


def test_threads_share_a_database(database: Database) -> None:
    def add(number: int) -> None:
        for part in range(10):
            with database.write() as session:
                session.add(Project(id=f"{number}-{part}", name="a", slug=f"{number}-{part}"))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Project)) == 40


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "nosuchdb://x",
        "oracle+nosuchdriver://x/y",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////proc/no/hone.db",
        "postgresql://host:port/hone",
    ],
)
def test_unusable_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Database(url)
    assert caught.value.param == "database_url"
    assert url in caught.value.message


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(InvalidInput) as caught:
        Database("postgresql://hone:s3:cr@et@host:port/hone")
    assert "://hone:***@host:port/hone" in caught.value.message
    assert "cr@et" not in caught.value.message


def test_ids_are_unguessable_and_prefixed() -> None:
    ids = {new_id("file-") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(one.startswith("file-") and len(one) == 29 and one[5:].isalnum() for one in ids)


def upgrade(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(accounts.__file__).parent / "migrations"))
    with database.engine.execution_options(hone_write=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def test_the_first_schema_comes_up_to_date_with_its_rows(database_url: str) -> None:
    database = Database(database_url)
    upgrade(database, "0001")
    first = MetaData()
    with database.write() as session:
        connection = session.connection()
        first.reflect(connection)
        tables = first.tables
        digest = hashlib.sha256(b"sk-test").hexdigest()
        project = {"id": "proj_1", "name": "Acme", "slug": "acme", "status": "active"}
        connection.execute(tables["projects"].insert(), project | {"created_at": 1})
        key = {"id": "key_1", "project_id": "proj_1", "kind": "project", "name": "k"}
        key |= {"hash": digest, "redacted": "sk-***"}
        connection.execute(tables["api_keys"].insert(), key | {"created_at": 1})
        job = {"id": "ftjob-1", "project_id": "proj_1", "status": "running", "model": "tiny"}
        job |= {"training_file": "file-1", "seed": 1, "created_at": 1, "cancel_requested": False}
        job |= {"attempts": 0, "progress_step": 3, "metadata": {"a": "grüße"}}
        job |= {"method": {"type": "supervised", "supervised": {}}, "hyperparameters": {}}
        job |= {"options": {}, "integrations": [], "result_files": []}
        connection.execute(tables["jobs"].insert(), job)
    database.migrate()
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Record.metadata) == []
    assert accounts.authenticate(database, "sk-test").project_slug == "acme"
    found = jobs.get(database, "proj_1", "ftjob-1")
    assert (found.status, found.metadata_, found.progress_step) == ("running", {"a": "grüße"}, 3)
    assert found.validated is True  # it was past validation
    database.close()

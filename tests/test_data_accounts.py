"""Accounts and keys: shown once, stored as hashes, revoked at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, select

from data import accounts
from data.db import Database
from data.errors import Forbidden, InvalidInput, NotFound, StateConflict, Unauthorized
from data.tables import ApiKey, Project, Record, now


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def test_a_key_stands_for_its_account(database: Database) -> None:
    project, key = accounts.create_account(database, "Acme Ltd.")
    principal = accounts.authenticate(database, key)
    assert project.slug == "acme-ltd"
    assert (principal.project_id, principal.project_slug) == (project.id, "acme-ltd")
    assert key.startswith("sk-")
    assert len(key) == 46


def test_no_key_is_stored(database: Database, tmp_path: Path) -> None:
    _, key = accounts.create_account(database, "acme")
    _, admin = accounts.create_admin_key(database)
    with database.engine.connect() as connection:
        rows = [connection.execute(select(table)).all() for table in Record.metadata.sorted_tables]
    stored = repr(rows).encode()
    if database.is_sqlite:
        database.close()
        stored += b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.encode() not in stored
    assert admin.encode() not in stored
    assert hashlib.sha256(key.encode()).hexdigest().encode() in stored


@pytest.mark.parametrize(
    "wrong", ["sk-" + "x" * 43, "nonsense", "sk-ünïcödé-and-more", "\udcff" * 20]
)
def test_a_wrong_key_is_refused(database: Database, wrong: str) -> None:
    accounts.create_account(database, "acme")
    with pytest.raises(Unauthorized, match="Incorrect API key provided: "):
        accounts.authenticate(database, wrong)


def test_a_missing_key_is_refused(database: Database) -> None:
    with pytest.raises(Unauthorized, match="didn't provide an API key"):
        accounts.authenticate(database, None)


def test_messages_never_show_a_whole_key() -> None:
    assert accounts.redact("sk-abcdefghijklmnopqrstuvwxyz") == "sk-ab***yz"
    assert accounts.redact("short") == "***"


def test_revocation_holds_at_once(database: Database) -> None:
    project, first = accounts.create_account(database, "acme")
    record, second = accounts.create_key(database, project.id, "second")
    accounts.revoke_key(database, record.id)
    with pytest.raises(Unauthorized):
        accounts.authenticate(database, second)
    assert accounts.authenticate(database, first).project_id == project.id
    with pytest.raises(StateConflict):
        accounts.revoke_key(database, record.id)
    with pytest.raises(NotFound, match="No such key"):
        accounts.revoke_key(database, "key_missing")


def test_an_expired_key_is_refused(database: Database) -> None:
    project, _ = accounts.create_account(database, "acme")
    record, key = accounts.create_key(database, project.id, expires_at=now() + 100)
    assert accounts.authenticate(database, key)
    with database.write() as session:
        session.get_one(ApiKey, record.id).expires_at = now() - 1
    with pytest.raises(Unauthorized):
        accounts.authenticate(database, key)
    with pytest.raises(InvalidInput, match="has passed"):
        accounts.create_key(database, project.id, expires_at=now() - 1)


def test_a_suspended_account_is_forbidden(database: Database) -> None:
    project, key = accounts.create_account(database, "acme")
    with database.write() as session:
        session.get_one(Project, project.id).status = "suspended"
    with pytest.raises(Forbidden) as caught:
        accounts.authenticate(database, key)
    assert caught.value.code == "account_suspended"


@pytest.mark.parametrize("name", ["", "  ", "日本", "x" * 65])
def test_unusable_names_are_refused(database: Database, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be used"):
        accounts.create_account(database, name)


def test_a_taken_name_is_refused(database: Database) -> None:
    accounts.create_account(database, "Acme")
    with pytest.raises(InvalidInput, match="already"):
        accounts.create_account(database, "acme!")


def test_last_use_is_noted_without_a_write_for_every_request(database: Database) -> None:
    project, key = accounts.create_account(database, "acme")
    accounts.authenticate(database, key)
    (record,) = accounts.list_keys(database, project.id)
    assert record.last_used_at is not None
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *seen: statements.append(seen[2]))
    accounts.authenticate(database, key)
    assert statements
    reads = [s for s in statements if s == "BEGIN" or (s.startswith("SELECT") and "lock" not in s)]
    assert reads == statements

"""The audit log, accounts and access on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from data import (
    access,
    accounts,
    audit,
    job_lease,
    jobs,
    model_access,
    projects,
    safety,
    stored_chats,
)
from data.db import Database
from data.errors import Forbidden, InvalidInput, NotFound, StateConflict
from data.files import FileStore
from data.job_spec import JobSpec

ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


def test_no_entry_is_changed_or_deleted(database: Database) -> None:
    projects.create(database, "acme")
    statements = ["update audit_log set type = 'x'", "delete from audit_log"]
    if database.is_sqlite:
        statements.append("insert or replace into audit_log select * from audit_log limit 1")
    for statement in statements:
        with (
            pytest.raises(DatabaseError, match="append-only"),
            database.write() as session,
        ):
            session.execute(text(statement))
    [entry], more = audit.entries(database, audit.Filter(), 10)
    assert (entry.type, more) == ("project.created", False)


def test_an_entry_stands_or_falls_with_its_change(database: Database) -> None:
    projects.create(database, "acme")
    with pytest.raises(InvalidInput):
        projects.create(database, "Acme")
    entries, _ = audit.entries(database, audit.Filter(), 10)
    assert len(entries) == 1


def test_filters_and_pages(database: Database) -> None:
    made = [projects.create(database, f"account {n}") for n in range(3)]
    token = audit.actor.set(audit.Actor("key_1", "10.0.0.1", "req_1"))
    try:
        projects.rename(database, made[0].id, "another name")
    finally:
        audit.actor.reset(token)
    first, more = audit.entries(database, audit.Filter(), 2)
    rest, end = audit.entries(database, audit.Filter(), 10, first[-1].id)
    assert (more, end) == (True, False)
    assert [entry.type for entry in (*first, *rest)] == [
        "project.updated",
        *["project.created"] * 3,
    ]
    [mine], _ = audit.entries(database, audit.Filter(actor_ids=("key_1",)), 10)
    assert (mine.address, mine.request_id, mine.subject_id) == ("10.0.0.1", "req_1", made[0].id)
    of_one, _ = audit.entries(database, audit.Filter(project_ids=(made[0].id,)), 10)
    assert len(of_one) == 2
    assert audit.entries(database, audit.Filter(at_least=mine.effective_at + 60), 10)[0] == []
    with pytest.raises(InvalidInput):
        audit.entries(database, audit.Filter(), 10, "audit_log-x")


def test_suspension_and_back(database: Database) -> None:
    project, key = accounts.create_account(database, "acme")
    case = safety.suspend(database, project.id, "Spam.")
    with pytest.raises(Forbidden, match=case.id):
        accounts.authenticate(database, key)
    assert accounts.authenticate(database, key, also_closed=True).project_id == project.id
    assert set(safety.closed_accounts(database)) == {project.id}
    with pytest.raises(StateConflict):
        safety.suspend(database, project.id, "again")
    with pytest.raises(NotFound):
        safety.find_case(database, "proj_other", case.id)
    safety.reinstate(database, project.id)
    assert accounts.authenticate(database, key).project_id == project.id
    assert safety.find_case(database, project.id, case.id).closed_at is not None
    assert safety.closed_accounts(database) == {}


def test_an_account_is_reinstated_with_its_jobs_or_not_at_all(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, _ = accounts.create_account(database, "acme")
    store = FileStore(database, f"file://{tmp_path}/files")
    job = make_job(database, project.id, store.create(project.id, [ROW], "x", "fine-tune").id)
    safety.suspend(database, project.id, "Spam.")

    def die(*_: object) -> None:
        raise RuntimeError("the process died")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "tell_position", die)
        with pytest.raises(RuntimeError):
            safety.reinstate(database, project.id)
    assert set(safety.closed_accounts(database)) == {project.id}
    safety.reinstate(database, project.id)
    assert jobs.get(database, project.id, job).status == "queued"


def test_permissions_name_what_lies_below(database: Database) -> None:
    project = projects.create(database, "acme")
    base, alias, version = "tiny", "ft:tiny:acme:x", "ft:tiny:acme:x:12345678"

    def permitted() -> list[bool]:
        return [
            model_access.permits(database, project.id, name, None if name == base else base)
            for name in (base, alias, version)
        ]

    assert permitted() == [True, True, True]
    model_access.replace(database, project.id, "allow_list", [alias])
    assert permitted() == [False, True, True]
    model_access.replace(database, project.id, "deny_list", [version])
    assert permitted() == [True, True, False]
    model_access.replace(database, project.id, "deny_list", [base])
    assert permitted() == [False, False, False]
    model_access.replace(database, project.id, "deny_list", ["ft:tiny:acme:xy"])
    assert permitted() == [True, True, True]
    model_access.clear(database, project.id)
    assert permitted() == [True, True, True]


def test_access_is_decided_once(database: Database) -> None:
    asked = {"name": "a", "email": "a@b.org", "organization": "B", "use_case": "c"}
    request = access.ask(database, **asked)
    access.decide(database, request.id, "waitlisted", None)
    done, project, key = access.approve(database, request.id)
    assert (done.status, project.slug) == ("approved", "b")
    assert accounts.authenticate(database, key).project_id == project.id
    with pytest.raises(StateConflict):
        access.approve(database, request.id)
    taken = access.ask(database, **asked)
    with pytest.raises(InvalidInput):  # the name is taken: nothing was decided
        access.approve(database, taken.id)
    assert access.list_requests(database, 10, status="pending")[0][0].id == taken.id


def test_stored_chats_by_metadata(database: Database) -> None:
    project = projects.create(database, "acme")
    for number in range(5):
        whole = {"id": f"chatcmpl-{number}", "model": "m", "created": 100 + number // 2}
        kept = {"n": str(number % 2), 'quote"': "grüße"}
        stored_chats.save(database, project.id, whole, {}, [], kept)
    odd, more = stored_chats.list_chats(database, project.id, metadata={"n": "1"}, limit=1)
    assert ([chat.id for chat in odd], more) == (["chatcmpl-1"], True)
    found, _ = stored_chats.list_chats(database, project.id, metadata={'quote"': "grüße"})
    assert [chat.id for chat in found] == [f"chatcmpl-{n}" for n in range(5)]
    back, _ = stored_chats.list_chats(database, project.id, order="desc", after="chatcmpl-3")
    assert [chat.id for chat in back] == ["chatcmpl-2", "chatcmpl-1", "chatcmpl-0"]
    with pytest.raises(NotFound):
        stored_chats.get(database, "proj_other", "chatcmpl-0")


def make_job(database: Database, project_id: str, file_id: str) -> str:
    spec = JobSpec(model="tiny", training_file=file_id)
    return jobs.create(database, project_id, spec, ["tiny"]).id


def test_no_worker_takes_jobs_of_a_closed_account(database: Database, tmp_path: Path) -> None:
    project, _ = accounts.create_account(database, "acme")
    store = FileStore(database, f"file://{tmp_path}/files")
    file_id = store.create(project.id, [ROW], "x.jsonl", "fine-tune").id
    before = make_job(database, project.id, file_id)
    case = safety.suspend(database, project.id, "Spam.")
    assert case.paused_jobs == [before]
    late = make_job(database, project.id, file_id)  # of a call that was under way
    assert job_lease.claim(database, "worker", 60) is None
    safety.reinstate(database, project.id)
    assert jobs.get(database, project.id, before).status == "queued"
    claimed = {job_lease.claim(database, "worker", 60).id for _ in range(2)}  # type: ignore[union-attr]
    assert claimed == {before, late}


def test_archiving_cancels_what_waits(database: Database, tmp_path: Path) -> None:
    project, _ = accounts.create_account(database, "acme")
    store = FileStore(database, f"file://{tmp_path}/files")
    file_id = store.create(project.id, [ROW], "x.jsonl", "fine-tune").id
    made = [make_job(database, project.id, file_id) for _ in range(2)]
    projects.archive(database, project.id)
    assert {jobs.get(database, project.id, job_id).status for job_id in made} == {"cancelled"}
    with pytest.raises(StateConflict):
        projects.archive(database, project.id)

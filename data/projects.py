"""Accounts as their operator sees them: listed, renamed, archived, with the programs of each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from data import accounts, audit, jobs
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.files import LIVE_JOBS
from data.roles import Role
from data.tables import ApiKey, Job, Project, new_id, now
from data.tables_accounts import ServiceAccount

MAX_NAME = 64


def create(database: Database, name: str) -> Project:
    """Make an account without a key.

    Raises:
        InvalidInput: The name is unusable or taken.
    """
    with database.write() as session:
        return accounts.add_project(session, name)


def get(database: Database, project_id: str) -> Project:
    """Return an account; raises NotFound."""
    with database.read() as session:
        return find(session, project_id)


def find(session: Session, project_id: str) -> Project:
    """Return an account inside the caller's transaction; raises NotFound."""
    project = session.get(Project, project_id)
    if project is None:
        raise NotFound(f"No such Project object: {project_id}", param="project_id")
    return project


def list_projects(
    database: Database, limit: int, after: str | None = None, include_archived: bool = False
) -> tuple[Sequence[Project], bool]:
    """Return a page of accounts, oldest first, and whether more follow."""
    query = select(Project)
    if not include_archived:
        query = query.where(Project.status != "archived")
    with database.read() as session:
        return page_of(session, query, Project, limit, after)


def rename(database: Database, project_id: str, name: str) -> Project:
    """Change what an account is called; its part of model names stays.

    Raises:
        NotFound: There is none.
        InvalidInput: The name is unusable.
    """
    accounts.slug_of(name)  # the rules of a new account
    with database.write() as session:
        project = find(session, project_id)
        before, project.name = project.name, name.strip()
        audit.record(session, "project.updated", project_id, project_id, before=before, after=name)
    return project


def archive(database: Database, project_id: str) -> Project:
    """Close an account for good: its keys stop working and its jobs are cancelled.

    Raises:
        NotFound: There is none.
        StateConflict: It is archived already.
    """
    with database.write() as session:
        project = find(session, project_id)
        if project.status == "archived":
            raise StateConflict(f"The account {project.slug} was archived before.", param="id")
        project.status, project.archived_at = "archived", now()
        live = select(Job.id).where(Job.project_id == project_id, Job.status.in_(LIVE_JOBS))
        job_ids = session.scalars(live).all()
        audit.record(session, "project.archived", project_id, project_id)
    for job_id in job_ids:
        with suppress(StateConflict):  # it ended meanwhile
            jobs.request_cancel(database, project_id, job_id)
    return project


def create_service_account(
    database: Database,
    project_id: str,
    name: str,
    *,
    with_key: bool,
    expires_at: int | None = None,
    role: Role = "member",
) -> tuple[ServiceAccount, ApiKey | None, str | None]:
    """Make a program of an account, with its first key unless told otherwise.

    Returns:
        The program, its key's record, and the key in plain text: it cannot be shown again.

    Raises:
        NotFound: There is no such account.
        InvalidInput: The name is empty or too long.
    """
    _check_name(name)
    with database.write() as session:
        find(session, project_id)
        program = ServiceAccount(
            id=new_id("svc_acct_"), project_id=project_id, name=name.strip(), role=role
        )
        session.add(program)
        session.flush()
        audit.record(
            session,
            "service_account.created",
            program.id,
            project_id,
            name=program.name,
            role=role,
        )
        if not with_key:
            return program, None, None
        record, key = accounts.add_key(
            session,
            project_id,
            program.name,
            expires_at,
            service_account_id=program.id,
            role=role,
        )
    return program, record, key


def update_service_account(
    database: Database,
    project_id: str,
    service_account_id: str,
    *,
    name: str | None = None,
    role: Role | None = None,
) -> ServiceAccount:
    """Rename a program, or change what its keys may do from the next request on.

    Raises:
        NotFound: There is no such program.
        InvalidInput: The name is empty or too long.
    """
    if name is not None:
        _check_name(name)
    with database.write() as session:
        program = _program(session, project_id, service_account_id)
        program.name = program.name if name is None else name.strip()
        if role is not None:
            program.role = role
            held = select(ApiKey).where(ApiKey.service_account_id == program.id)
            for record in session.scalars(held).all():
                record.role = role
        audit.record(
            session,
            "service_account.updated",
            program.id,
            project_id,
            name=program.name,
            role=program.role,
        )
    return program


def _check_name(name: str) -> None:
    if not 0 < len(name.strip()) <= MAX_NAME:
        raise InvalidInput(
            f"Invalid 'name': expected 1 to {MAX_NAME} characters, but got {len(name)}.",
            param="name",
        )


def find_service_account(
    database: Database, project_id: str, service_account_id: str
) -> ServiceAccount:
    """Return a program of an account; raises NotFound."""
    with database.read() as session:
        return _program(session, project_id, service_account_id)


def list_service_accounts(
    database: Database, project_id: str, limit: int, after: str | None = None
) -> tuple[Sequence[ServiceAccount], bool]:
    """Return a page of an account's programs, oldest first, and whether more follow."""
    known = select(ServiceAccount).where(ServiceAccount.project_id == project_id)
    query = known.where(ServiceAccount.deleted_at.is_(None))
    with database.read() as session:
        find(session, project_id)
        return page_of(session, query, ServiceAccount, limit, after, known)


def delete_service_account(database: Database, project_id: str, service_account_id: str) -> None:
    """Remove a program; its keys stop working. Raises NotFound."""
    with database.write() as session:
        program = _program(session, project_id, service_account_id)
        program.deleted_at = now()
        held = select(ApiKey).where(
            ApiKey.service_account_id == program.id, ApiKey.revoked_at.is_(None)
        )
        for record in session.scalars(held).all():
            accounts.revoke(session, record)
        audit.record(session, "service_account.deleted", program.id, project_id)


def list_keys(
    database: Database, project_id: str | None, limit: int, after: str | None = None
) -> tuple[Sequence[ApiKey], bool]:
    """Return a page of the working keys of an account, or of the operators for None."""
    known = select(ApiKey).where(ApiKey.project_id == project_id)
    query = known.where(ApiKey.revoked_at.is_(None))
    with database.read() as session:
        if project_id is not None:
            find(session, project_id)
        return page_of(session, query, ApiKey, limit, after, known)


def find_key(database: Database, project_id: str | None, key_id: str) -> ApiKey:
    """Return a working key of an account, or of an operator for None; raises NotFound."""
    with database.read() as session:
        return _key(session, project_id, key_id)


def revoke_key(database: Database, project_id: str | None, key_id: str) -> None:
    """Make a key of an account, or of an operator, useless; raises NotFound."""
    with database.write() as session:
        accounts.revoke(session, _key(session, project_id, key_id))


def page_of(
    session: Session, query: Any, kind: Any, limit: int, after: str | None, known: Any = None
) -> tuple[Sequence[Any], bool]:
    """Return a page in the order of (created_at, id), and whether more follow.

    Args:
        known: What `after` may name, such as all of the account; None for all there are.

    Raises:
        InvalidInput: `after` names nothing of it.
    """
    if after is not None:
        if known is None:
            known = select(kind)
        mark = session.scalar(known.where(kind.id == after))
        if mark is None:
            raise InvalidInput(f"Invalid 'after': there is no {after}", param="after")
        tied = (kind.created_at == mark.created_at) & (kind.id > mark.id)
        query = query.where(or_(kind.created_at > mark.created_at, tied))
    found = session.scalars(query.order_by(kind.created_at, kind.id).limit(limit + 1)).all()
    return found[:limit], len(found) > limit


def _program(session: Session, project_id: str, service_account_id: str) -> ServiceAccount:
    find(session, project_id)
    program = session.get(ServiceAccount, service_account_id)
    if program is None or program.project_id != project_id or program.deleted_at is not None:
        raise NotFound(
            f"No such ServiceAccount object: {service_account_id}", param="service_account_id"
        )
    return program


def _key(session: Session, project_id: str | None, key_id: str) -> ApiKey:
    record = session.get(ApiKey, key_id)
    if record is None or record.project_id != project_id or record.revoked_at is not None:
        raise NotFound(f"No such ApiKey object: {key_id}", param="key_id")
    return record

"""Accounts and their keys: who may call, and as whom.

A key is random (256 bits) and stored as its SHA-256, so that a stolen database opens nothing; a
fast hash is right because there is nothing to guess. A key is looked up by its hash, which tells a
timing attacker nothing about the key. Revocation holds from the next request on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import Forbidden, InvalidInput, NotFound, StateConflict, Unauthorized
from data.model_rules import ModelRules
from data.roles import Role
from data.tables import ApiKey, Project, new_id, now
from data.tables_accounts import ModelPermission

KEY_PREFIXES = {"project": "sk-", "admin": "sk-admin-"}
MAX_NAME = 64
LAST_USED_STEP_S = 60  # last_used_at is written at most this often


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a key stands for; `project_id` and `project_slug` are None for an admin key.

    `role` tells what the key of an account may do; see `data.roles`. `models` are those that the
    account may use, as they were when the key was looked up; None if nobody looked.
    """

    project_id: str | None
    project_slug: str | None
    key_id: str
    kind: Literal["project", "admin"]
    role: str = "owner"
    models: ModelRules | None = None


# One statement without a session's bookkeeping: every request begins with it.
_LOOKUP = (
    select(
        *(ApiKey.id, ApiKey.hash, ApiKey.role, ApiKey.project_id, ApiKey.revoked_at),
        *(ApiKey.expires_at, ApiKey.last_used_at),
        *(Project.slug, Project.status, Project.case_id),
        *(ModelPermission.mode, ModelPermission.model_ids),
    )
    .select_from(ApiKey)
    .outerjoin(Project, Project.id == ApiKey.project_id)
    .outerjoin(ModelPermission, ModelPermission.project_id == ApiKey.project_id)
    .where(ApiKey.hash == bindparam("hash"))
)


def create_account(database: Database, name: str) -> tuple[Project, str]:
    """Make an account and its first key.

    Returns:
        The account, and the key in plain text: it cannot be shown again.

    Raises:
        InvalidInput: The name is empty, too long, has no letter or digit, or is taken.
    """
    with database.write() as session:
        project = add_project(session, name)
        _, key = add_key(session, project.id, "first key")
    return project, key


def add_project(session: Session, name: str) -> Project:
    """Make an account without a key, inside the caller's transaction; raises InvalidInput."""
    slug = slug_of(name)
    if session.scalar(select(Project).where(Project.slug == slug)) is not None:
        raise InvalidInput(
            f'There is an account "{slug}" already; choose another name, or make another key '
            f"for it with `hone keys create --account {slug}`",
            param="name",
        )
    project = Project(id=new_id("proj_"), name=name.strip(), slug=slug)
    session.add(project)
    session.flush()
    audit.record(session, "project.created", project.id, project.id, name=project.name, slug=slug)
    return project


def slug_of(name: str) -> str:
    """Return the part of model names that stands for an account: lower case, digits and dashes."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if not slug or len(name.strip()) > MAX_NAME:
        raise InvalidInput(
            f'The account name "{name}" cannot be used; give 1 to {MAX_NAME} characters with at '
            "least one Latin letter or digit",
            param="name",
        )
    return slug


def list_accounts(database: Database) -> list[Project]:
    """Return all accounts, oldest first."""
    with database.read() as session:
        return list(session.scalars(select(Project).order_by(Project.created_at, Project.id)))


def create_key(
    database: Database,
    project_id: str,
    name: str = "",
    *,
    expires_at: int | None = None,
    role: Role = "owner",
) -> tuple[ApiKey, str]:
    """Make another key for an account; returns its record and its plain text.

    Raises:
        NotFound: There is no such account.
        InvalidInput: The expiry lies in the past.
    """
    if expires_at is not None and expires_at <= now():
        raise InvalidInput(
            f"expires_at is {expires_at}, which has passed; give a later unix time",
            param="expires_at",
        )
    with database.write() as session:
        if session.get(Project, project_id) is None:
            raise NotFound(f"No such account: {project_id}", param="project_id")
        return add_key(session, project_id, name, expires_at, role=role)


def create_admin_key(
    database: Database, name: str = "", *, expires_at: int | None = None
) -> tuple[ApiKey, str]:
    """Make a key for an operator; returns its record and its plain text."""
    with database.write() as session:
        return add_key(session, None, name, expires_at)


def list_keys(database: Database, project_id: str | None) -> list[ApiKey]:
    """Return an account's keys, or the admin keys for None; oldest first, never in plain text."""
    query = select(ApiKey).where(ApiKey.project_id == project_id)
    with database.read() as session:
        return list(session.scalars(query.order_by(ApiKey.created_at, ApiKey.id)))


def revoke_key(database: Database, key_id: str) -> None:
    """Make a key useless from the next request on.

    Raises:
        NotFound: There is no such key.
        StateConflict: It is revoked already.
    """
    with database.write() as session:
        record = session.get(ApiKey, key_id)
        if record is None:
            raise NotFound(f"No such key: {key_id}; `hone keys list` shows them", param="id")
        if record.revoked_at is not None:
            raise StateConflict(f"The key {key_id} was revoked before", param="id")
        revoke(session, record)


def revoke(session: Session, record: ApiKey) -> None:
    """Make a key useless, inside the caller's transaction."""
    record.revoked_at = now()
    audit.record(session, "api_key.deleted", record.id, record.project_id, kind=record.kind)


def authenticate(database: Database, key: str | None, *, also_closed: bool = False) -> Principal:
    """Tell whom a bearer key stands for.

    Args:
        also_closed: Let in the keys of accounts that are suspended or archived.

    Raises:
        Unauthorized: The key is missing, unknown, revoked or expired.
        Forbidden: The account is suspended or archived.
    """
    if not key:
        raise Unauthorized(
            "You didn't provide an API key. Send it in the header `Authorization: Bearer sk-...`; "
            "whoever runs this server makes one with `hone keys create`.",
            code="invalid_api_key",
        )
    digest = _digest(key)
    with database.engine.connect() as connection:
        found = connection.execute(_LOOKUP, {"hash": digest}).one_or_none()
    if found is None or not hmac.compare_digest(found.hash, digest):
        raise _wrong(key)
    if not _works(found.revoked_at, found.expires_at):
        raise _wrong(key)
    if found.slug is not None and found.status != "active" and not also_closed:
        raise closed(found.slug, found.status, found.case_id)
    _touch(database, found.id, found.last_used_at)
    return Principal(
        project_id=found.project_id,
        project_slug=found.slug,
        key_id=found.id,
        kind="admin" if found.project_id is None else "project",
        role=found.role,
        models=ModelRules() if found.mode is None else ModelRules(found.mode, (*found.model_ids,)),
    )


def check_key(database: Database, key_id: str) -> None:
    """Make sure that a key that was let in still works, for calls that last.

    Raises:
        Unauthorized: It was revoked, or has expired.
    """
    with database.read() as session:
        record = session.get(ApiKey, key_id)
        if record is None or not _works(record.revoked_at, record.expires_at):
            raise Unauthorized("The API key was revoked or has expired during this call.")


def closed(slug: str, status: str, case_id: str | None) -> Forbidden:
    """Return the error that calls of an account get that is not active."""
    told = ""
    if case_id is not None:
        told = f" GET /v1/safety/cases/{case_id} with this key shows the case."
    return Forbidden(f"The account {slug} is {status}.{told}", code="account_suspended")


def redact(key: str) -> str:
    """Return a key as messages may show it: its first five and last two characters."""
    return f"{key[:5]}***{key[-2:]}" if len(key) > 12 else "***"


def _works(revoked_at: int | None, expires_at: int | None) -> bool:
    return revoked_at is None and (expires_at is None or expires_at > now())


def _wrong(key: str) -> Unauthorized:
    return Unauthorized(f"Incorrect API key provided: {redact(key)}.")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(
    session: Session,
    project_id: str | None,
    name: str,
    expires_at: int | None = None,
    *,
    service_account_id: str | None = None,
    role: str = "owner",
) -> tuple[ApiKey, str]:
    """Make a key inside the caller's transaction; None for the account makes an admin key."""
    kind = "project" if project_id else "admin"
    key = KEY_PREFIXES[kind] + secrets.token_urlsafe(32)
    record = ApiKey(
        id=new_id("key_"),
        project_id=project_id,
        kind=kind,
        name=name,
        hash=_digest(key),
        redacted=redact(key),
        expires_at=expires_at,
        service_account_id=service_account_id,
        role=role,
    )
    session.add(record)
    session.flush()
    audit.record(session, "api_key.created", record.id, project_id, kind=kind, name=name, role=role)
    return record, key


def _touch(database: Database, key_id: str, last_used_at: int | None) -> None:
    moment = now()
    if last_used_at is not None and moment - last_used_at < LAST_USED_STEP_S:
        return
    with database.write() as session:
        fresh = session.get(ApiKey, key_id)
        if fresh is not None:
            fresh.last_used_at = moment

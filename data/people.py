"""People who sign in to the web pages: who they are, what they may do, and their sessions.

A labeler labels. A reviewer also reads reports and settles disagreements. An admin also makes
projects, pauses labelers, exports, and uses models. Passwords are kept as argon2id hashes; a
session is a random token in a cookie, kept as its SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Literal, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from sqlalchemy import delete, select

from data import audit
from data.db import Database
from data.errors import InvalidInput, NotFound, Unauthorized
from data.tables import Project, new_id, now
from data.tables_people import Person, WebSession

Role = Literal["admin", "reviewer", "labeler"]
ROLES: tuple[Role, ...] = get_args(Role)
LOGIN = re.compile(r"[^\s<>]{2,128}")
MIN_PASSWORD = 10
IDLE_S = 12 * 3600
LONGEST_S = 14 * 24 * 3600
SEEN_EVERY_S = 60
WRONG = "The login or the password is wrong."

_hasher = PasswordHasher()
_nobody = _hasher.hash(secrets.token_hex(16))  # so that an unknown login takes as long


def create(
    database: Database, project_id: str, login: str, name: str, role: str, password: str
) -> Person:
    """Make a person of an account; raises InvalidInput."""
    check_role(role)
    if not LOGIN.fullmatch(login):
        raise InvalidInput(
            "A login has 2 to 128 characters without spaces, for example an email address.",
            param="login",
        )
    person = Person(
        id=new_id("user-"),
        project_id=project_id,
        login=login.lower(),
        name=name or login,
        role=role,
        password_hash=_hash(password),
    )
    with database.write() as session:
        if session.scalar(select(Person.id).where(Person.login == person.login)) is not None:
            raise InvalidInput(f"There is a person with the login {login} already.", param="login")
        session.add(person)
        audit.record(session, "person.created", person.id, project_id, login=login, role=role)
    return person


def list_people(database: Database, project_id: str) -> list[Person]:
    """Return an account's people by login."""
    query = select(Person).where(Person.project_id == project_id).order_by(Person.login)
    with database.read() as session:
        return list(session.scalars(query))


def change(
    database: Database,
    login: str,
    *,
    role: str | None = None,
    password: str | None = None,
    disabled: bool | None = None,
) -> Person:
    """Change a person; a new password or being disabled ends their sessions.

    Raises:
        NotFound: Nobody has this login.
        InvalidInput: The role is unknown or the password too short.
    """
    with database.write() as session:
        person = session.scalar(select(Person).where(Person.login == login.lower()))
        if person is None:
            raise NotFound(f"Nobody has the login {login}.")
        if role is not None:
            person.role = check_role(role)
        if password is not None:
            person.password_hash = _hash(password)
        if disabled is not None:
            person.disabled = disabled
        if password is not None or disabled:
            session.execute(delete(WebSession).where(WebSession.person_id == person.id))
        audit.record(
            session,
            "person.updated",
            person.id,
            person.project_id,
            role=person.role,
            disabled=person.disabled,
            password_changed=password is not None,
        )
    return person


def sign_in(database: Database, login: str, password: str) -> str:
    """Return the token of a new session.

    Raises:
        Unauthorized: Login or password is wrong, or the person is disabled; it is not told which.
    """
    with database.read() as session:
        person = session.scalar(select(Person).where(Person.login == login.lower()))
        active = person is not None and not person.disabled
        if person is not None:
            project = session.get_one(Project, person.project_id)
            active = active and project.status == "active"
    known = _nobody if person is None else person.password_hash
    try:
        _hasher.verify(known, password)
    except (VerifyMismatchError, InvalidHashError) as error:
        raise Unauthorized(WRONG) from error
    if person is None or not active:
        raise Unauthorized(WRONG)
    token = secrets.token_urlsafe(32)
    with database.write() as session:
        session.execute(delete(WebSession).where(WebSession.created_at < now() - LONGEST_S))
        session.add(WebSession(token_hash=_digest(token), person_id=person.id))
    return token


def of_session(database: Database, token: str) -> Person | None:
    """Return whose session a token is; None where it is over."""
    key = _digest(token)
    with database.read() as session:
        found = session.get(WebSession, key)
        if found is None:
            return None
        person = session.get_one(Person, found.person_id)
        project = session.get_one(Project, person.project_id)
        seen, made = found.seen_at, found.created_at
    fresh = seen > now() - IDLE_S and made > now() - LONGEST_S
    if not fresh or person.disabled or project.status != "active":
        return None
    if seen < now() - SEEN_EVERY_S:
        with database.write() as session:
            kept = session.get(WebSession, key)
            if kept is not None:
                kept.seen_at = now()
    return person


def sign_out(database: Database, token: str) -> None:
    """End a session."""
    with database.write() as session:
        session.execute(delete(WebSession).where(WebSession.token_hash == _digest(token)))


def check_role(role: str) -> Role:
    """Return a role by its name; raises InvalidInput."""
    for known in ROLES:
        if known == role:
            return known
    raise InvalidInput(
        f"Invalid 'role': '{role}'. Supported values are: {', '.join(map(repr, ROLES))}.",
        param="role",
    )


def _hash(password: str) -> str:
    if len(password) < MIN_PASSWORD:
        raise InvalidInput(f"A password has at least {MIN_PASSWORD} characters.", param="password")
    return _hasher.hash(password)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

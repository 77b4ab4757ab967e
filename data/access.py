"""Asking for an account: anybody asks, an operator approves, denies, or puts it off."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import select

from data import accounts, audit
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.projects import page_of
from data.tables import Project, new_id, now
from data.tables_accounts import AccessRequest

LIMITS = {"name": 100, "email": 254, "organization": 100, "use_case": 4000, "volume": 200}
OPTIONAL = {"volume"}
EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
OPEN = ("pending", "waitlisted")
STATUSES = (*OPEN, "approved", "denied")


def ask(database: Database, **fields: str | None) -> AccessRequest:
    """Record a request.

    Raises:
        InvalidInput: A field is missing, empty or too long, or the address is none.
    """
    for name, limit in LIMITS.items():
        value = fields.get(name)
        if value is None and name in OPTIONAL:
            continue
        if value is None or not 0 < len(value.strip()) <= limit:
            raise InvalidInput(
                f"Invalid '{name}': expected 1 to {limit} characters, but got {len(value or '')}.",
                param=name,
            )
    if not EMAIL.fullmatch(str(fields["email"]).strip()):
        raise InvalidInput(
            "Invalid 'email': expected an address like ann@example.org.", param="email"
        )
    told = {name: value.strip() for name, value in fields.items() if value is not None}
    request = AccessRequest(id=new_id("areq_"), **told)
    with database.write() as session:
        session.add(request)
        audit.record(session, "access_request.created", request.id, None)
    return request


def list_requests(
    database: Database, limit: int, after: str | None = None, status: str | None = None
) -> tuple[Sequence[AccessRequest], bool]:
    """Return a page, oldest first, and whether more follow."""
    query = select(AccessRequest)
    if status is not None:
        if status not in STATUSES:
            raise InvalidInput(
                f"Invalid 'status': expected one of {', '.join(STATUSES)}, but got '{status}'.",
                param="status",
            )
        query = query.where(AccessRequest.status == status)
    with database.read() as session:
        return page_of(session, query, AccessRequest, limit, after)


def approve(
    database: Database, request_id: str, account: str | None = None, note: str | None = None
) -> tuple[AccessRequest, Project, str]:
    """Make the account that was asked for.

    Args:
        account: Its name; the organization's unless given.

    Returns:
        The request, the account, and its first key in plain text: it cannot be shown again.

    Raises:
        NotFound: There is no such request.
        StateConflict: It was decided before.
        InvalidInput: The name is unusable or taken.
    """
    with database.write() as session:
        request = _open_request(session.get(AccessRequest, request_id), request_id)
        project = accounts.add_project(session, account or request.organization)
        _, key = accounts.add_key(session, project.id, "first key")
        request.status, request.decided_at, request.note = "approved", now(), note
        request.project_id = project.id
        audit.record(session, "access_request.approved", request.id, project.id)
    return request, project, key


def decide(database: Database, request_id: str, status: str, note: str | None) -> AccessRequest:
    """Deny a request (`denied`) or keep it for later (`waitlisted`).

    Raises:
        NotFound: There is no such request.
        StateConflict: It was decided before.
    """
    with database.write() as session:
        request = _open_request(session.get(AccessRequest, request_id), request_id)
        request.status, request.decided_at, request.note = status, now(), note
        audit.record(session, f"access_request.{status}", request.id, None)
    return request


def _open_request(request: AccessRequest | None, request_id: str) -> AccessRequest:
    if request is None:
        raise NotFound(f"No such AccessRequest object: {request_id}", param="id")
    if request.status not in OPEN:
        raise StateConflict(f"The request {request_id} was {request.status} before.", param="id")
    return request

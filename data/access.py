"""Asking for an account: anybody asks, an operator approves, denies, or puts it off."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select

from data import accounts, audit, limits, model_access
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.projects import page_of
from data.settings import Limits
from data.tables import Project, new_id, now
from data.tables_accounts import AccessRequest

LIMITS = {"name": 100, "email": 254, "organization": 100, "use_case": 4000, "volume": 200}
OPTIONAL = {"volume"}
EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
OPEN = ("pending", "waitlisted")
STATUSES = (*OPEN, "approved", "denied")


@dataclass(frozen=True, slots=True)
class Terms:
    """What an account may do from its first request on.

    Attributes:
        rates: Limits of the base model, by the names of `limits.RATE_FIELDS`; what is not named
            is the deployment's.
        spend_limit_cents: Of a calendar month; None is no limit.
        models: The only models it may use; None is all.
    """

    rates: Mapping[str, int | None] = field(default_factory=dict)
    spend_limit_cents: int | None = None
    models: Sequence[str] | None = None


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
    database: Database,
    request_id: str,
    account: str | None = None,
    note: str | None = None,
    terms: Terms | None = None,
    base_model: str = "",
    defaults: Limits | None = None,
) -> tuple[AccessRequest, Project, str]:
    """Make the account that was asked for, with its limits.

    Args:
        account: Its name; the organization's unless given.
        base_model: Whose limits `terms.rates` are.
        defaults: The deployment's limits.

    Returns:
        The request, the account, and its first key in plain text: it cannot be shown again.

    Raises:
        NotFound: There is no such request.
        StateConflict: It was decided before.
        InvalidInput: The name is unusable or taken, or there are too many models.
    """
    terms = terms or Terms()
    with database.write() as session:
        request = _open_request(session.get(AccessRequest, request_id), request_id)
        project = accounts.add_project(session, account or request.organization)
        _, key = accounts.add_key(session, project.id, "first key")
        request.status, request.decided_at, request.note = "approved", now(), note
        request.project_id = project.id
        if terms.rates:
            limits.put_rate(session, project.id, base_model, defaults or Limits(), terms.rates)
        if terms.spend_limit_cents is not None:
            limits.put_spend_limit(session, project.id, terms.spend_limit_cents)
        if terms.models is not None:
            model_access.put(session, project.id, "allow_list", terms.models)
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

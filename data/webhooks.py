"""Webhooks: where accounts want to be told of events, and the outbox of what they are told.

An event is put into the outbox by the transaction that makes it true, so none is lost and none is
invented. Deliveries are signed as standardwebhooks.com specifies, which is what the official client
verifies: HMAC-SHA256 over `id.timestamp.body` by the secret after `whsec_`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import InvalidInput, NotFound
from data.tables import new_id, now
from data.tables_jobs import WebhookDelivery, WebhookEndpoint
from data.web_address import refuse_private

EVENT_TYPES = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "safety.warning_issued",
    "safety.deactivation_issued",
    "safety_identifier.blocked",
    "spend_alert.reached",
    "label_project.completed",
    "label_round.promoted",
    "label_round.rejected",
    "label_round.failed",
    "label_round.cancelled",
)
MAX_ENDPOINTS = 20
MAX_URL, MAX_NAME = 2048, 256
ROTATION_S = 24 * 3600
KEPT_S = 30 * 24 * 3600  # deliveries that are settled


def create(
    database: Database,
    project_id: str,
    name: str,
    url: str,
    event_types: Sequence[str],
    *,
    allow_private: bool = False,
) -> WebhookEndpoint:
    """Add an endpoint; its secret can be told once.

    Raises:
        InvalidInput: The URL, name or an event type cannot be used, or there are too many.
    """
    endpoint = WebhookEndpoint(
        id=new_id("whe_"),
        project_id=project_id,
        name=_checked_name(name),
        url=_checked_url(url, allow_private),
        event_types=_checked_types(event_types),
        secret=_new_secret(),
    )
    with database.write() as session:
        count = select(func.count()).where(WebhookEndpoint.project_id == project_id)
        if (session.scalar(count) or 0) >= MAX_ENDPOINTS:
            raise InvalidInput(
                f"There are {MAX_ENDPOINTS} webhook endpoints already, the most an account may "
                "have; delete one first."
            )
        session.add(endpoint)
    return endpoint


def get(database: Database, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Return an endpoint.

    Raises:
        NotFound: There is none, or it is another account's.
    """
    with database.read() as session:
        return _find(session, project_id, endpoint_id)


def list_endpoints(
    database: Database, project_id: str, limit: int = 20, after: str | None = None
) -> tuple[list[WebhookEndpoint], bool]:
    """Return a page of endpoints, newest first, and whether more follow."""
    query = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    with database.read() as session:
        order = (WebhookEndpoint.created_at.desc(), WebhookEndpoint.id.desc())
        found = list(session.scalars(query.order_by(*order)))
    return _page(found, limit, after)


def update(
    database: Database,
    project_id: str,
    endpoint_id: str,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    allow_private: bool = False,
) -> WebhookEndpoint:
    """Change what is given of an endpoint.

    Raises:
        NotFound: There is no such endpoint.
        InvalidInput: A new value cannot be used.
    """
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = _checked_name(name)
    if url is not None:
        changes["url"] = _checked_url(url, allow_private)
    if event_types is not None:
        changes["event_types"] = _checked_types(event_types)
    with database.write() as session:
        endpoint = _find(session, project_id, endpoint_id)
        if any(getattr(endpoint, key) != value for key, value in changes.items()):
            endpoint.updated_at = now()
        for key, value in changes.items():
            setattr(endpoint, key, value)
    return endpoint


def rotate_secret(
    database: Database, project_id: str, endpoint_id: str, keep_old: bool
) -> WebhookEndpoint:
    """Replace an endpoint's secret; with `keep_old` the former signs too for another day."""
    with database.write() as session:
        endpoint = _find(session, project_id, endpoint_id)
        endpoint.old_secret = endpoint.secret if keep_old else None
        endpoint.old_secret_until = now() + ROTATION_S if keep_old else None
        endpoint.secret = _new_secret()
        endpoint.updated_at = now()
    return endpoint


def remove(database: Database, project_id: str, endpoint_id: str) -> None:
    """Delete an endpoint with its deliveries, also those that wait.

    Raises:
        NotFound: There is no such endpoint.
    """
    with database.write() as session:
        endpoint = _find(session, project_id, endpoint_id)
        session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
        session.delete(endpoint)


def enqueue(
    session: Session, project_id: str, event_type: str, created_at: int, data: Mapping[str, Any]
) -> None:
    """Put an event into the outbox of every endpoint that wants it, inside a transaction."""
    event_id = new_id("evt_")
    body = event_body(event_id, event_type, created_at, data)
    wanting = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    for endpoint in session.scalars(wanting).all():
        if event_type in endpoint.event_types:
            session.add(
                WebhookDelivery(
                    id=new_id("whd_"),
                    endpoint_id=endpoint.id,
                    event_id=event_id,
                    event_type=event_type,
                    body=body,
                    due_at=time.time(),
                )
            )


def event_body(event_id: str, event_type: str, created_at: int, data: Mapping[str, Any]) -> str:
    """Return an event as it is sent."""
    event = {
        "object": "event",
        "id": event_id,
        "type": event_type,
        "created_at": created_at,
        "data": dict(data),
    }
    return json.dumps(event, separators=(",", ":"))


def headers_of(endpoint: WebhookEndpoint, event_id: str, body: str) -> dict[str, str]:
    """Return the headers by which the receiver knows that a body is ours and fresh."""
    timestamp = now()
    keys = [endpoint.secret]
    if endpoint.old_secret and (endpoint.old_secret_until or 0) > timestamp:
        keys.append(endpoint.old_secret)
    signed = f"{event_id}.{timestamp}.{body}".encode()
    return {
        "content-type": "application/json",
        "user-agent": "hone-webhooks",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{_sign(key, signed)}" for key in keys),
    }


def claim_due(
    database: Database,
    limit: int,
    lease_s: float,
    per_account: int,
    under_way: Mapping[str, int],
) -> list[tuple[WebhookDelivery, WebhookEndpoint]]:
    """Take deliveries that are due, of each account the longest due first, in turns.

    Nobody else gets them for `lease_s` seconds.

    Args:
        per_account: The most of one account at a time.
        under_way: How many of each account the caller delivers already.
    """
    full = [account for account, count in under_way.items() if count >= per_account]
    due = (WebhookDelivery.status == "pending", WebhookDelivery.due_at <= time.time())
    place = func.row_number().over(
        partition_by=WebhookEndpoint.project_id, order_by=WebhookDelivery.due_at
    )
    ranked = (
        select(
            WebhookDelivery.id,
            WebhookEndpoint.project_id,
            WebhookDelivery.due_at,
            place.label("place"),
        )
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(*due, WebhookEndpoint.project_id.not_in(full))
        .subquery()
    )
    query = select(ranked.c.id, ranked.c.project_id).where(ranked.c.place <= per_account)
    query = query.order_by(ranked.c.place, ranked.c.due_at)
    held, chosen = Counter(under_way), list[str]()
    with database.read() as session:  # an idle server takes no write lock
        for delivery_id, account in session.execute(query.limit(limit + held.total())):
            if held[account] < per_account and len(chosen) < limit:
                held[account] += 1
                chosen.append(delivery_id)
    if not chosen:
        return []
    with database.write() as session:
        rows = session.execute(
            select(WebhookDelivery, WebhookEndpoint)
            .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
            .where(*due, WebhookDelivery.id.in_(chosen))
            .with_for_update(skip_locked=True, of=WebhookDelivery)
        ).all()
        for delivery, _ in rows:
            delivery.due_at = time.time() + lease_s
        return [(row[0], row[1]) for row in rows]


def sweep(database: Database) -> None:
    """Remove deliveries that arrived or were given up a month ago."""
    with database.write() as session:
        session.execute(
            delete(WebhookDelivery).where(
                WebhookDelivery.status != "pending",
                WebhookDelivery.created_at < now() - KEPT_S,
            )
        )


def settle(
    database: Database,
    delivery_id: str,
    status_code: int | None,
    error: str | None,
    retry_after_s: float | None,
) -> None:
    """Note what came of an attempt.

    Args:
        error: None when the delivery arrived.
        retry_after_s: When to try again; None gives up.
    """
    with database.write() as session:
        delivery = session.get(WebhookDelivery, delivery_id)
        if delivery is None:  # the endpoint was deleted meanwhile
            return
        delivery.attempts += 1
        delivery.status_code, delivery.error = status_code, error
        if error is None:
            delivery.status, delivery.delivered_at = "delivered", now()
        elif retry_after_s is None:
            delivery.status = "failed"
        else:
            delivery.due_at = time.time() + retry_after_s


def list_deliveries(
    database: Database,
    project_id: str,
    endpoint_id: str,
    limit: int = 20,
    after: str | None = None,
) -> tuple[list[WebhookDelivery], bool]:
    """Return a page of an endpoint's deliveries, newest first, and whether more follow."""
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    with database.read() as session:
        _find(session, project_id, endpoint_id)
        if after is not None:
            mark = session.scalar(query.where(WebhookDelivery.id == after))
            if mark is None:
                raise InvalidInput(f"Invalid 'after': no delivery {after}", param="after")
            tied = (WebhookDelivery.created_at == mark.created_at) & (WebhookDelivery.id < mark.id)
            query = query.where(or_(WebhookDelivery.created_at < mark.created_at, tied))
        order = (WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc())
        found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    return found[:limit], len(found) > limit


def _page(
    found: list[WebhookEndpoint], limit: int, after: str | None
) -> tuple[list[WebhookEndpoint], bool]:
    ids = [endpoint.id for endpoint in found]
    if after is not None:
        if after not in ids:
            raise InvalidInput(f"Invalid 'after': no webhook endpoint {after}", param="after")
        found = found[ids.index(after) + 1 :]
    return found[:limit], len(found) > limit


def _find(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    endpoint = session.get(WebhookEndpoint, endpoint_id)
    if endpoint is None or endpoint.project_id != project_id:
        raise NotFound(f"No such WebhookEndpoint object: {endpoint_id}", param="id")
    return endpoint


def _checked_name(name: str) -> str:
    if not name.strip() or len(name) > MAX_NAME:
        raise InvalidInput(
            f"Invalid 'name': give 1 to {MAX_NAME} characters, but got {len(name)}.", param="name"
        )
    return name.strip()


def _checked_url(url: str, allow_private: bool) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")  # as the look-up of the name does it
    except ValueError as error:
        raise InvalidInput(f"Invalid 'url': {error}.", param="url") from error
    schemes = ("https", "http") if allow_private else ("https",)
    if parts.scheme not in schemes or not host or len(url) > MAX_URL or not url.isascii():
        raise InvalidInput(
            f"Invalid 'url': expected an {' or '.join(schemes)} URL of at most {MAX_URL} ASCII "
            "characters.",
            param="url",
        )
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise InvalidInput(
            "Invalid 'url': leave out user, password and fragment; deliveries are signed instead.",
            param="url",
        )
    if not allow_private:
        refuse_private(host)
    return url


def _checked_types(event_types: Sequence[str]) -> list[str]:
    for index, event_type in enumerate(event_types):
        if event_type not in EVENT_TYPES:
            raise InvalidInput(
                f"Invalid value: '{event_type}'. Supported values are: "
                f"{', '.join(map(repr, EVENT_TYPES))}.",
                param=f"event_types[{index}]",
            )
    if not event_types:
        raise InvalidInput("Invalid 'event_types': name at least one.", param="event_types")
    return sorted(set(event_types))


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _sign(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()

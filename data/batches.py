"""Batches: requests from a file, answered in the background, within a day.

A server claims a batch under a lease, so that another takes over when it dies; of an account, one
batch is worked on at a time. States lead from
`validating` over `in_progress` and `finalizing` to `completed`, or to `failed`, `expired` and,
over `cancelling`, to `cancelled`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session, aliased

from data import webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.files import LIVE_BATCHES
from data.stored_chats import check_metadata
from data.tables import File, Project, new_id, now
from data.tables_surface import Batch

WINDOW = "24h"
WINDOW_S = 24 * 3600
MAX_LINES = 50_000
MAX_BYTES = 200 * 2**20  # of an input file
MAX_ERRORS = 100


def create(
    database: Database,
    project_id: str,
    key_id: str,
    *,
    endpoint: str,
    endpoints: Sequence[str],
    input_file_id: str,
    completion_window: str,
    metadata: Mapping[str, str] | None,
) -> Batch:
    """Queue a batch.

    Raises:
        InvalidInput: The endpoint or window is none of those served, or the file is absent or has
            another purpose.
    """
    if endpoint not in endpoints:
        raise InvalidInput(
            f"Invalid 'endpoint': '{endpoint}'. Supported values are: "
            f"{', '.join(map(repr, endpoints))}.",
            param="endpoint",
        )
    if completion_window != WINDOW:
        raise InvalidInput(
            f"Invalid 'completion_window': '{completion_window}'. Supported values are: "
            f"'{WINDOW}'.",
            param="completion_window",
        )
    checked = None if metadata is None else check_metadata(metadata)
    with database.write() as session:
        file = session.get(File, input_file_id)
        if file is None or file.project_id != project_id or file.deleted_at is not None:
            raise InvalidInput(f"No such File object: {input_file_id}", param="input_file_id")
        if file.purpose != "batch":
            raise InvalidInput(
                f"Invalid 'input_file_id': the file's purpose is '{file.purpose}', not 'batch'.",
                param="input_file_id",
            )
        if file.bytes > MAX_BYTES:
            raise InvalidInput(
                f"Invalid 'input_file_id': the file has {file.bytes} bytes; a batch takes at most "
                f"{MAX_BYTES}. Split it.",
                param="input_file_id",
            )
        batch = Batch(
            id=new_id("batch_"),
            project_id=project_id,
            key_id=key_id,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            errors=[],
            metadata_=checked,
            times={},
            expires_at=now() + WINDOW_S,
        )
        session.add(batch)
    return batch


def get(database: Database, project_id: str, batch_id: str) -> Batch:
    """Return a batch; raises NotFound."""
    with database.read() as session:
        return _find(session, project_id, batch_id)


def list_batches(
    database: Database, project_id: str, limit: int, after: str | None
) -> tuple[Sequence[Batch], bool]:
    """Return a page, newest first, and whether more follow.

    Raises:
        InvalidInput: `after` names none of this account.
    """
    query = select(Batch).where(Batch.project_id == project_id)
    with database.read() as session:
        if after is not None:
            mark = session.get(Batch, after)
            if mark is None or mark.project_id != project_id:
                raise InvalidInput(f"Invalid 'after': no batch {after}", param="after")
            tied = (Batch.created_at == mark.created_at) & (Batch.id < mark.id)
            query = query.where(or_(Batch.created_at < mark.created_at, tied))
        order = (Batch.created_at.desc(), Batch.id.desc())
        found = session.scalars(query.order_by(*order).limit(limit + 1)).all()
    return found[:limit], len(found) > limit


def cancel(database: Database, project_id: str, batch_id: str) -> Batch:
    """Stop a batch; what was answered is kept.

    Raises:
        NotFound: There is no such batch.
        StateConflict: It has ended, or is being cancelled.
    """
    with database.write() as session:
        batch = _find(session, project_id, batch_id)
        if batch.status not in ("validating", "in_progress"):
            raise StateConflict(f"The batch {batch_id} is {batch.status}.", param="id")
        _move(batch, "cancelling")
    return batch


def claim(database: Database, worker_id: str, lease_s: int) -> Batch | None:
    """Take a batch of an account for which no server works, or None.

    Accounts take turns: first comes the one whose last turn ended longest ago, or that had none,
    with its oldest batch. One that is only to be ended waits for no other batch of its account.
    """
    with database.read() as session:
        if session.scalar(_waiting().limit(1)) is None:
            return None
    others = aliased(Batch)
    last_turn = select(func.coalesce(func.max(others.lease_expires_at), 0)).where(
        others.project_id == Batch.project_id
    )
    order = (last_turn.scalar_subquery(), Batch.created_at, Batch.id)
    with database.write() as session:
        query = _waiting().order_by(*order).limit(1)
        batch = session.scalar(query.with_for_update(skip_locked=True, of=Batch))
        if batch is not None:
            batch.worker_id, batch.lease_expires_at = worker_id, now() + lease_s
        return batch


def is_waiting(database: Database) -> bool:
    """Tell whether a claim would find a batch."""
    with database.read() as session:
        return session.scalar(_waiting().limit(1)) is not None


def _waiting() -> Select[Batch]:
    closed = select(Project.id).where(Project.status != "active")
    held = Batch.worker_id.is_not(None) & (Batch.lease_expires_at >= now())
    served = select(Batch.project_id).where(held)
    to_end = or_(Batch.status == "cancelling", Batch.expires_at <= now())
    return select(Batch).where(
        Batch.status.in_(LIVE_BATCHES),
        ~held,
        Batch.project_id.not_in(closed),
        or_(Batch.project_id.not_in(served), to_end),
    )


def release(database: Database, batch_id: str, worker_id: str) -> None:
    """Let go of a batch that another may go on with."""
    with database.write() as session:
        batch = session.get_one(Batch, batch_id)
        if batch.worker_id == worker_id:
            _let_go(batch)


def progress(
    database: Database, batch_id: str, worker_id: str, lease_s: int, **values: Any
) -> Batch | None:
    """Renew the lease and write what has changed.

    `status` moves the batch, unless it is being cancelled and the new state is not an ending;
    `files` are rows to add.

    Returns:
        None if the batch is another's by now, or its account is not served.
    """
    with database.write() as session:
        batch = session.get_one(Batch, batch_id)
        if batch.worker_id != worker_id or batch.status not in LIVE_BATCHES:
            return None
        if session.get_one(Project, batch.project_id).status != "active":
            return None
        session.add_all(values.pop("files", ()))
        batch.lease_expires_at = now() + lease_s
        status = values.pop("status", None)
        for name, value in values.items():
            setattr(batch, name, value)
        if status is not None and (batch.status != "cancelling" or status not in LIVE_BATCHES):
            _move(batch, status)
            if status not in LIVE_BATCHES:
                _let_go(batch)
                told = {"id": batch.id}
                webhooks.enqueue(session, batch.project_id, f"batch.{status}", now(), told)
        return batch


def read_requests(
    stream: BinaryIO, endpoint: str
) -> tuple[list[tuple[str, dict[str, Any]]], list[dict[str, Any]]]:
    """Read the lines of an input file.

    Returns:
        (custom id, body) of each line, and what is wrong: line, code, message, param.
    """
    requests: list[tuple[str, dict[str, Any]]] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        fault = _fault(line, endpoint, seen)
        if fault is not None:
            errors.append(
                {"line": number, "code": fault[0], "param": fault[1], "message": fault[2]}
            )
            continue
        row = json.loads(line)
        seen.add(row["custom_id"])
        requests.append((row["custom_id"], row["body"]))
        if len(requests) > MAX_LINES:
            break
    if not requests and not errors:
        errors.append(_whole("empty_file", "The file holds no requests."))
    if len(requests) > MAX_LINES:
        errors.append(
            _whole("too_many_requests", f"The file holds more than {MAX_LINES} requests.")
        )
    return requests, errors[:MAX_ERRORS]


def _fault(line: bytes, endpoint: str, seen: set[str]) -> tuple[str, str | None, str] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "invalid_json_line", None, "This line is not valid JSON."
    if not isinstance(row, dict):
        return "invalid_json_line", None, "This line is not a JSON object."
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return "missing_required_parameter", "custom_id", "'custom_id' must be a string."
    if custom_id in seen:
        return "duplicate_custom_id", "custom_id", f"'{custom_id[:80]}' was used before."
    if row.get("method") != "POST":
        return "invalid_method", "method", "'method' must be 'POST'."
    if row.get("url") != endpoint:
        return "mismatched_endpoint", "url", f"'url' must be the batch's endpoint, '{endpoint}'."
    if not isinstance(row.get("body"), dict):
        return "missing_required_parameter", "body", "'body' must be an object."
    return None


def _whole(code: str, message: str) -> dict[str, Any]:
    return {"line": None, "code": code, "param": "input_file_id", "message": message}


def _let_go(batch: Batch) -> None:
    batch.worker_id, batch.lease_expires_at = None, now()  # when the account's turn ended


def _move(batch: Batch, status: str) -> None:
    batch.status = status
    batch.times = {**batch.times, f"{status}_at": now()}


def _find(session: Session, project_id: str, batch_id: str) -> Batch:
    batch = session.get(Batch, batch_id)
    if batch is None or batch.project_id != project_id:
        raise NotFound(f"No such Batch object: {batch_id}", param="id")
    return batch

"""`/v1/api_keys`: the keys of the account that calls, for its owners."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import accounts, projects, roles
from data.tables import ApiKey, now
from serve.api.deps import Caller, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import Lifetime, QueryModel, RequestModel

MAX_LIMIT = 100
MAX_NAME = 64

router = APIRouter(prefix="/v1/api_keys", route_class=StrictJsonRoute)


class CreateKey(RequestModel):
    """A key and what it may do."""

    name: str = Field("", max_length=MAX_NAME)
    role: str = "member"
    expires_in_seconds: Lifetime | None = None


class ListKeys(QueryModel):
    """Which part of the list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


@router.post("")
async def create_key(body: CreateKey, caller: Caller, runtime: Running) -> Response:
    """Make a key, shown here and never again."""
    role = roles.check_name(body.role)
    expires_at = None if body.expires_in_seconds is None else now() + body.expires_in_seconds
    record, key = await run_in_threadpool(
        lambda: accounts.create_key(
            runtime.database, caller.id, body.name, expires_at=expires_at, role=role
        )
    )
    return json_response(_describe(record) | {"value": key})


@router.get("")
async def list_keys(
    query: Annotated[ListKeys, Query()], caller: Caller, runtime: Running
) -> Response:
    """List the account's working keys, never in full."""
    found, has_more = await run_in_threadpool(
        projects.list_keys, runtime.database, caller.id, query.limit, query.after
    )
    return page([_describe(record) for record in found], has_more)


@router.delete("/{api_key_id}")
async def delete_key(api_key_id: str, caller: Caller, runtime: Running) -> Response:
    """Make a key useless from the next request on."""
    await run_in_threadpool(projects.revoke_key, runtime.database, caller.id, api_key_id)
    return json_response({"id": api_key_id, "object": "api_key.deleted", "deleted": True})


def _describe(record: ApiKey) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "api_key",
        "name": record.name,
        "role": record.role,
        "redacted_value": record.redacted,
        "created_at": record.created_at,
        "last_used_at": record.last_used_at,
        "expires_at": record.expires_at,
    }

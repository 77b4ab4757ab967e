"""`/v1/fine_tuning/checkpoints/{model}/permissions`: one version for another account.

For the key of the owner, and for admin keys: the official clients differ in which they send.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import permissions
from data.tables_jobs import CheckpointPermission
from serve.api.deps import AnyKey, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel

PATH = "/{model:path}/permissions"

router = APIRouter(prefix="/v1/fine_tuning/checkpoints", route_class=StrictJsonRoute)


class GrantRequest(RequestModel):
    """Which accounts may use the version."""

    project_ids: list[str]


class ListPermissions(QueryModel):
    """Which permissions to list."""

    limit: int = Field(10, ge=1, le=100)
    order: Literal["ascending", "descending"] = "descending"
    project_id: str | None = None


@router.post(PATH)
async def create_permissions(
    model: str, body: GrantRequest, key: AnyKey, runtime: Running
) -> Response:
    """Share a version."""
    granted = await run_in_threadpool(
        permissions.grant, runtime.database, key.project_id, model, body.project_ids
    )
    return page([_describe(permission) for permission in granted], has_more=False)


@router.get(PATH)
async def list_permissions(
    model: str, query: Annotated[ListPermissions, Query()], key: AnyKey, runtime: Running
) -> Response:
    """List with whom a version is shared."""
    found, has_more = await run_in_threadpool(
        lambda: permissions.list_permissions(
            runtime.database, key.project_id, model, **query.model_dump()
        )
    )
    return page([_describe(permission) for permission in found], has_more)


@router.delete(PATH + "/{permission_id}")
async def delete_permission(
    model: str, permission_id: str, key: AnyKey, runtime: Running
) -> Response:
    """Stop sharing a version with one account."""
    await run_in_threadpool(
        permissions.revoke, runtime.database, key.project_id, model, permission_id
    )
    return json_response({"id": permission_id, "object": "checkpoint.permission", "deleted": True})


def _describe(permission: CheckpointPermission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project_id,
    }

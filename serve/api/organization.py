"""`/v1/organization`: accounts, their programs and keys, operators' keys. For admin keys alone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import accounts, projects, roles
from data.tables import ApiKey, Project, now
from data.tables_accounts import ServiceAccount
from serve.api.deps import Operator, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import Lifetime, QueryModel, RequestModel

MAX_LIMIT = 100
OPERATOR = {"type": "service_account", "object": "organization.service_account", "role": "owner"}

router = APIRouter(prefix="/v1/organization", route_class=StrictJsonRoute)


class NamedRequest(RequestModel):
    """What is made or renamed."""

    name: str


class CreateServiceAccount(RequestModel):
    """A program, with a key unless told otherwise."""

    name: str
    role: str = "member"
    create_service_account_only: bool = False
    expires_in_seconds: Lifetime | None = None


class UpdateServiceAccount(RequestModel):
    """What to change of a program."""

    name: str | None = None
    role: str | None = None


class CreateAdminKey(RequestModel):
    """A key of an operator."""

    name: str
    expires_in_seconds: Lifetime | None = None


class ListPage(QueryModel):
    """Which part of a list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


class ListProjects(ListPage):
    """Which accounts."""

    include_archived: bool = False


Page = Annotated[ListPage, Query()]


@router.post("/projects")
async def create_project(body: NamedRequest, _key: Operator, runtime: Running) -> Response:
    """Make an account; its keys are those of its service accounts."""
    return json_response(
        _project(await run_in_threadpool(projects.create, runtime.database, body.name))
    )


@router.get("/projects")
async def list_projects(
    query: Annotated[ListProjects, Query()], _key: Operator, runtime: Running
) -> Response:
    """List the accounts, oldest first."""
    found, has_more = await run_in_threadpool(
        projects.list_projects,
        *(runtime.database, query.limit, query.after, query.include_archived),
    )
    return page([_project(project) for project in found], has_more)


@router.get("/projects/{project_id}")
async def retrieve_project(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Describe an account."""
    return json_response(
        _project(await run_in_threadpool(projects.get, runtime.database, project_id))
    )


@router.post("/projects/{project_id}")
async def update_project(
    project_id: str, body: NamedRequest, _key: Operator, runtime: Running
) -> Response:
    """Rename an account."""
    project = await run_in_threadpool(projects.rename, runtime.database, project_id, body.name)
    return json_response(_project(project))


@router.post("/projects/{project_id}/archive")
async def archive_project(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Close an account for good."""
    return json_response(
        _project(await run_in_threadpool(projects.archive, runtime.database, project_id))
    )


@router.post("/projects/{project_id}/service_accounts")
async def create_service_account(
    project_id: str, body: CreateServiceAccount, _key: Operator, runtime: Running
) -> Response:
    """Make a program of an account; its key is shown here and never again."""
    role = roles.check_name(body.role)
    program, record, key = await run_in_threadpool(
        lambda: projects.create_service_account(
            runtime.database,
            project_id,
            body.name,
            with_key=not body.create_service_account_only,
            expires_at=_expiry(body.expires_in_seconds),
            role=role,
        )
    )
    shown = None
    if record is not None:
        shown = {
            "id": record.id,
            "object": "organization.project.service_account.api_key",
            "name": record.name,
            "value": key,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
        }
    return json_response(_service_account(program) | {"api_key": shown})


@router.get("/projects/{project_id}/service_accounts")
async def list_service_accounts(
    project_id: str, query: Page, _key: Operator, runtime: Running
) -> Response:
    """List an account's programs."""
    found, has_more = await run_in_threadpool(
        projects.list_service_accounts, runtime.database, project_id, query.limit, query.after
    )
    return page([_service_account(program) for program in found], has_more)


@router.get("/projects/{project_id}/service_accounts/{service_account_id}")
async def retrieve_service_account(
    project_id: str, service_account_id: str, _key: Operator, runtime: Running
) -> Response:
    """Describe a program."""
    found = await run_in_threadpool(
        projects.find_service_account, runtime.database, project_id, service_account_id
    )
    return json_response(_service_account(found))


@router.post("/projects/{project_id}/service_accounts/{service_account_id}")
async def update_service_account(
    project_id: str,
    service_account_id: str,
    body: UpdateServiceAccount,
    _key: Operator,
    runtime: Running,
) -> Response:
    """Rename a program, or give it and its keys another role."""
    role = None if body.role is None else roles.check_name(body.role)
    program = await run_in_threadpool(
        lambda: projects.update_service_account(
            runtime.database, project_id, service_account_id, name=body.name, role=role
        )
    )
    return json_response(_service_account(program))


@router.delete("/projects/{project_id}/service_accounts/{service_account_id}")
async def delete_service_account(
    project_id: str, service_account_id: str, _key: Operator, runtime: Running
) -> Response:
    """Remove a program and its keys."""
    await run_in_threadpool(
        projects.delete_service_account, runtime.database, project_id, service_account_id
    )
    kind = "organization.project.service_account.deleted"
    return json_response({"id": service_account_id, "object": kind, "deleted": True})


@router.get("/projects/{project_id}/api_keys")
async def list_api_keys(project_id: str, query: Page, _key: Operator, runtime: Running) -> Response:
    """List an account's working keys, never in full."""
    found, has_more = await run_in_threadpool(
        projects.list_keys, runtime.database, project_id, query.limit, query.after
    )
    return page([_api_key(record) for record in found], has_more)


@router.get("/projects/{project_id}/api_keys/{api_key_id}")
async def retrieve_api_key(
    project_id: str, api_key_id: str, _key: Operator, runtime: Running
) -> Response:
    """Describe a key."""
    found = await run_in_threadpool(projects.find_key, runtime.database, project_id, api_key_id)
    return json_response(_api_key(found))


@router.delete("/projects/{project_id}/api_keys/{api_key_id}")
async def delete_api_key(
    project_id: str, api_key_id: str, _key: Operator, runtime: Running
) -> Response:
    """Make a key useless from the next request on."""
    await run_in_threadpool(projects.revoke_key, runtime.database, project_id, api_key_id)
    kind = "organization.project.api_key.deleted"
    return json_response({"id": api_key_id, "object": kind, "deleted": True})


@router.post("/admin_api_keys")
async def create_admin_key(body: CreateAdminKey, _key: Operator, runtime: Running) -> Response:
    """Make a key for an operator, shown here and never again."""
    record, key = await run_in_threadpool(
        lambda: accounts.create_admin_key(
            runtime.database, body.name, expires_at=_expiry(body.expires_in_seconds)
        )
    )
    return json_response(_admin_key(record) | {"value": key})


@router.get("/admin_api_keys")
async def list_admin_keys(query: Page, _key: Operator, runtime: Running) -> Response:
    """List the operators' working keys, never in full."""
    found, has_more = await run_in_threadpool(
        projects.list_keys, runtime.database, None, query.limit, query.after
    )
    return page([_admin_key(record) for record in found], has_more)


@router.get("/admin_api_keys/{key_id}")
async def retrieve_admin_key(key_id: str, _key: Operator, runtime: Running) -> Response:
    """Describe an operator's key."""
    found = await run_in_threadpool(projects.find_key, runtime.database, None, key_id)
    return json_response(_admin_key(found))


@router.delete("/admin_api_keys/{key_id}")
async def delete_admin_key(key_id: str, _key: Operator, runtime: Running) -> Response:
    """Make an operator's key useless from the next request on."""
    await run_in_threadpool(projects.revoke_key, runtime.database, None, key_id)
    return json_response(
        {"id": key_id, "object": "organization.admin_api_key.deleted", "deleted": True}
    )


def _expiry(seconds: int | None) -> int | None:
    return None if seconds is None else now() + seconds


def _project(project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "object": "organization.project",
        "name": project.name,
        "created_at": project.created_at,
        "archived_at": project.archived_at,
        "status": project.status,
        "slug": project.slug,
    }


def _service_account(program: ServiceAccount) -> dict[str, Any]:
    return {
        "id": program.id,
        "object": "organization.project.service_account",
        "name": program.name,
        "role": program.role,
        "created_at": program.created_at,
    }


def _api_key(record: ApiKey) -> dict[str, Any]:
    owner = {
        "id": record.service_account_id or record.id,
        "name": record.name,
        "role": record.role,
        "created_at": record.created_at,
    }
    return {
        "id": record.id,
        "object": "organization.project.api_key",
        "name": record.name,
        "redacted_value": record.redacted,
        "created_at": record.created_at,
        "last_used_at": record.last_used_at,
        "expires_at": record.expires_at,
        "owner": {"type": "service_account", "service_account": owner, "user": None},
        "owner_project_access": "active",
    }


def _admin_key(record: ApiKey) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "organization.admin_api_key",
        "name": record.name,
        "redacted_value": record.redacted,
        "created_at": record.created_at,
        "last_used_at": record.last_used_at,
        "expires_at": record.expires_at,
        "owner": OPERATOR | {"id": record.id, "name": record.name},
    }

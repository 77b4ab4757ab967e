"""What operators do about accounts: warn, suspend, reinstate, limit models, read the audit log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import audit, model_access, safety
from data.errors import InvalidInput
from data.tables_accounts import AuditEntry, ModelPermission, SafetyCase
from serve.api.deps import AnyKey, Caller, Operator, Running, json_response, page
from serve.api.errors import unknown_parameter
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel
from serve.closed_accounts import look

MAX_LIMIT = 100
LISTS = ("event_types", "project_ids", "actor_ids", "actor_emails", "resource_ids")
TIMES = ("effective_at[gt]", "effective_at[gte]", "effective_at[lt]", "effective_at[lte]")

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class CaseRequest(RequestModel):
    """Why; the account reads it."""

    reason: str


class AppealRequest(RequestModel):
    """An appeal to a case, or the answer to it."""

    message: str


class PermissionsRequest(RequestModel):
    """The models that an account may, or may not, use."""

    mode: Literal["allow_list", "deny_list"]
    model_ids: list[str]


class ListCases(QueryModel):
    """Which part of the list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    waiting: bool = False


class ListAudit(QueryModel):
    """Which part of the log; filters are read apart."""

    model_config = ConfigDict(extra="ignore")

    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    before: str | None = None


@router.post("/organization/projects/{project_id}/warn")
async def warn(project_id: str, body: CaseRequest, _key: Operator, runtime: Running) -> Response:
    """Open a case that changes nothing."""
    case = await run_in_threadpool(safety.warn, runtime.database, project_id, body.reason)
    return json_response(_case(case))


@router.post("/organization/projects/{project_id}/suspend")
async def suspend(project_id: str, body: CaseRequest, _key: Operator, runtime: Running) -> Response:
    """Stop an account: its calls, streams, jobs and adapters."""
    case = await run_in_threadpool(safety.suspend, runtime.database, project_id, body.reason)
    await look(runtime)
    return json_response(_case(case))


@router.post("/organization/projects/{project_id}/reinstate")
async def reinstate(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Let a suspended account go on."""
    project = await run_in_threadpool(safety.reinstate, runtime.database, project_id)
    await look(runtime)
    return json_response(
        {"id": project.id, "object": "organization.project", "status": project.status}
    )


@router.get("/safety/cases/{case_id}")
async def retrieve_case(case_id: str, key: AnyKey, runtime: Running) -> Response:
    """Show a case to the account that it is about, or to an operator."""
    case = await run_in_threadpool(safety.find_case, runtime.database, key.project_id, case_id)
    return json_response(_case(case))


@router.post("/safety/cases/{case_id}/appeal")
async def appeal(case_id: str, body: AppealRequest, caller: Caller, runtime: Running) -> Response:
    """Ask the operator to look at a case again; open to suspended accounts too."""
    case = await run_in_threadpool(
        safety.appeal, runtime.database, caller.id, case_id, body.message
    )
    return json_response(_case(case))


@router.get("/organization/safety_cases")
async def list_cases(
    query: Annotated[ListCases, Query()], _key: Operator, runtime: Running
) -> Response:
    """List cases of all accounts, newest first."""
    found, has_more = await run_in_threadpool(
        safety.list_cases, runtime.database, query.waiting, query.limit, query.after
    )
    return page([_case(case) for case in found], has_more)


@router.post("/organization/safety_cases/{case_id}/answer")
async def answer_appeal(
    case_id: str, body: AppealRequest, _key: Operator, runtime: Running
) -> Response:
    """Answer an appeal; to reinstate the account is a call of its own."""
    case = await run_in_threadpool(safety.answer_appeal, runtime.database, case_id, body.message)
    return json_response(_case(case))


@router.get("/organization/projects/{project_id}/model_permissions")
async def get_model_permissions(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Return which models an account may use."""
    row = await run_in_threadpool(model_access.get, runtime.database, project_id)
    return json_response(_permissions(row))


@router.post("/organization/projects/{project_id}/model_permissions")
async def set_model_permissions(
    project_id: str, body: PermissionsRequest, _key: Operator, runtime: Running
) -> Response:
    """Set which models an account may use; it holds from the next request on."""
    row = await run_in_threadpool(
        model_access.replace, runtime.database, project_id, body.mode, body.model_ids
    )
    return json_response(_permissions(row))


@router.delete("/organization/projects/{project_id}/model_permissions")
async def delete_model_permissions(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Let an account use every model again."""
    await run_in_threadpool(model_access.clear, runtime.database, project_id)
    return json_response({"object": "project.model_permissions.deleted", "deleted": True})


@router.get("/organization/audit_logs")
async def list_audit_logs(
    query: Annotated[ListAudit, Query()], request: Request, _key: Operator, runtime: Running
) -> Response:
    """List what was changed, by whom, newest first."""
    found, has_more = await run_in_threadpool(
        audit.entries,
        runtime.database,
        _filter(request),
        query.limit,
        query.after,
        query.before,
    )
    return page([_entry(entry) for entry in found], has_more)


def _filter(request: Request) -> audit.Filter:
    """Read the filters: lists as `name[]=a&name[]=b` or `name=a`, times as `effective_at[gte]`."""
    params = request.query_params
    known = {*LISTS, *(f"{name}[]" for name in LISTS), *TIMES, *ListAudit.model_fields}
    for name in params:
        if name not in known:
            raise unknown_parameter(name, sorted(known))
    lists: dict[str, Any] = {
        name: tuple(params.getlist(f"{name}[]") + params.getlist(name)) for name in LISTS
    }
    gt, gte, lt, lte = (_time(params.get(name), name) for name in TIMES)
    lower = [t for t in (None if gt is None else gt + 1, gte) if t is not None]
    upper = [t for t in (None if lt is None else lt - 1, lte) if t is not None]
    return audit.Filter(
        **lists, at_least=max(lower, default=None), at_most=min(upper, default=None)
    )


def _time(value: str | None, name: str) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise InvalidInput(
            f"Invalid '{name}': expected unix seconds, but got '{value[:40]}'.", param=name
        )
    return int(value)


def _case(case: SafetyCase) -> dict[str, Any]:
    return {
        "id": case.id,
        "object": "safety.case",
        "created_at": case.created_at,
        "closed_at": case.closed_at,
        "entity_identifier": case.project_id,
        "notice": {"type": case.notice},
        "reason": case.reason,
        "paused_jobs": case.paused_jobs,
        "appeal": case.appeal,
    }


def _permissions(row: ModelPermission) -> dict[str, Any]:
    return {"object": "project.model_permissions", "mode": row.mode, "model_ids": row.model_ids}


def _entry(entry: AuditEntry) -> dict[str, Any]:
    if entry.actor_id is None:
        who: dict[str, Any] = {"type": "session", "session": {"ip_address": entry.address}}
    else:
        who = {"type": "api_key", "api_key": {"id": entry.actor_id, "type": "service_account"}}
    project = None if entry.project_id is None else {"id": entry.project_id, "name": None}
    return {
        "id": entry.id,
        "object": "organization.audit_log",
        "type": entry.type,
        "effective_at": entry.effective_at,
        "actor": who | {"address": entry.address, "request_id": entry.request_id},
        "project": project,
        entry.type: {"id": entry.subject_id, "data": entry.details},
    }

"""`/v1/access_requests`, open to anybody, and what operators decide about them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import access
from data.tables_accounts import AccessRequest
from serve.api.deps import Operator, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.limits import RateLimitRequest, SpendLimitRequest, rate_changes
from serve.api.schemas import QueryModel, RequestModel

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class AskRequest(RequestModel):
    """Who asks, and for what."""

    name: str
    email: str
    organization: str
    use_case: str
    volume: str | None = None


class Approval(RequestModel):
    """How to approve, and what the account may do from the start."""

    account: str | None = None  # the account's name, if not the organization's
    note: str | None = Field(None, max_length=2000)
    rate_limits: RateLimitRequest | None = None  # of the base model
    spend_limit: SpendLimitRequest | None = None
    models: list[str] | None = None  # the only ones it may use


class Decision(RequestModel):
    """A word for the record."""

    note: str | None = Field(None, max_length=2000)


class ListRequests(QueryModel):
    """Which requests."""

    limit: int = Field(20, ge=1, le=100)
    status: str | None = None


@router.post("/access_requests")
async def ask(body: AskRequest, request: Request, runtime: Running) -> Response:
    """Ask for an account."""
    runtime.access_throttle.admit(request.client.host if request.client else "")
    made = await run_in_threadpool(lambda: access.ask(runtime.database, **body.model_dump()))
    return json_response(
        {
            "id": made.id,
            "object": "access_request",
            "created_at": made.created_at,
            "status": made.status,
        }
    )


@router.get("/organization/access_requests")
async def list_requests(
    query: Annotated[ListRequests, Query()], _key: Operator, runtime: Running
) -> Response:
    """List requests, oldest first."""
    found, has_more = await run_in_threadpool(
        access.list_requests, runtime.database, query.limit, query.after, query.status
    )
    return page([_describe(request) for request in found], has_more)


@router.post("/organization/access_requests/{request_id}/approve")
async def approve(
    request_id: str, _key: Operator, runtime: Running, body: Approval | None = None
) -> Response:
    """Make the account; its key is shown here and never again."""
    body = body or Approval()
    terms = access.Terms(
        {} if body.rate_limits is None else rate_changes(body.rate_limits),
        None if body.spend_limit is None else body.spend_limit.threshold_amount,
        body.models,
    )
    request, project, key = await run_in_threadpool(
        access.approve,
        runtime.database,
        request_id,
        body.account,
        body.note,
        terms,
        runtime.models.base_model,
        runtime.settings.limits,
    )
    await run_in_threadpool(runtime.gate.refresh)
    return json_response(_describe(request) | {"account": project.slug, "api_key": key})


@router.post("/organization/access_requests/{request_id}/deny")
async def deny(
    request_id: str, _key: Operator, runtime: Running, body: Decision | None = None
) -> Response:
    """Deny a request."""
    note = body.note if body else None
    request = await run_in_threadpool(access.decide, runtime.database, request_id, "denied", note)
    return json_response(_describe(request))


@router.post("/organization/access_requests/{request_id}/waitlist")
async def waitlist(
    request_id: str, _key: Operator, runtime: Running, body: Decision | None = None
) -> Response:
    """Keep a request for later."""
    note = body.note if body else None
    request = await run_in_threadpool(
        access.decide, runtime.database, request_id, "waitlisted", note
    )
    return json_response(_describe(request))


def _describe(request: AccessRequest) -> dict[str, Any]:
    return {
        "id": request.id,
        "object": "access_request",
        "created_at": request.created_at,
        "name": request.name,
        "email": request.email,
        "organization": request.organization,
        "use_case": request.use_case,
        "volume": request.volume,
        "status": request.status,
        "note": request.note,
        "decided_at": request.decided_at,
        "project_id": request.project_id,
    }

"""`/v1/webhook_endpoints`: where an account is told of what happens to its jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import webhooks
from data.errors import InvalidInput
from data.tables import new_id, now
from data.tables_jobs import WebhookDelivery, WebhookEndpoint
from serve.api.deps import Caller, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel
from serve.webhook_sender import send

MAX_LIMIT = 100
SHOWN = 4  # characters of a secret that are told again

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class CreateEndpoint(RequestModel):
    """A new endpoint."""

    name: str
    url: str
    event_types: list[str]


class UpdateEndpoint(RequestModel):
    """What to change."""

    name: str | None = None
    url: str | None = None
    event_types: list[str] | None = None


class RotateSecret(RequestModel):
    """Whether the former secret signs too for a day."""

    keep_old_secret_active_for_24_hours: bool = False


class TestEndpoint(RequestModel):
    """Which event to send a sample of."""

    event_type: str


class ListPage(QueryModel):
    """Which part of a list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


@router.get("/webhook_event_types")
async def list_event_types(caller: Caller, runtime: Running) -> Response:
    """List the events that endpoints can be told of."""
    return json_response({"object": "list", "data": list(webhooks.EVENT_TYPES)})


@router.post("/webhook_endpoints")
async def create_endpoint(body: CreateEndpoint, caller: Caller, runtime: Running) -> Response:
    """Add an endpoint; its secret is told here and never again."""
    allow = runtime.settings.webhooks_allow_private
    endpoint = await run_in_threadpool(
        webhooks.create,
        runtime.database,
        caller.id,
        body.name,
        body.url,
        body.event_types,
        allow_private=allow,
    )
    return json_response(_with_secret(endpoint))


@router.get("/webhook_endpoints")
async def list_endpoints(
    query: Annotated[ListPage, Query()], caller: Caller, runtime: Running
) -> Response:
    """List the account's endpoints, newest first."""
    found, has_more = await run_in_threadpool(
        webhooks.list_endpoints, runtime.database, caller.id, query.limit, query.after
    )
    return page([_describe(endpoint) for endpoint in found], has_more)


@router.get("/webhook_endpoints/{endpoint_id}")
async def retrieve_endpoint(endpoint_id: str, caller: Caller, runtime: Running) -> Response:
    """Describe one endpoint."""
    endpoint = await run_in_threadpool(webhooks.get, runtime.database, caller.id, endpoint_id)
    return json_response(_describe(endpoint))


@router.post("/webhook_endpoints/{endpoint_id}")
async def update_endpoint(
    endpoint_id: str, body: UpdateEndpoint, caller: Caller, runtime: Running
) -> Response:
    """Change an endpoint."""
    allow = runtime.settings.webhooks_allow_private
    endpoint = await run_in_threadpool(
        webhooks.update,
        runtime.database,
        caller.id,
        endpoint_id,
        **body.model_dump(),
        allow_private=allow,
    )
    return json_response(_describe(endpoint))


@router.delete("/webhook_endpoints/{endpoint_id}")
async def delete_endpoint(endpoint_id: str, caller: Caller, runtime: Running) -> Response:
    """Delete an endpoint and what waits for it."""
    await run_in_threadpool(webhooks.remove, runtime.database, caller.id, endpoint_id)
    return json_response({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate_secret(
    endpoint_id: str, caller: Caller, runtime: Running, body: RotateSecret | None = None
) -> Response:
    """Replace an endpoint's secret and tell the new one."""
    keep = body is not None and body.keep_old_secret_active_for_24_hours
    endpoint = await run_in_threadpool(
        webhooks.rotate_secret, runtime.database, caller.id, endpoint_id, keep
    )
    return json_response(_with_secret(endpoint))


@router.post("/webhook_endpoints/{endpoint_id}/test")
async def test_endpoint(
    endpoint_id: str, body: TestEndpoint, caller: Caller, runtime: Running
) -> Response:
    """Send a sample event now, once, and tell what the receiver answered."""
    endpoint = await run_in_threadpool(webhooks.get, runtime.database, caller.id, endpoint_id)
    if body.event_type not in webhooks.EVENT_TYPES:
        raise InvalidInput(
            f"Invalid value: '{body.event_type}'. Supported values are: "
            f"{', '.join(map(repr, webhooks.EVENT_TYPES))}.",
            param="event_type",
        )
    event_id, data = new_id("evt_"), {"id": new_id("test-")}
    if body.event_type == "safety_identifier.blocked":
        data = {"safety_identifier": "somebody", "safety_category": "test"}
    sample = webhooks.event_body(event_id, body.event_type, now(), data)
    outcome = await send(endpoint, event_id, sample, runtime.settings)
    if outcome.status_code is None:
        raise InvalidInput(
            f"The endpoint could not be reached: {outcome.error}", code="webhook_unreachable"
        )
    return json_response(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint_id,
            "event_type": body.event_type,
            "status_code": outcome.status_code,
            "success": True,
        }
    )


@router.get("/webhook_endpoints/{endpoint_id}/deliveries")
async def list_deliveries(
    endpoint_id: str, query: Annotated[ListPage, Query()], caller: Caller, runtime: Running
) -> Response:
    """List what an endpoint was sent, newest first."""
    found, has_more = await run_in_threadpool(
        webhooks.list_deliveries,
        runtime.database,
        caller.id,
        endpoint_id,
        query.limit,
        query.after,
    )
    return page([_describe_delivery(delivery) for delivery in found], has_more)


def _describe(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{endpoint.secret[-SHOWN:]}",
        "created_at": endpoint.created_at,
        "updated_at": endpoint.updated_at,
    }


def _with_secret(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {**_describe(endpoint), "signing_secret": endpoint.secret}


def _describe_delivery(delivery: WebhookDelivery) -> dict[str, Any]:
    waits = delivery.status == "pending"
    return {
        "id": delivery.id,
        "object": "webhook_endpoint.delivery",
        "event_id": delivery.event_id,
        "event_type": delivery.event_type,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "status_code": delivery.status_code,
        "error": delivery.error,
        "created_at": delivery.created_at,
        "delivered_at": delivery.delivered_at,
        "next_attempt_at": int(delivery.due_at) if waits else None,
    }

"""`/v1/organization/projects/{id}/...`: rate limits, spend limit, spend alerts and caps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import caps, limits
from data.errors import InvalidInput
from data.tables_metering import RateLimit, SpendAlert
from serve.api.deps import Operator, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import INT32_MAX, QueryModel, RequestModel
from serve.runtime import Runtime

UNLIMITED = INT32_MAX  # clients want a number: this one, or more, stands for no limit
FIELDS = {
    "max_requests_per_1_minute": "requests_per_minute",
    "max_tokens_per_1_minute": "tokens_per_minute",
    "max_requests_per_1_day": "requests_per_day",
}
CAPS = {"max_concurrent_jobs": "concurrent_jobs", "max_stored_bytes": "stored_bytes"}
MAX_CENTS = 10**11  # a billion dollars

router = APIRouter(prefix="/v1/organization/projects/{project_id}", route_class=StrictJsonRoute)


class ListQuery(QueryModel):
    """A page of a list."""

    before: str | None = None
    limit: int = Field(100, ge=1, le=1000)


class ListAlerts(ListQuery):
    """A page of the spend alerts."""

    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


class RateLimitRequest(RequestModel):
    """Limits to change."""

    unsupported = frozenset(
        {
            "batch_1_day_max_input_tokens",
            "max_audio_megabytes_per_1_minute",
            "max_images_per_1_minute",
        }
    )

    max_requests_per_1_minute: int | None = Field(None, ge=0)
    max_tokens_per_1_minute: int | None = Field(None, ge=0)
    max_requests_per_1_day: int | None = Field(None, ge=0)


class CapsRequest(RequestModel):
    """Caps to change."""

    max_concurrent_jobs: int | None = Field(None, ge=0, le=INT32_MAX)
    max_stored_bytes: int | None = Field(None, ge=0, lt=1 << 62)


class SpendLimitRequest(RequestModel):
    """The most an account may spend."""

    currency: Literal["USD"]
    interval: Literal["month"]
    threshold_amount: int = Field(ge=0, le=MAX_CENTS)


class Channel(RequestModel):
    """Whom to tell."""

    type: Literal["email"]
    recipients: list[str] = Field(min_length=1, max_length=100)
    subject_prefix: str | None = None


class SpendAlertRequest(SpendLimitRequest):
    """A sum at which somebody is told."""

    notification_channel: Channel


@router.get("/rate_limits")
async def list_rate_limits(
    project_id: str,
    query: Annotated[ListQuery, Query()],
    runtime: Running,
    _operator: Operator,
) -> Response:
    """List an account's rate limits, one a model."""
    found = await run_in_threadpool(
        limits.list_rates,
        runtime.database,
        project_id,
        runtime.models.base_model,
        runtime.settings.limits,
    )
    return _cut([_describe_rate(rate) for rate in found], query)


@router.post("/rate_limits/{rate_limit_id:path}")
async def update_rate_limit(
    project_id: str,
    rate_limit_id: str,
    body: RateLimitRequest,
    runtime: Running,
    _operator: Operator,
) -> Response:
    """Change an account's rate limits of one model; they hold at once."""
    rate = await run_in_threadpool(
        limits.update_rate,
        runtime.database,
        project_id,
        rate_limit_id,
        runtime.models.base_model,
        runtime.settings.limits,
        rate_changes(body),
    )
    await run_in_threadpool(runtime.gate.refresh)
    return json_response(_describe_rate(rate))


@router.get("/caps")
async def retrieve_caps(project_id: str, runtime: Running, _operator: Operator) -> Response:
    """Tell what an account may hold at a time."""
    held = await run_in_threadpool(
        caps.get_caps, runtime.database, project_id, runtime.settings.limits
    )
    return json_response(_describe_caps(held))


@router.post("/caps")
async def update_caps(
    project_id: str, body: CapsRequest, runtime: Running, _operator: Operator
) -> Response:
    """Change what an account may hold at a time."""
    held = await run_in_threadpool(
        caps.set_caps,
        runtime.database,
        project_id,
        runtime.settings.limits,
        _changes(body, CAPS),
    )
    return json_response(_describe_caps(held))


@router.delete("/caps")
async def delete_caps(project_id: str, runtime: Running, _operator: Operator) -> Response:
    """Give an account the deployment's caps again."""
    await run_in_threadpool(caps.clear_caps, runtime.database, project_id)
    return json_response({"object": "project.caps.deleted", "deleted": True})


@router.get("/spend_limit")
async def retrieve_spend_limit(project_id: str, runtime: Running, _operator: Operator) -> Response:
    """Tell the most that an account may spend in a month, and whether it has."""
    return await _spend_limit(runtime, project_id)


@router.post("/spend_limit")
async def update_spend_limit(
    project_id: str, body: SpendLimitRequest, runtime: Running, _operator: Operator
) -> Response:
    """Set the most that an account may spend in a month."""
    await run_in_threadpool(
        limits.set_spend_limit, runtime.database, project_id, body.threshold_amount
    )
    await run_in_threadpool(runtime.gate.refresh)
    return await _spend_limit(runtime, project_id)


@router.delete("/spend_limit")
async def delete_spend_limit(project_id: str, runtime: Running, _operator: Operator) -> Response:
    """Let an account spend without a limit."""
    await run_in_threadpool(limits.clear_spend_limit, runtime.database, project_id)
    await run_in_threadpool(runtime.gate.refresh)
    return json_response({"object": "project.spend_limit.deleted", "deleted": True})


@router.get("/spend_alerts")
async def list_spend_alerts(
    project_id: str,
    query: Annotated[ListAlerts, Query()],
    runtime: Running,
    _operator: Operator,
) -> Response:
    """List an account's spend alerts."""
    found = await run_in_threadpool(limits.list_alerts, runtime.database, project_id)
    shown = [_describe_alert(alert) for alert in found]
    return _cut(shown[::-1] if query.order == "desc" else shown, query)


@router.post("/spend_alerts")
async def create_spend_alert(
    project_id: str, body: SpendAlertRequest, runtime: Running, _operator: Operator
) -> Response:
    """Have somebody told when an account has spent a sum in a month."""
    return await _save_alert(runtime, project_id, None, body)


@router.get("/spend_alerts/{alert_id}")
async def retrieve_spend_alert(
    project_id: str, alert_id: str, runtime: Running, _operator: Operator
) -> Response:
    """Describe one alert."""
    alert = await run_in_threadpool(limits.get_alert, runtime.database, project_id, alert_id)
    return json_response(_describe_alert(alert))


@router.post("/spend_alerts/{alert_id}")
async def update_spend_alert(
    project_id: str,
    alert_id: str,
    body: SpendAlertRequest,
    runtime: Running,
    _operator: Operator,
) -> Response:
    """Change an alert."""
    return await _save_alert(runtime, project_id, alert_id, body)


@router.delete("/spend_alerts/{alert_id}")
async def delete_spend_alert(
    project_id: str, alert_id: str, runtime: Running, _operator: Operator
) -> Response:
    """Remove an alert."""
    await run_in_threadpool(limits.delete_alert, runtime.database, project_id, alert_id)
    return json_response({"id": alert_id, "object": "project.spend_alert.deleted", "deleted": True})


def rate_changes(body: RateLimitRequest) -> dict[str, int | None]:
    """Return what a request changes, by the names of `limits.RATE_FIELDS`."""
    return _changes(body, FIELDS)


def _changes(body: RequestModel, names: dict[str, str]) -> dict[str, int | None]:
    return {
        names[name]: None if value >= UNLIMITED and name in FIELDS else value
        for name, value in body.model_dump(exclude_unset=True).items()
    }


async def _spend_limit(runtime: Runtime, project_id: str) -> Response:
    await run_in_threadpool(runtime.meter.flush)
    threshold, spent = await run_in_threadpool(limits.get_spend_limit, runtime.database, project_id)
    return json_response(
        {
            "object": "project.spend_limit",
            "threshold_amount": threshold,
            "currency": "USD",
            "interval": "month",
            "enforcement": {"status": "enforcing" if spent >= threshold else "inactive"},
        }
    )


async def _save_alert(
    runtime: Runtime, project_id: str, alert_id: str | None, body: SpendAlertRequest
) -> Response:
    channel = body.notification_channel
    alert = await run_in_threadpool(
        limits.save_alert,
        runtime.database,
        project_id,
        alert_id,
        body.threshold_amount,
        channel.recipients,
        channel.subject_prefix,
    )
    return json_response(_describe_alert(alert))


def _describe_rate(rate: RateLimit) -> dict[str, Any]:
    columns = {name: getattr(rate, column) for name, column in FIELDS.items()}
    return {
        "id": limits.RATE_PREFIX + rate.model,
        "object": "project.rate_limit",
        "model": rate.model,
        **{name: UNLIMITED if value is None else value for name, value in columns.items()},
    }


def _describe_caps(held: caps.Caps) -> dict[str, Any]:
    return {
        "object": "project.caps",
        "max_concurrent_jobs": held.concurrent_jobs,
        "max_stored_bytes": held.stored_bytes,
    }


def _describe_alert(alert: SpendAlert) -> dict[str, Any]:
    return {
        "id": alert.id,
        "object": "project.spend_alert",
        "threshold_amount": alert.threshold_cents,
        "currency": "USD",
        "interval": "month",
        "notification_channel": {
            "type": "email",
            "recipients": alert.recipients,
            "subject_prefix": alert.subject_prefix,
        },
    }


def _cut(items: list[dict[str, Any]], query: ListQuery) -> Response:
    """Send the page that follows `after`, or the one that precedes `before`."""
    ids = [item["id"] for item in items]
    for name, cursor in (("after", query.after), ("before", query.before)):
        if cursor is not None and cursor not in ids:
            raise InvalidInput(f"Invalid '{name}': '{cursor}' is not in the list.", param=name)
    first = 0 if query.after is None else ids.index(query.after) + 1
    last = len(items) if query.before is None else ids.index(query.before)
    if query.before is not None and query.after is None:
        first = max(0, last - query.limit)
        return page(items[first:last], first > 0)
    found = items[first:last]
    return page(found[: query.limit], len(found) > query.limit)

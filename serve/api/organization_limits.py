"""`/v1/organization/spend_limit`: the most that all accounts together may spend in a month."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import organization_limits
from serve.api.deps import Operator, Running, json_response
from serve.api.json_route import StrictJsonRoute
from serve.api.limits import SpendLimitRequest
from serve.runtime import Runtime

router = APIRouter(prefix="/v1/organization/spend_limit", route_class=StrictJsonRoute)


@router.get("")
async def retrieve(runtime: Running, _operator: Operator) -> Response:
    """Tell the limit, and whether it is reached."""
    return await _describe(runtime)


@router.post("")
async def update(body: SpendLimitRequest, runtime: Running, _operator: Operator) -> Response:
    """Set the limit; it holds from the next request on."""
    await run_in_threadpool(organization_limits.replace, runtime.database, body.threshold_amount)
    await run_in_threadpool(runtime.gate.refresh)
    return await _describe(runtime)


@router.delete("")
async def delete(runtime: Running, _operator: Operator) -> Response:
    """Let the accounts spend without a limit of all together."""
    await run_in_threadpool(organization_limits.clear, runtime.database)
    await run_in_threadpool(runtime.gate.refresh)
    return json_response({"object": "organization.spend_limit.deleted", "deleted": True})


async def _describe(runtime: Runtime) -> Response:
    await run_in_threadpool(runtime.meter.flush)
    threshold, spent = await run_in_threadpool(organization_limits.get, runtime.database)
    return json_response(
        {
            "object": "organization.spend_limit",
            "threshold_amount": threshold,
            "currency": "USD",
            "interval": "month",
            "enforcement": {"status": "enforcing" if spent >= threshold else "inactive"},
        }
    )

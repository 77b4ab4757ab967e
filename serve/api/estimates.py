"""`POST /v1/fine_tuning/estimate`: what a job would take, without making it."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.estimate import Estimate, estimate
from data.job_spec import JobSpec
from data.tables import new_id
from serve.api.deps import Account, Caller, Running, json_response
from serve.api.job_schemas import JobRequest
from serve.api.json_route import StrictJsonRoute
from serve.engine.base import GenerationRequest, SamplingParams
from serve.runtime import Runtime

# A training step is a forward pass and a backward pass of twice its work.
PASSES = 3.0

router = APIRouter(prefix="/v1/fine_tuning", route_class=StrictJsonRoute)


@router.post("/estimate")
async def estimate_job(body: JobRequest, caller: Caller, runtime: Running) -> Response:
    """Check a job's files, count its tokens, and say how long it would train."""
    return json_response(await describe_estimate(body.spec(), caller, runtime))


async def describe_estimate(spec: JobSpec, account: Account, runtime: Runtime) -> dict[str, Any]:
    """Return the API's object of an estimate.

    Raises:
        InvalidInput: The job could not be made.
        RateLimited: The model is to be tried, and the account calls too often.
    """
    bases = await runtime.models.bases(account.id)
    found = await run_in_threadpool(
        estimate,
        runtime.database,
        runtime.files,
        account.id,
        spec,
        bases,
        runtime.models.base_tokens.tokenizer,
        context_length=runtime.engine.max_context,
        min_examples=runtime.settings.min_examples,
    )
    speed, source = found.tokens_per_s, "jobs"
    if speed is None and found.sample and not found.faults:
        speed, source = await _measure(found, account, runtime), "probe"
    ok = not found.faults
    trained = found.trained_tokens
    seconds = trained / speed if ok and speed and trained is not None else None
    return {
        "object": "fine_tuning.estimate",
        "ok": ok,
        "faults": found.faults,
        "model": spec.model,
        "base_model": found.base_model,
        "reports": found.reports,
        "examples": found.examples if ok else None,
        "tokens": found.tokens if ok else None,
        "tokens_exact": found.exact,
        "n_epochs": found.n_epochs if ok else None,
        "trained_tokens": trained if ok else None,
        "tokens_per_s": round(speed, 1) if speed else None,
        "speed_from": source if speed else None,
        "estimated_seconds": None if seconds is None else round(seconds, 1),
        "estimated_cost": None
        if trained is None
        else {"value": trained * runtime.settings.prices.training / 1e6, "currency": "usd"},
    }


async def _measure(found: Estimate, caller: Account, runtime: Runtime) -> float:
    """Return the tokens a second that training would do, judged by reading a few rows.

    It costs nothing, but counts as a request.

    Raises:
        RateLimited: The account calls too often.
    """
    runtime.generator.check(caller.id)
    base = runtime.models.base_model
    reservation, _ = runtime.gate.admit(caller.id, base, 0, 0, is_free=True)
    reservation.settle(0)
    params = SamplingParams(max_tokens=0)
    account = new_id("estimate-")  # of its own, so that no cached prefix flatters the speed
    room = runtime.engine.max_context
    requests = [
        GenerationRequest(new_id("estimate-"), ids[:room], params, account=account)
        for ids in found.sample
    ]
    started = time.monotonic()
    await runtime.generator.answer(requests)
    seconds = max(time.monotonic() - started, 1e-6)
    return sum(len(request.prompt_ids) for request in requests) / seconds / PASSES

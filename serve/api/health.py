"""`/health` for whoever waits for the server, `/metrics` for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import EngineFailure, ModelUnavailable, Overloaded
from serve.api.deps import Operator, Running, json_response
from serve.runtime import Runtime

FRESH_S = 10.0  # an answer this young proves that the model works
PROBE_TIMEOUT_S = 30.0

log = logging.getLogger("hone.requests")

router = APIRouter()


@router.get("/health")
async def health(runtime: Running) -> Response:
    """Say ok when the model has just answered, or answers now."""
    await _ensure_alive(runtime)
    return json_response({"status": "ok", "model": runtime.models.base_model})


@router.get("/metrics")
async def metrics(runtime: Running, _operator: Operator) -> Response:
    """Expose counters and gauges in Prometheus' text format."""
    text = await run_in_threadpool(runtime.metrics.render, runtime)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _ensure_alive(runtime: Runtime) -> None:
    async with runtime.probe_lock:  # many watchers, one probe
        if time.monotonic() - runtime.generator.last_answer_s < FRESH_S:
            return
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await runtime.generator.answer([runtime.probe()])
        except Overloaded:
            return  # busy answering others
        except (EngineFailure, TimeoutError) as error:
            log.error("the model does not answer: %s", error or f"for {PROBE_TIMEOUT_S:.0f} s")
            raise ModelUnavailable(
                "The model does not answer; the server's log says why. Restart the server."
            ) from None

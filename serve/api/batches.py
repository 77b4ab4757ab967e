"""`/v1/batches`: many requests from one file, answered in the background."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import batches
from data.tables_surface import Batch
from serve.api.deps import AnyKey, Caller, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel
from serve.batch_runner import ENDPOINTS

TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")

MODERATIONS = "/v1/moderations"

router = APIRouter(prefix="/v1/batches", route_class=StrictJsonRoute)


class CreateBatch(RequestModel):
    """What to answer."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class ListBatches(QueryModel):
    """Which part of the list."""

    limit: int = Field(20, ge=1, le=100)


@router.post("")
async def create_batch(
    body: CreateBatch, caller: Caller, key: AnyKey, runtime: Running
) -> Response:
    """Queue a batch."""
    if body.endpoint != MODERATIONS:  # they cost nothing
        runtime.gate.check_money(caller.id)
    batch = await run_in_threadpool(
        lambda: batches.create(
            runtime.database, caller.id, key.key_id, endpoints=list(ENDPOINTS), **body.model_dump()
        )
    )
    return json_response(_describe(batch))


@router.get("")
async def list_batches(
    query: Annotated[ListBatches, Query()], caller: Caller, runtime: Running
) -> Response:
    """List the account's batches, newest first."""
    found, has_more = await run_in_threadpool(
        batches.list_batches, runtime.database, caller.id, query.limit, query.after
    )
    return page([_describe(batch) for batch in found], has_more)


@router.get("/{batch_id}")
async def retrieve_batch(batch_id: str, caller: Caller, runtime: Running) -> Response:
    """Describe a batch."""
    batch = await run_in_threadpool(batches.get, runtime.database, caller.id, batch_id)
    return json_response(_describe(batch))


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, caller: Caller, runtime: Running) -> Response:
    """Stop a batch; what was answered is kept."""
    batch = await run_in_threadpool(batches.cancel, runtime.database, caller.id, batch_id)
    return json_response(_describe(batch))


def _describe(batch: Batch) -> dict[str, Any]:
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{name}_at": batch.times.get(f"{name}_at") for name in TIMES},
        "request_counts": counts,
        "metadata": batch.metadata_,
    }

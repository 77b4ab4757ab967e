"""`/v1/models`: the base model and the account's own fine-tunes, and no one else's."""

from __future__ import annotations

from typing import Any

from data.accounts import Principal
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import registry
from data.errors import Forbidden
from serve.api.deps import Caller, Running, json_response
from serve.runtime import Runtime

router = APIRouter()


@router.get("/models")
async def list_models(caller: Caller, runtime: Running) -> Response:
    """List the base model, then the account's aliases and versions, newest first."""
    tuned = await run_in_threadpool(_tuned, runtime, caller)
    return json_response({"object": "list", "data": [_base(runtime), *tuned]})


@router.get("/models/{model:path}")
async def retrieve_model(model: str, caller: Caller, runtime: Running) -> Response:
    """Describe one model."""
    if model == runtime.models.base_model:
        return json_response(_base(runtime))
    version = await run_in_threadpool(registry.resolve, runtime.database, caller.project_id, model)
    return json_response(
        _describe(model, version.created_at, version.name, version.base_model, caller)
    )


@router.delete("/models/{model:path}")
async def delete_model(model: str, caller: Caller, runtime: Running) -> Response:
    """Delete a fine-tune of the account; requests in flight finish on it."""
    if model == runtime.models.base_model:
        raise Forbidden("The base model cannot be deleted; only fine-tuned models can.")
    await run_in_threadpool(registry.delete, runtime.database, caller.project_id, model)
    return json_response({"id": model, "object": "model", "deleted": True})


def _base(runtime: Runtime) -> dict[str, Any]:
    return {
        "id": runtime.models.base_model,
        "object": "model",
        "created": runtime.created,
        "owned_by": "system",
        "shutdown_date": None,
        "root": runtime.models.base_model,
        "parent": None,
    }


def _describe(name: str, created: int, root: str, parent: str, caller: Principal) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": caller.project_slug,
        "shutdown_date": None,
        "root": root,
        "parent": parent,
    }

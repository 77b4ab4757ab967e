"""`/v1/models`: the base model and the account's own fine-tunes, and no one else's."""

from __future__ import annotations

import tempfile
from typing import Any

from fastapi import APIRouter
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from data import adapter_folders, model_access, registry
from data.errors import Forbidden
from data.tables import AdapterVersion
from serve.api.deps import Account, Caller, Running, json_response
from serve.runtime import Runtime

CHUNK_BYTES = 1 << 20

router = APIRouter(prefix="/v1")


@router.get("/models")
async def list_models(caller: Caller, runtime: Running) -> Response:
    """List the base model, then what the account's aliases and versions are called."""
    tuned = await run_in_threadpool(_tuned, runtime, caller)
    bases = [_base(runtime) for _ in await runtime.models.bases(caller.id)]
    return json_response({"object": "list", "data": [*bases, *tuned]})


@router.get("/models/{model:path}/download")
async def download_model(model: str, caller: Caller, runtime: Running) -> Response:
    """Hand out a fine-tune of the account: PEFT's folder, its model card and lineage, as a zip."""
    return await run_in_threadpool(_zipped, model, caller, runtime)


@router.get("/models/{model:path}/bias_report")
async def bias_report(model: str, caller: Caller, runtime: Running) -> Response:
    """Tell what was measured of a fine-tune's bias, beside its base's, when it was trained."""
    find = model_access.find_version
    version = await run_in_threadpool(find, runtime.database, caller.id, model)
    found = await run_in_threadpool(
        adapter_folders.bias_report, version, runtime.settings.adapters_dir
    )
    return json_response(found)


def _zipped(model: str, account: Account, runtime: Runtime) -> Response:
    version = model_access.find_version(runtime.database, account.id, model)
    stream = tempfile.TemporaryFile(dir=runtime.settings.adapters_dir)  # noqa: SIM115
    try:
        adapter_folders.write_zip(version, runtime.settings.adapters_dir, stream)
    except BaseException:
        stream.close()
        raise
    size = stream.tell()
    stream.seek(0)
    name = version.name.replace(":", "-").replace("/", "-")
    headers = {
        "content-length": str(size),
        "content-disposition": f'attachment; filename="{name}.zip"',
    }
    chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
    return StreamingResponse(
        chunks,
        headers=headers,
        media_type="application/zip",
        background=BackgroundTask(stream.close),
    )


@router.get("/models/{model:path}")
async def retrieve_model(model: str, caller: Caller, runtime: Running) -> Response:
    """Describe one model."""
    if model in await runtime.models.bases(caller.id):
        return json_response(_base(runtime))
    version = await run_in_threadpool(
        model_access.find_version, runtime.database, caller.id, model, own=False
    )
    return json_response(_describe(model, version))


@router.delete("/models/{model:path}")
async def delete_model(model: str, caller: Caller, runtime: Running) -> Response:
    """Delete a fine-tune of the account; requests in flight finish on it."""
    if model == runtime.models.base_model:
        raise Forbidden("The base model cannot be deleted; only fine-tuned models can.")
    await run_in_threadpool(model_access.find_version, runtime.database, caller.id, model)
    await run_in_threadpool(registry.delete, runtime.database, caller.id, model)
    return json_response({"id": model, "object": "model", "deleted": True})


async def names(runtime: Runtime, account: Account) -> list[str]:
    """Return what the models that an account may use are called."""
    tuned = await run_in_threadpool(_tuned, runtime, account)
    return [*await runtime.models.bases(account.id), *(str(model["id"]) for model in tuned)]


def _tuned(runtime: Runtime, account: Account) -> list[dict[str, Any]]:
    aliases = registry.list_aliases(runtime.database, account.id)
    versions = {v.id: v for v in registry.list_versions(runtime.database, account.id)}
    # A version may be deleted between the two reads, so an alias may point at none of them.
    named = [(a.name, versions[a.version_id]) for a in aliases if a.version_id in versions]
    named += [(version.name, version) for version in versions.values()]
    database, account_id = runtime.database, account.id
    return [
        _describe(name, version)
        for name, version in named
        if model_access.permits(database, account_id, version.name, version.base_model)
    ]


def _base(runtime: Runtime) -> dict[str, Any]:
    name = runtime.models.base_model
    return _model(name, runtime.created, "system", root=name, parent=None)


def _describe(name: str, version: AdapterVersion) -> dict[str, Any]:
    """Describe a version under one of its names; `root` is the name that never moves."""
    owner = registry.owner_of(version)
    return _model(name, version.created_at, owner, root=version.name, parent=version.base_model)


def _model(name: str, created: int, owner: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "shutdown_date": None,
        "root": root,
        "parent": parent,
    }

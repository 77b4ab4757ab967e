"""`/v1/adapters`: bring an adapter, see where each one is, load it early or keep it in memory."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from data import model_access, registry
from data.adapter_checks import CONFIG, WEIGHTS
from data.errors import InvalidInput
from data.tables import AdapterVersion
from serve.adapter_import import publish_files
from serve.api.deps import Account, Caller, Running, json_response, page
from serve.api.description import form_body
from serve.api.errors import unknown_parameter
from serve.engine.base import AdapterRef, AdapterState, engine_key
from serve.runtime import Runtime

PARTS = {"config": CONFIG, "weights": WEIGHTS}
FORM_FIELDS = (*PARTS, "suffix")

router = APIRouter(prefix="/v1/adapters")


@router.get("")
async def list_adapters(caller: Caller, runtime: Running) -> Response:
    """List the account's adapters, newest first, with where each one is."""
    versions = await run_in_threadpool(registry.list_versions, runtime.database, caller.id)
    rules = await run_in_threadpool(model_access.rules_of, runtime.database, caller.id)
    permitted = [one for one in versions if rules.permits(one.name, one.base_model)]
    states = await run_in_threadpool(_states, runtime)
    return page([_describe(version, states, caller.id) for version in permitted], False)


@router.post(
    "",
    openapi_extra=form_body(
        {"config": "PEFT's adapter_config.json.", "weights": "Its adapter_model.safetensors."},
        suffix="Part of the model's name.",
    ),
)
async def import_adapter(request: Request, caller: Caller, runtime: Running) -> Response:
    """Publish an adapter that was trained elsewhere, after all checks and a trial forward pass."""
    async with request.form(max_files=2, max_fields=2) as form:
        for name in form:
            if name not in FORM_FIELDS:
                raise unknown_parameter(name, FORM_FIELDS)
        version = await run_in_threadpool(_import, runtime, caller, form)
    return await _answer(runtime, version, caller)


@router.get("/{name:path}")
async def retrieve_adapter(name: str, caller: Caller, runtime: Running) -> Response:
    """Describe one adapter; of one that another account shares, not where it is and its use."""
    version = await run_in_threadpool(
        model_access.find_version, runtime.database, caller.id, name, own=False
    )
    return await _answer(runtime, version, caller)


@router.post("/{name:path}/load")
async def load_adapter(name: str, caller: Caller, runtime: Running) -> Response:
    """Read and try an adapter now, so that its first request need not wait."""
    version, ref = await _find(runtime, caller.id, name)
    await run_in_threadpool(runtime.engine.load_adapter, ref)
    return await _answer(runtime, version, caller)


@router.post("/{name:path}/unload")
async def unload_adapter(name: str, caller: Caller, runtime: Running) -> Response:
    """Drop an adapter from memory once its last request has ended; the next one loads it again."""
    version, ref = await _find(runtime, caller.id, name)
    await run_in_threadpool(runtime.engine.unload_adapter, ref.digest)
    return await _answer(runtime, version, caller)


@router.post("/{name:path}/pin")
async def pin_adapter(name: str, caller: Caller, runtime: Running) -> Response:
    """Load an adapter and keep it in memory."""
    version, ref = await _find(runtime, caller.id, name)
    await run_in_threadpool(runtime.engine.pin_adapter, ref)
    return await _answer(runtime, version, caller)


@router.post("/{name:path}/unpin")
async def unpin_adapter(name: str, caller: Caller, runtime: Running) -> Response:
    """Let an adapter make room for others again."""
    version, ref = await _find(runtime, caller.id, name)
    await run_in_threadpool(runtime.engine.unpin_adapter, ref.digest)
    return await _answer(runtime, version, caller)


async def _find(runtime: Runtime, account_id: str, name: str) -> tuple[AdapterVersion, AdapterRef]:
    """Find an adapter of the account whose files are what was published."""
    version = await run_in_threadpool(model_access.find_version, runtime.database, account_id, name)
    served = await runtime.models.resolve(account_id, version.name)
    if served.adapter is None:
        raise InvalidInput(f"'{name}' is a base model, not an adapter.", param="name")
    return version, served.adapter


async def _answer(runtime: Runtime, version: AdapterVersion, caller: Account) -> Response:
    states = await run_in_threadpool(_states, runtime)
    return json_response(_describe(version, states, caller.id))


def _states(runtime: Runtime) -> dict[str, AdapterState]:
    return {state.digest: state for state in runtime.engine.adapters()}


def _describe(
    version: AdapterVersion, states: dict[str, AdapterState], account_id: str
) -> dict[str, Any]:
    state = states.get(engine_key(version.project_id, version.digest))
    tier = "disk" if state is None else state.tier
    last_used = None if state is None or state.last_used is None else int(state.last_used)
    whereabouts = {
        "loaded": tier != "disk",
        "tier": tier,
        "pinned": state is not None and state.pinned,
        "last_used_at": last_used,
        "num_requests": 0 if state is None else state.num_uses,
        "num_loads": 0 if state is None else state.num_loads,
    }
    if version.project_id != account_id:  # its owner's affair
        whereabouts = dict.fromkeys(whereabouts)
    return {
        "id": version.name,
        "object": "adapter",
        "created_at": version.created_at,
        "base_model": version.base_model,
        "digest": version.digest,
        "bytes": version.bytes,
        "rank": version.rank,
        "target_modules": version.target_modules,
        **whereabouts,
    }


def _import(runtime: Runtime, account: Account, form: FormData) -> AdapterVersion:
    suffix = form.get("suffix")
    if isinstance(suffix, UploadFile):
        raise InvalidInput("Invalid 'suffix': expected a text, not a file.", param="suffix")
    files = {}
    for field, filename in PARTS.items():
        part = form.get(field)
        if not isinstance(part, UploadFile):
            raise InvalidInput(
                f"Missing required parameter: '{field}'. Send PEFT's {filename} as a file of "
                "a multipart/form-data body.",
                param=field,
                code="missing_required_parameter",
            )
        files[filename] = part.file
    catalog = runtime.models
    base = (catalog.base_model, catalog.base_fingerprint)
    return publish_files(
        runtime.database, runtime.settings, account.id, files, base, runtime.engine, suffix
    )

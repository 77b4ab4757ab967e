"""`/v1/fine_tuning/jobs`: a row for the worker, and all that is known of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import accounts, job_events, job_examples, job_pause, jobs
from data.accounts import Principal
from data.errors import InvalidInput
from data.feedback import export
from data.job_start import check_rank
from data.prompt_format import check_rows
from data.tables import AdapterVersion, Checkpoint, Job, JobEvent
from serve.api.deps import Caller, Running, json_response, page
from serve.api.errors import unknown_parameter
from serve.api.estimates import describe_estimate
from serve.api.job_schemas import JobRequest
from serve.api.json_route import StrictJsonRoute
from serve.api.middleware import ORGANIZATION
from serve.api.schemas import QueryModel
from serve.api.stream import KEEP_ALIVE_S, EventStream, Frames
from serve.runtime import Runtime

MAX_LIMIT = 100
MAX_EXAMPLES = 1000
STREAM_POLL_S = 0.5
KEY_POLL_S = 1.0  # between two looks at whether the key of a stream still works
METADATA_FILTER = re.compile(r"metadata\[(.+)\]")

LABEL_PROJECT = "lproj-"
EXPORTED = {"supervised": "sft", "kto": "unpaired"}  # methods that learn no preferences

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=StrictJsonRoute)


class ListJobs(QueryModel):
    """Which jobs to list; `metadata[key]=value` and `metadata=null` filter too, read apart."""

    model_config = ConfigDict(extra="ignore")

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


class ListEvents(QueryModel):
    """Which events to list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    stream: bool = False


class ListExamples(QueryModel):
    """Which training rows to list, and in which order."""

    limit: int = Field(20, ge=1, le=MAX_EXAMPLES)
    sort: str = "-loss"


class ListCheckpoints(QueryModel):
    """Which checkpoints to list."""

    limit: int = Field(10, ge=1, le=MAX_LIMIT)


@router.post("")
async def create_job(body: JobRequest, caller: Caller, runtime: Running) -> Response:
    """Queue a fine-tuning job; with `dry_run`, tell what it would take instead."""
    if body.training_file.startswith(LABEL_PROJECT):
        body = await run_in_threadpool(_with_export, body, caller, runtime)
    spec = body.spec()
    if spec.integrations and runtime.settings.wandb_project is None:
        raise InvalidInput(
            "Invalid 'integrations': wandb is not configured on this server; its operator sets "
            "`wandb_project`.",
            param="integrations",
        )
    check_rank(spec.options, runtime.settings.max_lora_rows)
    if body.dry_run:
        return json_response(await describe_estimate(spec, caller, runtime))
    runtime.gate.check_money(caller.id)
    bases = await runtime.models.bases(caller.id)
    await run_in_threadpool(check_rows, runtime.files, caller.id, spec)
    job = await run_in_threadpool(
        jobs.create, runtime.database, caller.id, spec, bases, runtime.settings.limits
    )
    return json_response(describe_job(job))


def _with_export(body: JobRequest, caller: Caller, runtime: Running) -> JobRequest:
    """Freeze the judgements of the labeling project that a job names, as the file it learns."""
    if body.dry_run:
        raise InvalidInput(
            "Invalid 'dry_run': a labeling project has no file yet; export it, and give that file.",
            param="dry_run",
        )
    method = "supervised" if body.method is None else body.method.type
    record = export.freeze(
        runtime.database,
        runtime.files,
        caller.id,
        body.training_file,
        EXPORTED.get(method, "preference"),
    )
    return body.model_copy(update={"training_file": record.id})


@router.get("")
async def list_jobs(
    query: Annotated[ListJobs, Query()], request: Request, caller: Caller, runtime: Running
) -> Response:
    """List the account's jobs, newest first."""
    wanted = _metadata_filter(request)
    found, has_more = await run_in_threadpool(
        jobs.list_jobs, runtime.database, caller.id, query.limit, query.after, wanted
    )
    return page([describe_job(job) for job in found], has_more)


@router.get("/{job_id}")
async def retrieve_job(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Describe one job."""
    job = await run_in_threadpool(jobs.get, runtime.database, caller.id, job_id)
    return json_response(describe_job(job))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Cancel a job; its trainer stops within seconds."""
    job = await run_in_threadpool(jobs.request_cancel, runtime.database, caller.id, job_id)
    return json_response(describe_job(job))


@router.post("/{job_id}/pause")
async def pause_job(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Pause a job; its trainer stops within seconds, at a checkpoint."""
    job = await run_in_threadpool(job_pause.pause, runtime.database, caller.id, job_id)
    return json_response(describe_job(job))


@router.post("/{job_id}/resume")
async def resume_job(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Queue a paused job again."""
    job = await run_in_threadpool(job_pause.resume, runtime.database, caller.id, job_id)
    return json_response(describe_job(job))


@router.get("/{job_id}/events")
async def list_events(
    job_id: str,
    query: Annotated[ListEvents, Query()],
    request: Request,
    caller: Caller,
    runtime: Running,
) -> Response:
    """List a job's events, newest first; or stream them, oldest first, until the job ends."""
    if query.stream:
        if "limit" in query.model_fields_set:
            raise InvalidInput("Invalid 'limit': a stream has no pages.", param="limit")
        frames = job_frames(runtime, request.state.principal, job_id, query.after)
        return await EventStream.begin(request, frames)
    found, has_more = await run_in_threadpool(
        jobs.list_events, runtime.database, caller.id, job_id, query.limit, query.after
    )
    return page([_describe_event(event) for event in found], has_more)


@router.get("/{job_id}/examples")
async def list_examples(
    job_id: str, query: Annotated[ListExamples, Query()], caller: Caller, runtime: Running
) -> Response:
    """List a job's training rows with their loss under the finished model."""
    found, has_more = await run_in_threadpool(
        job_examples.list_examples,
        runtime.database,
        runtime.files,
        caller.id,
        job_id,
        query.sort,
        query.limit,
        query.after,
    )
    return page(found, has_more)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, query: Annotated[ListCheckpoints, Query()], caller: Caller, runtime: Running
) -> Response:
    """List a job's checkpoints, newest first."""
    found = await run_in_threadpool(jobs.list_checkpoints, runtime.database, caller.id, job_id)
    if query.after is not None:
        ids = [checkpoint.id for checkpoint, _ in found]
        if query.after not in ids:
            raise InvalidInput(f"Invalid 'after': no checkpoint {query.after}", param="after")
        found = found[ids.index(query.after) + 1 :]
    shown = [_describe_checkpoint(*pair) for pair in found[: query.limit]]
    return page(shown, len(found) > query.limit)


def describe_job(job: Job) -> dict[str, Any]:
    """Return the API's object of a job: every key, always."""
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANIZATION,
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "hyperparameters": job.hyperparameters,
        "method": _describe_method(job),
        "seed": job.seed,
        "trained_tokens": job.trained_tokens if job.status in jobs.FINAL else None,
        "integrations": job.integrations,
        "metadata": job.metadata_,
        "error": job.error,
        "user_provided_suffix": job.suffix,
    }


async def job_frames(
    runtime: Runtime, principal: Principal, job_id: str, after: str | None
) -> Frames:
    """Yield a job's events as they come, until it ends.

    Raises:
        Forbidden: The account was closed meanwhile.
        Unauthorized: The key was revoked, or has expired.
        Overloaded: The server stops.
    """
    account = str(principal.project_id)
    seq = await run_in_threadpool(job_events.position_of, runtime.database, account, job_id, after)
    silent_s = KEEP_ALIVE_S  # nothing was sent yet, so the first look ends in a frame
    key_seen = time.monotonic()
    while True:
        runtime.generator.check(account)
        if time.monotonic() - key_seen >= KEY_POLL_S:
            await run_in_threadpool(accounts.check_key, runtime.database, principal.key_id)
            key_seen = time.monotonic()
        found, ended = await run_in_threadpool(
            job_events.events_since, runtime.database, account, job_id, seq
        )
        if found or silent_s >= KEEP_ALIVE_S:
            yield [_describe_event(event) for event in found]
        if found:
            seq = found[-1].seq
        if ended:
            return
        silent_s = 0.0 if found or silent_s >= KEEP_ALIVE_S else silent_s + STREAM_POLL_S
        await asyncio.sleep(STREAM_POLL_S)


def _describe_method(job: Job) -> dict[str, Any]:
    """Return the method with the hyperparameters as they stand: resolved once the job runs."""
    kind = job.method["type"]
    return {"type": kind, kind: job.method[kind] | {"hyperparameters": job.hyperparameters}}


def _describe_event(event: JobEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": event.data,
    }


def _describe_checkpoint(checkpoint: Checkpoint, version: AdapterVersion) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": version.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step_number,
    }


def _metadata_filter(request: Request) -> Mapping[str, str] | None:
    """Return the pairs asked for; empty for `metadata=null`, which asks for jobs without any."""
    wanted: dict[str, str] | None = None
    for name, value in request.query_params.items():
        match = METADATA_FILTER.fullmatch(name)
        if match:
            wanted = {**(wanted or {}), match[1]: value}
        elif name == "metadata" and value == "null":
            wanted = wanted or {}
        elif name not in ListJobs.model_fields:
            raise unknown_parameter(name, list(ListJobs.model_fields))
    return wanted

"""The routes of 2020 to 2022: `/v1/engines` and `/v1/fine-tunes`, for scripts that never moved on.

An engine is a model. A fine-tune is a fine-tuning job in its former shape, events inline.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import job_events, jobs
from data.errors import InvalidInput
from data.job_sections import check_section
from data.job_spec import JobSpec
from data.prompt_format import check_rows, format_of
from data.rows import Format
from data.tables import Job
from serve.api import completions, embeddings, models
from serve.api.deps import Account, Caller, Running, json_response
from serve.api.embeddings import EmbeddingRequest
from serve.api.files import describe_file
from serve.api.fine_tuning import job_frames
from serve.api.json_route import StrictJsonRoute
from serve.api.middleware import ORGANIZATION
from serve.api.schemas import CompletionRequest, QueryModel, RequestModel
from serve.api.stream import EventStream, Frames
from serve.runtime import Runtime

MAX_LISTED = 100
MAX_SUFFIX = 40
FORMER_WEIGHT = 0.01  # of a prompt's tokens, beside 1 for a completion's
STATUS = {"validating_files": "pending", "queued": "pending", "paused": "pending"}

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class EngineCompletionRequest(CompletionRequest):
    """A completion whose model is named by the path."""

    model: str = ""


class EngineEmbeddingRequest(EmbeddingRequest):
    """Embeddings of a model that is named by the path."""

    model: str = ""


class FineTuneRequest(RequestModel):
    """`POST /v1/fine-tunes`."""

    training_file: str
    validation_file: str | None = None
    model: str | None = None
    n_epochs: int = Field(4, ge=1, le=50)
    batch_size: int | None = Field(None, ge=1, le=256)
    learning_rate_multiplier: float | None = Field(None, gt=0)
    suffix: str | None = Field(None, max_length=MAX_SUFFIX)
    prompt_loss_weight: float | None = Field(None, ge=0, le=1)
    compute_classification_metrics: bool | None = None
    classification_n_classes: int | None = None
    classification_positive_class: str | None = None
    classification_betas: list[float] | None = None

    def options(self) -> dict[str, Any]:
        """Return what it asks of a job beside hyperparameters: metrics at the end of each epoch.

        Raises:
            InvalidInput: Classes are told of, but no metrics asked for.
        """
        told = {
            name: value
            for name in ("n_classes", "positive_class", "betas")
            if (value := getattr(self, f"classification_{name}")) is not None
        }
        if self.compute_classification_metrics and self.validation_file is None:
            raise InvalidInput(
                "Missing required parameter: 'validation_file': classification metrics are of its "
                "rows.",
                param="validation_file",
                code="missing_required_parameter",
            )
        if self.compute_classification_metrics:
            _check_classes(told)
            return {"classification": told, "n_evals": self.n_epochs}
        if told:
            name = f"classification_{next(iter(told))}"
            raise InvalidInput(
                f"Invalid '{name}': it is used with 'compute_classification_metrics': true only.",
                param=name,
            )
        return {}


class EventsQuery(QueryModel):
    """Whether to follow the events."""

    stream: bool = False


@router.get("/engines")
async def list_engines(caller: Caller, runtime: Running) -> Response:
    """List the models as engines."""
    names = await models.names(runtime, caller)
    return json_response({"object": "list", "data": [_engine(n, caller, runtime) for n in names]})


@router.get("/engines/{model:path}")
async def retrieve_engine(model: str, caller: Caller, runtime: Running) -> Response:
    """Describe a model as an engine."""
    await runtime.models.resolve(caller.id, model)
    return json_response(_engine(model, caller, runtime))


@router.post("/engines/{model:path}/completions")
async def create_completion(
    model: str, body: EngineCompletionRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Continue each prompt, as `POST /v1/completions` does."""
    _check_model(model, body.model)
    named = body.model_copy(update={"model": model})
    return await completions.create_completion(named, request, caller, runtime)


@router.post("/engines/{model:path}/embeddings")
async def create_embeddings(
    model: str, body: EngineEmbeddingRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Embed texts, as `POST /v1/embeddings` does."""
    _check_model(model, body.model)
    named = body.model_copy(update={"model": model})
    return await embeddings.create_embeddings(named, request, caller, runtime)


@router.post("/fine-tunes")
async def create_fine_tune(body: FineTuneRequest, caller: Caller, runtime: Running) -> Response:
    """Queue a fine-tuning job."""
    chosen = {"n_epochs": body.n_epochs, "batch_size": body.batch_size}
    chosen["learning_rate_multiplier"] = body.learning_rate_multiplier  # type: ignore[assignment]
    options = body.options()
    weight = await run_in_threadpool(_prompt_weight, body, caller, runtime)
    if weight is not None:
        options["prompt_loss_weight"] = weight
    spec = JobSpec(
        options=options,
        model=body.model or runtime.models.base_model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        hyperparameters={name: value for name, value in chosen.items() if value is not None},
    )
    bases = await runtime.models.bases(caller.id)
    runtime.gate.check_money(caller.id)
    await run_in_threadpool(check_rows, runtime.files, caller.id, spec)
    job = await run_in_threadpool(
        jobs.create, runtime.database, caller.id, spec, bases, runtime.settings.limits
    )
    return json_response(await run_in_threadpool(_describe, runtime, caller, job, True))


@router.get("/fine-tunes")
async def list_fine_tunes(caller: Caller, runtime: Running) -> Response:
    """List the account's newest jobs, without their events."""
    found, _ = await run_in_threadpool(jobs.list_jobs, runtime.database, caller.id, MAX_LISTED)
    shown = [await run_in_threadpool(_describe, runtime, caller, job, False) for job in found]
    return json_response({"object": "list", "data": shown})


@router.get("/fine-tunes/{job_id}")
async def retrieve_fine_tune(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Describe a job with its events."""
    job = await run_in_threadpool(jobs.get, runtime.database, caller.id, job_id)
    return json_response(await run_in_threadpool(_describe, runtime, caller, job, True))


@router.post("/fine-tunes/{job_id}/cancel")
async def cancel_fine_tune(job_id: str, caller: Caller, runtime: Running) -> Response:
    """Cancel a job."""
    job = await run_in_threadpool(jobs.request_cancel, runtime.database, caller.id, job_id)
    return json_response(await run_in_threadpool(_describe, runtime, caller, job, True))


@router.get("/fine-tunes/{job_id}/events")
async def list_fine_tune_events(
    job_id: str,
    query: Annotated[EventsQuery, Query()],
    request: Request,
    caller: Caller,
    runtime: Running,
) -> Response:
    """List a job's events, oldest first; or stream them until it ends.

    Those of either begin after `after`, the id of an event as `/fine_tuning/jobs` tells it.
    """
    if query.stream:
        events = job_frames(runtime, request.state.principal, job_id, query.after)
        return await EventStream.begin(request, _frames(events))
    shown = await run_in_threadpool(_events, runtime, caller.id, job_id, query.after)
    return json_response({"object": "list", "data": shown})


async def _frames(events: Frames) -> Frames:
    async for found in events:
        yield [_former(event) for event in found]


def _prompt_weight(body: FineTuneRequest, caller: Account, runtime: Runtime) -> float | None:
    """Return the weight asked for; by default the one of that time, which only such rows have."""
    if body.prompt_loss_weight is not None:
        return body.prompt_loss_weight
    found = format_of(runtime.files, caller.id, body.training_file)
    return FORMER_WEIGHT if found is Format.PROMPT_COMPLETION else None


def _check_classes(told: dict[str, Any]) -> None:
    """Check the classes, and name the fields as this route does."""
    try:
        check_section("classification", told)
    except InvalidInput as error:
        message = error.message.replace("'classification.", "'classification_")
        param = (error.param or "").replace("classification.", "classification_")
        raise InvalidInput(message, param=param, code=error.code) from error


def _check_model(engine: str, model: str) -> None:
    if model and model != engine:
        raise InvalidInput(
            f"Invalid 'model': the path names the engine '{engine}', but got '{model}' instead. "
            "Leave 'model' out.",
            param="model",
        )


def _former(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event of a job as one of a fine-tune."""
    kept = {name: event[name] for name in ("created_at", "level", "message")}
    return {"object": "fine-tune-event", **kept}


def _engine(model: str, caller: Account, runtime: Runtime) -> dict[str, Any]:
    owner = "system" if model == runtime.models.base_model else caller.slug
    return {"id": model, "object": "engine", "owner": owner, "ready": True, "created": None}


def _describe(runtime: Runtime, caller: Account, job: Job, with_events: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "id": job.id,
        "object": "fine-tune",
        "created_at": job.created_at,
        "updated_at": job.finished_at or job.started_at or job.created_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANIZATION,
        "status": STATUS.get(job.status, job.status),
        "hyperparams": _hyperparams(job),
        "training_files": _files(runtime, caller, [job.training_file]),
        "validation_files": _files(runtime, caller, [job.validation_file]),
        "result_files": _files(runtime, caller, job.result_files),
    }
    if with_events:
        described["events"] = _events(runtime, caller.id, job.id)
    return described


def _hyperparams(job: Job) -> dict[str, Any]:
    if job.method["type"] != "supervised":
        return job.hyperparameters
    weight = job.options.get("prompt_loss_weight", 0.0)
    shown: dict[str, Any] = {**job.hyperparameters, "prompt_loss_weight": weight}
    if "classification" in job.options:
        shown["compute_classification_metrics"] = True
        for name, value in job.options["classification"].items():
            shown[f"classification_{name}"] = value
    return shown


def _files(runtime: Runtime, caller: Account, ids: list[str | None]) -> list[dict[str, Any]]:
    found = runtime.files.find_all(caller.id, [file_id for file_id in ids if file_id is not None])
    return [describe_file(record) for record in found]


def _events(
    runtime: Runtime, account_id: str, job_id: str, after: str | None = None
) -> list[dict[str, Any]]:
    """Return a job's events after one of them, or all, oldest first."""
    seq = job_events.position_of(runtime.database, account_id, job_id, after)
    found, _ = job_events.events_since(runtime.database, account_id, job_id, seq)
    return [
        _former({"created_at": e.created_at, "level": e.level, "message": e.message}) for e in found
    ]

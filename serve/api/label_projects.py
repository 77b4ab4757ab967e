"""`/v1/label_projects`: what labelers judge, and what came of it; for owners and members."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput
from data.feedback import export, gates, imports, projects, reports, tasks
from data.feedback.projects import Gates, ProjectSpec
from data.tables_feedback import LabelProject, LabelTask
from serve.api.deps import Caller, Running, json_response
from serve.api.files import describe_file
from serve.api.generation import unless_disconnected
from serve.api.json_route import StrictJsonRoute
from serve.api.label_samples import SampleTasks, sample
from serve.api.schemas import RequestModel
from serve.runtime import Runtime

MAX_TASKS = 10_000  # in one call; more come by file

router = APIRouter(prefix="/v1/label_projects", route_class=StrictJsonRoute)
task_router = APIRouter(prefix="/v1/label_tasks", route_class=StrictJsonRoute)


class GatesRequest(RequestModel):
    """What pauses a labeler; null does not."""

    min_gold_accuracy: float | None = None
    min_gold: int = 5
    min_seconds: float | None = None
    max_side_share: float | None = None
    max_skip_share: float | None = None


class CreateProject(RequestModel):
    """A labeling project; see docs/feedback.md."""

    name: str
    kind: str
    label: dict[str, Any] = Field(default_factory=dict)
    guidelines: str = ""
    overlap: int = 1
    overlap_share: float = 1.0
    gold_rate: float = 0.0
    training_tasks: int = 0
    lease_minutes: int = 30
    seed: int = 0
    gates: GatesRequest = Field(default_factory=GatesRequest)


class UpdateProject(RequestModel):
    """What to change: the state, the guidelines, or both."""

    status: str | None = None
    guidelines: str | None = None


class AddTasks(RequestModel):
    """Tasks, or a file of the account that holds them."""

    tasks: list[dict[str, Any]] | None = Field(None, max_length=MAX_TASKS)
    file_id: str | None = None
    as_gold: bool = False


class ExportProject(RequestModel):
    """What to make of the judgements."""

    kind: str = "preference"
    votes: str = "majority"


class PauseLabeler(RequestModel):
    """Why a labeler is paused; they are told."""

    reason: str = Field("paused by the project's admin", max_length=500)


class Settle(RequestModel):
    """The answer that stands in place of the labelers'; letters name the candidates in order."""

    choice: str | None = None
    strength: int | None = None
    ranking: dict[str, int] | None = None
    axes: dict[str, int] | None = None
    thumb: bool | None = None
    text: str | None = None


@router.post("")
async def create_project(body: CreateProject, caller: Caller, runtime: Running) -> Response:
    """Make a labeling project."""
    fields = body.model_dump(exclude={"gates"})
    spec = ProjectSpec(**fields, gates=Gates(**body.gates.model_dump()))
    made = await run_in_threadpool(projects.create, runtime.database, caller.id, spec)
    return json_response(describe(made))


@router.get("")
async def list_projects(caller: Caller, runtime: Running) -> Response:
    """List the account's labeling projects, newest first."""
    found = await run_in_threadpool(projects.list_all, runtime.database, caller.id)
    return json_response({"object": "list", "data": [describe(project) for project in found]})


@router.get("/{label_project_id}")
async def retrieve_project(label_project_id: str, caller: Caller, runtime: Running) -> Response:
    """Return a labeling project."""
    found = await run_in_threadpool(projects.get, runtime.database, caller.id, label_project_id)
    return json_response(describe(found))


@router.post("/{label_project_id}")
async def update_project(
    label_project_id: str, body: UpdateProject, caller: Caller, runtime: Running
) -> Response:
    """Open, pause or close a project, or add a version of its guidelines."""
    given = (runtime.database, caller.id, label_project_id)
    if body.guidelines is not None:
        await run_in_threadpool(projects.update_guidelines, *given, body.guidelines)
    if body.status is not None:
        await run_in_threadpool(projects.set_status, *given, body.status)
    return json_response(describe(await run_in_threadpool(projects.get, *given)))


@router.post("/{label_project_id}/tasks")
async def add_tasks(
    label_project_id: str, body: AddTasks, caller: Caller, runtime: Running
) -> Response:
    """Add tasks, all or none."""
    count = await run_in_threadpool(_add, runtime, caller.id, label_project_id, body)
    return json_response({"object": "label_project.tasks", "added": count})


@router.post("/{label_project_id}/sample")
async def sample_tasks(
    label_project_id: str, body: SampleTasks, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Have models answer prompts, and add their answers as tasks."""
    work = sample(runtime, request, caller.id, label_project_id, body)
    found = await unless_disconnected(request, work)
    return json_response({"object": "label_project.tasks", **asdict(found)})


@router.get("/{label_project_id}/progress")
async def retrieve_progress(label_project_id: str, caller: Caller, runtime: Running) -> Response:
    """Tell how far the project has come."""
    found = await run_in_threadpool(reports.progress, runtime.database, caller.id, label_project_id)
    return json_response({"object": "label_project.progress", **asdict(found)})


@router.get("/{label_project_id}/report")
async def retrieve_report(label_project_id: str, caller: Caller, runtime: Running) -> Response:
    """Tell agreement, gold accuracy, biases, labelers, and strengths of the models."""
    found = await run_in_threadpool(reports.report, runtime.database, caller.id, label_project_id)
    return json_response({"object": "label_project.report", **asdict(found)})


@router.get("/{label_project_id}/disagreements")
async def list_disagreements(label_project_id: str, caller: Caller, runtime: Running) -> Response:
    """List tasks on which labelers name different best answers."""
    found = await run_in_threadpool(
        tasks.disagreements, runtime.database, caller.id, label_project_id
    )
    return json_response({"object": "list", "data": [_disagreement(entry) for entry in found]})


@router.get("/{label_project_id}/flags")
async def list_flags(label_project_id: str, caller: Caller, runtime: Running) -> Response:
    """List tasks whose content labelers flagged, newest first."""
    found = await run_in_threadpool(tasks.flags, runtime.database, caller.id, label_project_id)
    told = [{**_task(f.task), "labeler": f.labeler, "reason": f.reason} for f in found]
    return json_response({"object": "list", "data": told})


@router.post("/{label_project_id}/export")
async def export_project(
    label_project_id: str, body: ExportProject, caller: Caller, runtime: Running
) -> Response:
    """Write the judgements as a file of rows to train on, which says where they came from."""
    made = await run_in_threadpool(
        export.freeze,
        *(runtime.database, runtime.files, caller.id, label_project_id),
        *(body.kind, body.votes),
    )
    return json_response(describe_file(made))


@router.post("/{label_project_id}/labelers/{labeler}/pause")
async def pause_labeler(
    label_project_id: str, labeler: str, body: PauseLabeler, caller: Caller, runtime: Running
) -> Response:
    """Give a labeler no more tasks, and their work to others."""
    count = await run_in_threadpool(
        gates.pause_labeler, runtime.database, caller.id, label_project_id, labeler, body.reason
    )
    return json_response({"object": "labeler", "labeler": labeler, "paused": True, "taken": count})


@router.post("/{label_project_id}/labelers/{labeler}/resume")
async def resume_labeler(
    label_project_id: str, labeler: str, caller: Caller, runtime: Running
) -> Response:
    """Let a labeler go on."""
    count = await run_in_threadpool(
        gates.resume_labeler, runtime.database, caller.id, label_project_id, labeler
    )
    told = {"object": "labeler", "labeler": labeler, "paused": False, "counted": count}
    return json_response(told)


@task_router.post("/{task_id}/settle")
async def settle_task(task_id: str, body: Settle, caller: Caller, runtime: Running) -> Response:
    """Decide a task on which labelers differ."""
    given = body.model_dump(exclude_none=True)
    made = await run_in_threadpool(
        tasks.settle, runtime.database, caller.id, task_id, caller.id, given
    )
    return json_response(_task(made))


@task_router.delete("/{task_id}")
async def drop_task(task_id: str, caller: Caller, runtime: Running) -> Response:
    """Take a task out of the queue; its judgements stay."""
    await run_in_threadpool(tasks.drop, runtime.database, caller.id, task_id)
    return json_response({"id": task_id, "object": "label_task.deleted", "deleted": True})


def _add(runtime: Runtime, account: str, label_project_id: str, body: AddTasks) -> int:
    if (body.tasks is None) == (body.file_id is None):
        raise InvalidInput("Give either 'tasks' or 'file_id'.", param="tasks")
    if body.tasks is not None:
        found = [imports.read_task(value) for value in body.tasks]
    else:
        projects.get(runtime.database, account, label_project_id)
        with tempfile.TemporaryDirectory() as scratch:
            path = runtime.files.place(account, body.file_id or "", Path(scratch))
            found = imports.read_tasks(path, as_gold=body.as_gold)
    return tasks.add(runtime.database, account, label_project_id, found)


def describe(project: LabelProject) -> dict[str, Any]:
    """Return a labeling project as the API tells it."""
    names = ("id", "created_at", "name", "kind", "label", "status", "overlap", "overlap_share")
    more = ("gold_rate", "training_tasks", "lease_minutes", "seed", "gates", "guidelines_version")
    told = {name: getattr(project, name) for name in (*names, *more)}
    return {"object": "label_project", **told, "tasks": project.tasks_added}


def _task(task: LabelTask) -> dict[str, Any]:
    names = ("id", "prompt", "status", "judged", "wanted", "settled")
    return {"object": "label_task", **{name: getattr(task, name) for name in names}}


def _disagreement(entry: tasks.Disagreement) -> dict[str, Any]:
    order = range(len(entry.candidates))
    return {
        **_task(entry.task),
        "candidates": [{"text": c.text, "model": c.model} for c in entry.candidates],
        "votes": [
            {"labeler": labeler, **tasks.shown_answer(answer, order)}
            for labeler, answer in entry.votes
        ],
    }

"""`/v1/comparisons`: the tasks of whoever calls, for keys of every role; a labeler has no others.

Whoever labels is known by their key; owners and members may label for somebody, by name.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import Forbidden
from data.feedback import judgements, leases, projects, reports
from data.feedback.judgements import Answer
from serve.api.deps import Caller, Running, json_response
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import PlainQuery, RequestModel

router = APIRouter(prefix="/v1/comparisons", route_class=StrictJsonRoute)
MAX_NAME = 64


class WhichProject(PlainQuery):
    """Of which labeling project."""

    label_project_id: str
    labeler: str | None = Field(None, min_length=1, max_length=MAX_NAME)


class AnswerRequest(RequestModel):
    """What the labeler says, with the letters that were shown."""

    choice: str | None = None
    strength: int | None = None
    ranking: dict[str, int] | None = None
    axes: dict[str, int] | None = None
    thumb: bool | None = None
    text: str | None = None
    timings: dict[str, int] = Field(default_factory=dict)
    labeler: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    amend: bool = False


class RefuseRequest(RequestModel):
    """Why a task is skipped or flagged."""

    reason: str = ""
    labeler: str | None = Field(None, min_length=1, max_length=MAX_NAME)


class NamedLabeler(RequestModel):
    """Who labels, if not the key."""

    labeler: str | None = Field(None, min_length=1, max_length=MAX_NAME)


@router.get("")
async def list_open_projects(caller: Caller, runtime: Running) -> Response:
    """List the labeling projects that give out tasks."""
    found = await run_in_threadpool(projects.list_all, runtime.database, caller.id)
    told = [
        {"id": p.id, "object": "label_project", "name": p.name, "kind": p.kind, "label": p.label}
        for p in found
        if p.status == "open"
    ]
    return json_response({"object": "list", "data": told})


@router.get("/guidelines")
async def read_guidelines(
    query: Annotated[WhichProject, Query()], caller: Caller, runtime: Running
) -> Response:
    """Return a project's guidelines, in Markdown."""
    version, text = await run_in_threadpool(
        projects.guidelines, runtime.database, caller.id, query.label_project_id
    )
    return json_response({"object": "label_guidelines", "version": version, "text": text})


@router.get("/progress")
async def own_progress(
    query: Annotated[WhichProject, Query()], request: Request, caller: Caller, runtime: Running
) -> Response:
    """Tell what the labeler has done in a project."""
    name = _labeler(request, query.labeler)
    found = await run_in_threadpool(
        reports.progress, runtime.database, caller.id, query.label_project_id, name
    )
    return json_response({"object": "label_progress", "labeler": name, **asdict(found)})


@router.get("/next")
async def next_comparison(
    query: Annotated[WhichProject, Query()], request: Request, caller: Caller, runtime: Running
) -> Response:
    """Give the labeler a task, the one in their hands first; `comparison` is null without one."""
    name = _labeler(request, query.labeler)
    shown = await run_in_threadpool(
        leases.next_task, runtime.database, caller.id, query.label_project_id, name
    )
    told: dict[str, Any] | None = None
    if shown is not None:
        told = {"id": shown.assignment_id, "object": "comparison", **asdict(shown)}
        del told["assignment_id"]
    return json_response({"object": "comparison.next", "comparison": told})


@router.post("/{assignment_id}")
async def answer_comparison(
    assignment_id: str, body: AnswerRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Answer a task; with `amend`, in place of an earlier answer."""
    name = _labeler(request, body.labeler)
    answer = Answer(**body.model_dump(exclude={"labeler", "amend"}))
    given = (runtime.database, caller.id, assignment_id, name, answer)
    told: dict[str, Any]
    if body.amend:
        made = await run_in_threadpool(judgements.amend, *given)
        told = {"counted": made.counts, "note": None, "right": None}
    else:
        submitted = await run_in_threadpool(judgements.submit, *given)
        made = submitted.judgement
        told = {
            "counted": submitted.counted,
            "note": submitted.note,
            "right": submitted.right,
        }
    return json_response({"id": made.id, "object": "judgement", **told})


@router.post("/{assignment_id}/skip")
async def skip_comparison(
    assignment_id: str, body: RefuseRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Leave a task to others."""
    name = _labeler(request, body.labeler)
    made = await run_in_threadpool(
        judgements.skip, runtime.database, caller.id, assignment_id, name, body.reason
    )
    return json_response({"id": made.id, "object": "judgement", "kind": made.kind})


@router.post("/{assignment_id}/flag")
async def flag_comparison(
    assignment_id: str, body: RefuseRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Skip a task and have its content looked at."""
    name = _labeler(request, body.labeler)
    made = await run_in_threadpool(
        judgements.flag, runtime.database, caller.id, assignment_id, name, body.reason
    )
    return json_response({"id": made.id, "object": "judgement", "kind": made.kind})


@router.post("/{assignment_id}/renew")
async def renew_comparison(
    assignment_id: str, body: NamedLabeler, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Keep a task in hand for longer."""
    name = _labeler(request, body.labeler)
    ends = await run_in_threadpool(leases.renew, runtime.database, caller.id, assignment_id, name)
    return json_response({"id": assignment_id, "object": "comparison", "expires_at": ends})


@router.post("/{assignment_id}/release")
async def release_comparison(
    assignment_id: str, body: NamedLabeler, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Give a task back unjudged."""
    name = _labeler(request, body.labeler)
    await run_in_threadpool(leases.release, runtime.database, caller.id, assignment_id, name)
    return json_response({"id": assignment_id, "object": "comparison.released", "released": True})


def _labeler(request: Request, named: str | None) -> str:
    """Return who labels; raises Forbidden where a labeler's key names another."""
    principal = request.state.principal
    if named is None:
        return str(principal.key_id)
    if principal.role == "labeler":
        raise Forbidden("A labeler's key labels for itself; leave 'labeler' out.")
    return named

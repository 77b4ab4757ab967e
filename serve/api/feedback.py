"""`/v1/feedback`: what users say of stored completions, and what an account keeps of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput
from data.feedback import export, privacy, users
from data.feedback.users import Said
from serve.api.deps import Caller, Running, json_response, page
from serve.api.files import describe_file
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel

MAX_LIMIT = 100

router = APIRouter(prefix="/v1/feedback", route_class=StrictJsonRoute)


class GiveFeedback(RequestModel):
    """One thing that a user says of a completion; exactly one of the four."""

    completion_id: str
    index: int = Field(0, ge=0)
    thumb: bool | None = None
    rating: int | None = None
    preferred_over: str | None = None
    correction: str | None = None
    user: str | None = None


class ListFeedback(QueryModel):
    """Which part of the list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


class FeedbackPolicyRequest(RequestModel):
    """Whether feedback is kept, and how long; null keeps it."""

    consent: bool = True
    retention_days: int | None = None


class ExportRequest(RequestModel):
    """What to make of the feedback: preference, unpaired, sft or raw rows."""

    kind: str = "preference"
    model: str | None = None


@router.post("")
async def give_feedback(body: GiveFeedback, caller: Caller, runtime: Running) -> Response:
    """Keep what a user says of a stored completion."""
    said = Said(
        body.thumb, body.rating, body.preferred_over, body.correction, body.index, body.user
    )
    made = await run_in_threadpool(
        users.give, runtime.database, caller.id, body.completion_id, said
    )
    return json_response(users.describe(made))


@router.get("")
async def list_feedback(
    query: Annotated[ListFeedback, Query()], caller: Caller, runtime: Running
) -> Response:
    """List the account's feedback, newest first."""
    found, has_more = await run_in_threadpool(
        users.list_feedback, runtime.database, caller.id, query.limit, query.after
    )
    return page([users.describe(one) for one in found], has_more)


@router.get("/policy")
async def retrieve_policy(caller: Caller, runtime: Running) -> Response:
    """Tell whether the account keeps feedback, and how long."""
    return json_response(await run_in_threadpool(_policy, runtime.database, caller.id))


@router.post("/policy")
async def update_policy(body: FeedbackPolicyRequest, caller: Caller, runtime: Running) -> Response:
    """Give or withdraw consent, and say how long feedback is kept."""
    await run_in_threadpool(
        lambda: privacy.set_policy(
            runtime.database,
            caller.id,
            consent=body.consent,
            retention_days=body.retention_days,
        )
    )
    return json_response(await run_in_threadpool(_policy, runtime.database, caller.id))


@router.post("/export")
async def export_feedback(body: ExportRequest, caller: Caller, runtime: Running) -> Response:
    """Write the account's feedback as a file of rows to train on."""

    def freeze() -> Any:
        made = users.rows(runtime.database, caller.id, body.kind, body.model)
        if not made:
            raise InvalidInput(f"There is no feedback to export as {body.kind}.", param="kind")
        purpose = "feedback" if body.kind == "raw" else "fine-tune"
        name = f"feedback-{body.kind}.jsonl"
        return runtime.files.create(caller.id, export.lines(made), name, purpose)

    return json_response(describe_file(await run_in_threadpool(freeze)))


@router.delete("/users/{end_user}")
async def delete_end_user(end_user: str, caller: Caller, runtime: Running) -> Response:
    """Delete what the account holds of an end user: feedback, stored answers, tasks."""
    counts = await run_in_threadpool(privacy.delete_end_user, runtime.database, caller.id, end_user)
    return json_response({"object": "feedback.user.deleted", "user": end_user, **counts})


def _policy(database: Any, account: str) -> dict[str, Any]:
    found = privacy.get_policy(database, account)
    return {
        "object": "feedback.policy",
        "consent": found.consent,
        "retention_days": found.retention_days,
    }

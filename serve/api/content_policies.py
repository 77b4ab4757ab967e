"""`/v1/organization/projects/{id}/content_policy` and its neighbours: content control, for
operators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import content, content_events
from data.content import Policy
from data.tables_content import BlockedUser, ContentEvent
from serve.api.deps import Operator, Running, json_response, page
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import INT32_MAX, QueryModel, RequestModel

MAX_LIMIT = 100
Mode = Literal["off", "score", "block"]

router = APIRouter(prefix="/v1/organization/projects/{project_id}", route_class=StrictJsonRoute)


class PolicyRequest(RequestModel):
    """A whole policy; what is left out is off."""

    input: Mode = "off"
    output: Mode = "off"
    training: Mode = "off"
    rules: list[dict[str, Any]] = Field(default_factory=list)
    case_after: int | None = Field(None, ge=1, le=INT32_MAX)
    block_user_after: int | None = Field(None, ge=1, le=INT32_MAX)


class BlockRequest(RequestModel):
    """Whom to shut out: what the account sends as `safety_identifier` or `user`."""

    identifier: str


class ListEvents(QueryModel):
    """Which part of the list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)


@router.get("/content_policy")
async def get_policy(project_id: str, _key: Operator, runtime: Running) -> Response:
    """Return an account's policy."""
    policy = await run_in_threadpool(content.get, runtime.database, project_id)
    return json_response(_describe(policy))


@router.post("/content_policy")
async def set_policy(
    project_id: str, body: PolicyRequest, _key: Operator, runtime: Running
) -> Response:
    """Replace an account's policy; it holds from the next request on."""
    rules = content.read_rules(body.rules, runtime.moderator.classifier)
    policy = Policy(**(body.model_dump(exclude={"rules"})), rules=rules)
    await run_in_threadpool(content.replace_policy, runtime.database, project_id, policy)
    await run_in_threadpool(runtime.moderator.refresh)
    return json_response(_describe(policy))


@router.get("/content_events")
async def list_events(
    project_id: str, query: Annotated[ListEvents, Query()], _key: Operator, runtime: Running
) -> Response:
    """List what broke the policy, newest first; the texts are not kept."""
    found, has_more = await run_in_threadpool(
        content_events.list_events, runtime.database, project_id, query.limit, query.after
    )
    return page([_event(event) for event in found], has_more)


@router.get("/blocked_identifiers")
async def list_blocked(project_id: str, _key: Operator, runtime: Running) -> Response:
    """List the end users who are shut out."""
    found = await run_in_threadpool(content_events.list_blocked, runtime.database, project_id)
    return page([_blocked(user) for user in found], False)


@router.post("/blocked_identifiers")
async def block_identifier(
    project_id: str, body: BlockRequest, _key: Operator, runtime: Running
) -> Response:
    """Shut an end user out; the account's webhooks are told."""
    made = await run_in_threadpool(
        content_events.block_user, runtime.database, project_id, body.identifier
    )
    await run_in_threadpool(runtime.moderator.refresh)
    return json_response(_blocked(made))


@router.delete("/blocked_identifiers/{identifier:path}")
async def unblock_identifier(
    project_id: str, identifier: str, _key: Operator, runtime: Running
) -> Response:
    """Let an end user call again."""
    await run_in_threadpool(content_events.unblock_user, runtime.database, project_id, identifier)
    await run_in_threadpool(runtime.moderator.refresh)
    kind = "safety.blocked_identifier.deleted"
    return json_response({"id": identifier, "object": kind, "deleted": True})


def _describe(policy: Policy) -> dict[str, Any]:
    return {
        "object": "project.content_policy",
        **{side: policy.mode(side) for side in content.SIDES},
        "rules": [rule.to_dict() for rule in policy.rules],
        "case_after": policy.case_after,
        "block_user_after": policy.block_user_after,
    }


def _event(event: ContentEvent) -> dict[str, Any]:
    names = ("id", "created_at", "side", "mode", "matched", "end_user", "model", "request_id")
    return {"object": "content_event", **{name: getattr(event, name) for name in names}}


def _blocked(user: BlockedUser) -> dict[str, Any]:
    return {
        "id": user.identifier,
        "object": "safety.blocked_identifier",
        "reason": user.reason,
        "created_at": user.created_at,
    }

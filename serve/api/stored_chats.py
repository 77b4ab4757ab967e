"""`GET /v1/chat/completions` and below: what was stored on request, and feedback as metadata."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import stored_chats
from data.errors import InvalidInput
from data.feedback import users
from data.tables_surface import ChatRecord
from serve.api.deps import Caller, Running, json_response, page
from serve.api.errors import unknown_parameter
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import QueryModel, RequestModel

MAX_LIMIT = 100
HIDDEN = ("token_ids", "user")  # kept for learning from feedback
METADATA_FILTER = re.compile(r"metadata\[(.+)\]")

router = APIRouter(prefix="/v1/chat/completions", route_class=StrictJsonRoute)


class ListChats(QueryModel):
    """Which to list; `metadata[key]=value` filters too, read apart."""

    model_config = ConfigDict(extra="ignore")

    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    order: Literal["asc", "desc"] = "asc"
    model: str | None = None


class ListMessages(QueryModel):
    """Which messages to list."""

    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    order: Literal["asc", "desc"] = "asc"


class UpdateChat(RequestModel):
    """The metadata that replaces what was there; null removes it."""

    metadata: dict[str, str] | None = None


@router.get("")
async def list_chats(
    query: Annotated[ListChats, Query()], request: Request, caller: Caller, runtime: Running
) -> Response:
    """List the account's stored chat completions, oldest first unless asked otherwise."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.items():
        match = METADATA_FILTER.fullmatch(name)
        if match:
            wanted[match[1]] = value
        elif name not in ListChats.model_fields:
            raise unknown_parameter(name, list(ListChats.model_fields))
    found, has_more = await run_in_threadpool(
        lambda: stored_chats.list_chats(
            runtime.database, caller.id, **query.model_dump(), metadata=wanted
        )
    )
    return page([_describe(record) for record in found], has_more)


@router.get("/{completion_id}")
async def retrieve_chat(completion_id: str, caller: Caller, runtime: Running) -> Response:
    """Return a stored chat completion."""
    record = await run_in_threadpool(stored_chats.get, runtime.database, caller.id, completion_id)
    return json_response(_describe(record))


@router.post("/{completion_id}")
async def update_chat(
    completion_id: str, body: UpdateChat, caller: Caller, runtime: Running
) -> Response:
    """Replace the metadata of a stored chat completion."""
    record = await run_in_threadpool(
        stored_chats.update, runtime.database, caller.id, completion_id, body.metadata
    )
    await run_in_threadpool(
        users.read_metadata, runtime.database, caller.id, completion_id, body.metadata
    )
    return json_response(_describe(record))


@router.delete("/{completion_id}")
async def delete_chat(completion_id: str, caller: Caller, runtime: Running) -> Response:
    """Forget a stored chat completion."""
    await run_in_threadpool(stored_chats.delete, runtime.database, caller.id, completion_id)
    return json_response(
        {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
    )


@router.get("/{completion_id}/messages")
async def list_messages(
    completion_id: str,
    query: Annotated[ListMessages, Query()],
    caller: Caller,
    runtime: Running,
) -> Response:
    """List the messages that a stored chat completion answered."""
    record = await run_in_threadpool(stored_chats.get, runtime.database, caller.id, completion_id)
    messages = [
        {"id": f"{record.id}-{index}", "name": None, "content_parts": None, **message}
        for index, message in enumerate(record.messages)
    ]
    if query.order == "desc":
        messages.reverse()
    ids = [message["id"] for message in messages]
    if query.after is not None:
        if query.after not in ids:
            raise InvalidInput(f"Invalid 'after': no message {query.after}", param="after")
        messages = messages[ids.index(query.after) + 1 :]
    return page(messages[: query.limit], len(messages) > query.limit)


def _describe(record: ChatRecord) -> dict[str, Any]:
    request = {name: v for name, v in record.request.items() if name not in HIDDEN}
    return {**record.completion, **request, "metadata": record.metadata_}

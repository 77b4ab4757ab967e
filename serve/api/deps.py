"""What routes ask for: who calls, what runs, and how JSON goes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from starlette.responses import Response

from data.accounts import Principal
from data.errors import Forbidden
from data.model_rules import ModelRules
from serve.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Account:
    """The account that calls; `models` are those that it may use, None if they are to be read."""

    id: str
    slug: str
    models: ModelRules | None = None


async def _runtime(request: Request) -> Runtime:
    request.state.route = request.scope["route"].path  # for the metrics: every route passes here
    runtime: Runtime = request.app.state.runtime
    return runtime


async def _account(request: Request) -> Account:
    principal: Principal = request.state.principal
    if principal.project_id is None or principal.project_slug is None:
        raise Forbidden("An admin key manages accounts; use the API key of an account here.")
    return Account(principal.project_id, principal.project_slug, principal.models)


async def _operator(request: Request) -> Principal:
    principal: Principal = request.state.principal
    if principal.project_id is not None:
        raise Forbidden("This needs an admin key; `hone admin-keys create` makes one.")
    return principal


async def _any_key(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


Running = Annotated[Runtime, Depends(_runtime)]
Caller = Annotated[Account, Depends(_account)]  # the key of an account
Operator = Annotated[Principal, Depends(_operator)]  # an admin key
AnyKey = Annotated[Principal, Depends(_any_key)]  # either


def is_batch(request: Request) -> bool:
    """Tell whether a request is a line of a batch, which the batch runner asks."""
    return getattr(request.state, "batch", False)


def json_response(body: Any) -> Response:
    """Send an object, or a list of them, as JSON."""
    return Response(orjson.dumps(body), media_type="application/json")


def page(data: list[dict[str, Any]], has_more: bool) -> Response:
    """Send one page of a list, in the shape of every list of the API."""
    return json_response(
        {
            "object": "list",
            "data": data,
            "has_more": has_more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )

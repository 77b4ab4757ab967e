"""What every request passes through before it reaches a route.

`RequestContext` names the request, times it, logs it and turns a bug into a 500 that says where to
look. `Authentication` lets nobody in without a key, before the body is read; but
for /health, and the API's description, which tell nothing of any account. It refuses control
characters in the path, and NUL in the query, before it looks at the key: routes, roles and
databases do not read them alike. `BodyLimit` refuses what is too large while it arrives. Plain ASGI
classes: they add no task and leave the disconnect message to whoever streams.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data import accounts, audit, roles
from data.accounts import Principal
from data.db import Database
from data.errors import Forbidden, NotFound, ToolkitError, Unauthorized
from data.tables import new_id
from data.uploads import MAX_PART_BYTES
from serve.api.errors import error_response, for_exception, has_nul, stopping
from serve.logs import FIELDS

API_VERSION = "2020-10-01"
ORGANIZATION = "org-hone"  # one installation is one organization; its accounts are projects
OPEN_PATHS = {"/health", "/docs", "/openapi.json"}
OPEN_POSTS = {"/v1/access_requests"}  # anybody may ask; the route limits how often
PAGES = "/web/"  # have sessions of their own
CASES = "/v1/safety/cases/"  # what a suspended account may still read
UPLOAD_PATHS = ("/v1/files", "/v1/adapters")
PARTS = re.compile(r"/v1/uploads/[^/]+/parts")
MIB = 1 << 20
MAX_JSON_BYTES = 32 * MIB
MULTIPART_OVERHEAD_BYTES = MIB

log = logging.getLogger("hone.requests")


class RequestContext:
    """Give each request an id and a clock, and each response the headers that carry them."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, int, float], None]):
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id("req_", 32)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
                headers["openai-version"] = API_VERSION
                headers["openai-organization"] = ORGANIZATION
                headers["openai-processing-ms"] = str(_elapsed_ms(started))
                headers.update(scope["state"].get("rate_headers", {}))
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if not status:  # the server stops, and its grace is over
                await error_response(stopping())(scope, receive, send_with_headers)
            raise
        except Exception as error:
            log.exception("%s %s %s", request_id, scope["method"], roles.printable(scope["path"]))
            if status:
                raise  # the response has begun: the server resets the connection
            response = error_response(for_exception(error, request_id))
            await response(scope, receive, send_with_headers)
        finally:
            # The route's pattern, not the path: metrics must not grow with the ids asked for.
            route = scope["state"].get("route", "none")
            self.observe(route, status, time.perf_counter() - started)
            _log(request_id, scope, route, status, _elapsed_ms(started))


class Authentication:
    """Find out who calls; the `Principal` is left in the request's state."""

    def __init__(self, app: ASGIApp, database: Callable[[], Database]):
        self.app = app
        self.database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        odd = _odd_characters(scope) if scope["type"] == "http" else None
        if odd is not None:
            await error_response(odd)(scope, receive, send)
            return
        if scope["type"] == "http" and not _is_open(scope):
            headers = Headers(scope=scope)
            try:
                principal = await run_in_threadpool(
                    accounts.authenticate,
                    self.database(),
                    _bearer(headers),
                    also_closed=scope["path"].startswith(CASES),
                )
                _check_claimed_account(headers, principal)
                if principal.project_id is not None:
                    roles.check(principal.role, scope["method"], scope["path"])
            except ToolkitError as error:
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["principal"] = principal
            audit.actor.set(_actor(scope, principal.key_id))
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuse a body that is larger than its route allows, at the first byte too many."""

    def __init__(self, app: ASGIApp, max_upload_mb: int):
        self.app = app
        self.max_upload_bytes = max_upload_mb * MIB + MULTIPART_OVERHEAD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await error_response(_too_large(limit))(scope, receive, send)
            return
        await self.app(scope, _counting(receive, limit), send)

    def _limit(self, path: str) -> int:
        if path in UPLOAD_PATHS:
            return self.max_upload_bytes
        return (
            MAX_PART_BYTES + MULTIPART_OVERHEAD_BYTES if PARTS.fullmatch(path) else MAX_JSON_BYTES
        )


def _odd_characters(scope: Scope) -> ToolkitError | None:
    """Return the error of a path or query that holds what no name of hone holds."""
    if roles.CONTROL.search(scope["path"]):
        shown = roles.printable(scope["path"])
        return NotFound(f"Invalid URL ({scope['method']} {shown})", code="unknown_url")
    query = scope["query_string"]
    held = QueryParams(query).multi_items() if b"%00" in query or b"\0" in query else ()
    for name, value in held:
        if "\0" in name + value:
            return has_nul(name.replace("\0", "\\0"))
    return None


def _is_open(scope: Scope) -> bool:
    posted = scope["method"] == "POST" and scope["path"] in OPEN_POSTS
    if posted:
        audit.actor.set(_actor(scope, None))
    return posted or scope["path"] in OPEN_PATHS or scope["path"].startswith(PAGES)


def _actor(scope: Scope, key_id: str | None) -> audit.Actor:
    client = scope.get("client")
    return audit.Actor(key_id, client[0] if client else None, scope["state"]["request_id"])


def _log(request_id: str, scope: Scope, route: str, status: int, took_ms: int) -> None:
    principal: Principal | None = scope["state"].get("principal")
    fields = {
        "request_id": request_id,
        "account": None if principal is None else principal.project_id,
        "key": None if principal is None else principal.key_id,
        "method": scope["method"],
        "route": route,
        "status": status,
        "ms": took_ms,
        "tokens": scope["state"].get("tokens"),
    }
    log.info(
        "%s %s %s -> %d in %d ms",
        *(request_id, scope["method"], roles.printable(scope["path"]), status, took_ms),
        extra={FIELDS: fields},
    )


def _counting(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    received = 0

    async def receive_counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            # An HTTPException passes through the framework's body parsing; others are rewritten.
            raise HTTPException(413, str(_too_large(limit)))
        return message

    return receive_counted


def _too_large(limit: int) -> ToolkitError:
    return ToolkitError(
        f"The request body is larger than {limit // MIB} MiB, the most this route accepts.",
        code="file_too_large",
    )


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        error = Unauthorized(
            "You didn't provide an API key. Send it in the Authorization header: "
            "Authorization: Bearer YOUR_KEY."
        )
        error.code = None  # type: ignore[assignment]  # nothing was presented that could be invalid
        raise error
    return key.strip()


def _check_claimed_account(headers: Headers, principal: Principal) -> None:
    """A client may name its organization and project; a name that is not the key's is an error."""
    for header, own in (
        ("openai-organization", ORGANIZATION),
        ("openai-project", principal.project_id),
    ):
        claimed = headers.get(header)
        if claimed and claimed != own:
            raise Forbidden(
                f"The key does not belong to the {header.removeprefix('openai-')} `{claimed}` "
                f"that the header {header} names."
            )


def _elapsed_ms(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)

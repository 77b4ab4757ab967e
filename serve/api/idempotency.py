"""A POST that is sent again is not done again.

With the header `Idempotency-Key`, a call's answer is kept for 24 hours and given to whoever of the
same account repeats key and body. The official clients send no such key, but say how often they
have tried: a repeated try of a call that makes something costly finds the answer of the first one.
Answers that say "later" (429, 5xx) or "not you" (401, 403) are not kept, nor is a stream that broke
off. Where answers hold keys or secrets, the header is refused: those are nowhere stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import anyio
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data import kept_answers
from data.accounts import Principal
from data.db import Database
from data.errors import InvalidInput, Overloaded, ToolkitError
from data.tables_metering import KeptAnswer
from serve.api.errors import error_response

RETRIED = re.compile(r"/v1/(fine_tuning/jobs|batches|uploads/[^/]+/(parts|complete))")
TRIES = re.compile(r"[0-9]+")
# Their answers hold keys or secrets.
SECRETS = re.compile(
    r"/v1/(organization/.*|api_keys|webhook_endpoints(/[^/]+/rotate_secret)?)", re.DOTALL
)
RETRY_AGE_S = 600
MAX_KEY = 255
MAX_KEPT_BYTES = 16 << 20
IN_MEMORY_BYTES = 1 << 20
NOT_KEPT = (401, 403, 408, 409, 429)  # what may change though the request stays the same
WAIT_S = 60.0
POLL_S = 0.1
DONE = b"data: [DONE]\n\n"

log = logging.getLogger("hone.requests")


@dataclass(frozen=True, slots=True)
class _Call:
    """What names a call, and how long its answer counts."""

    scope: str
    key: str
    body_hash: str
    max_age_s: int
    anew: bool


class Idempotency:
    """Answers repeated POSTs from what was answered before."""

    def __init__(self, app: ASGIApp, database: Callable[[], Database]):
        self.app = app
        self.database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, tries = headers.get("idempotency-key"), headers.get("x-stainless-retry-count", "")
        retried = TRIES.fullmatch(tries) and RETRIED.fullmatch(scope["path"])
        principal: Principal | None = scope["state"].get("principal")
        if principal is None or not (given or retried):
            await self.app(scope, receive, send)
            return
        try:
            if given:
                _check_key(given, scope["path"])
            with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as body:
                if not await _read(receive, body):
                    return  # the client went away
                call = await run_in_threadpool(
                    _call, scope, headers, principal, body, given, not tries.strip("0")
                )
                kept = await self._begin(call, receive)
                if kept is None:
                    await self._perform(call, scope, _replay(body, receive), send)
                else:
                    await _answer(kept)(scope, receive, send)
        except ClientDisconnect:
            return
        except HTTPException as error:  # of the body's limit, while the body is read
            too_large = ToolkitError(error.detail, code="file_too_large")
            await error_response(too_large)(scope, receive, send)
        except ToolkitError as error:
            await error_response(error)(scope, receive, send)

    async def _begin(self, call: _Call, receive: Receive) -> KeptAnswer | None:
        """Return the answer of the call before; None if this one is to be made.

        Raises:
            Overloaded: The call before is still being made after WAIT_S.
            ClientDisconnect: The client went away meanwhile.
        """
        kept = await self._try(call)
        if kept is None or kept.status is not None:
            return kept
        give_up = time.monotonic() + WAIT_S
        left = asyncio.ensure_future(receive())  # the body is read: it can only tell of the end
        try:
            while time.monotonic() < give_up:
                await asyncio.wait({left}, timeout=POLL_S)
                if left.done():
                    raise ClientDisconnect
                if await run_in_threadpool(
                    kept_answers.is_being_made, self.database(), call.scope, call.key
                ):
                    continue
                kept = await self._try(call)
                if kept is None or kept.status is not None:
                    return kept
        finally:
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        raise Overloaded("The same request, sent before, is still being worked on.")

    async def _try(self, call: _Call) -> KeptAnswer | None:
        return await run_in_threadpool(
            kept_answers.begin,
            self.database(),
            call.scope,
            call.key,
            call.body_hash,
            max_age_s=call.max_age_s,
            anew=call.anew,
        )

    async def _renew(self, call: _Call) -> None:
        """Show that the call is being made, until cancelled."""
        while True:
            await asyncio.sleep(kept_answers.RENEW_S)
            try:
                await run_in_threadpool(kept_answers.renew, self.database(), call.scope, call.key)
            except SQLAlchemyError:
                log.exception("a kept call could not be renewed; trying again")

    async def _perform(self, call: _Call, scope: Scope, receive: Receive, send: Send) -> None:
        status, content_type, content, kept = 0, None, bytearray(), False

        async def send_and_keep(message: Message) -> None:
            nonlocal status, content_type, kept
            if message["type"] == "http.response.start":
                status = message["status"]
                content_type = Headers(raw=message["headers"]).get("content-type")
            elif message["type"] == "http.response.body":
                if len(content) <= MAX_KEPT_BYTES:
                    content.extend(message.get("body", b""))
                whole = not message.get("more_body", False) and _is_whole(content_type, content)
                if whole and status < 500 and status not in NOT_KEPT:
                    kept = True  # before the client has it, which may ask again at once
                    await run_in_threadpool(
                        kept_answers.finish,
                        self.database(),
                        call.scope,
                        call.key,
                        status,
                        content_type,
                        bytes(content),
                    )
            await send(message)

        renewing = asyncio.create_task(self._renew(call))
        try:
            await self.app(scope, receive, send_and_keep)
        finally:
            renewing.cancel()
            if not kept:
                with anyio.CancelScope(shield=True):
                    await run_in_threadpool(
                        kept_answers.release, self.database(), call.scope, call.key
                    )


def _check_key(key: str, path: str) -> None:
    if len(key) > MAX_KEY:
        raise InvalidInput(
            f"Invalid header Idempotency-Key: expected at most {MAX_KEY} characters, but got "
            f"{len(key)}."
        )
    if SECRETS.fullmatch(path):
        raise InvalidInput(
            "The header Idempotency-Key is not supported here: answers may hold keys or secrets, "
            "which are never stored. Leave it out."
        )


def _call(
    scope: Scope,
    headers: Headers,
    principal: Principal,
    body: IO[bytes],
    given: str | None,
    is_first: bool,
) -> _Call:
    digest = hashlib.sha256(f"{scope['path']}?{scope['query_string'].decode('latin-1')}\n".encode())
    _add_body(digest, headers.get("content-type", ""), body)
    body_hash = digest.hexdigest()
    owner = principal.project_id or principal.key_id
    if given:
        key = hashlib.sha256(f"given:{given}".encode()).hexdigest()
        return _Call(owner, key, body_hash, kept_answers.KEEP_S, anew=False)
    key = hashlib.sha256(f"tried:{principal.key_id}:{body_hash}".encode()).hexdigest()
    return _Call(owner, key, body_hash, RETRY_AGE_S, anew=is_first)


def _add_body(digest: hashlib._Hash, content_type: str, body: IO[bytes]) -> None:
    """Hash what was sent, without the lines between parts, which differ at every try."""
    found = re.search(r'boundary="?([^";]+)', content_type)
    between = b"--" + found[1].encode() if found else None
    body.seek(0)
    while line := body.readline(IN_MEMORY_BYTES):
        if between is None or not line.startswith(between):
            digest.update(line)
    body.seek(0)


async def _read(receive: Receive, body: IO[bytes]) -> bool:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        await run_in_threadpool(body.write, message.get("body", b""))
        if not message.get("more_body", False):
            return True


def _replay(body: IO[bytes], receive: Receive) -> Receive:
    ended = False

    async def receive_again() -> Message:
        nonlocal ended
        if ended:
            return await receive()
        chunk = await run_in_threadpool(body.read, IN_MEMORY_BYTES)
        ended = len(chunk) < IN_MEMORY_BYTES
        return {"type": "http.request", "body": chunk, "more_body": not ended}

    return receive_again


def _is_whole(content_type: str | None, content: bytearray) -> bool:
    if len(content) > MAX_KEPT_BYTES:
        return False
    streamed = (content_type or "").startswith("text/event-stream")
    return not streamed or content.endswith(DONE)


def _answer(kept: KeptAnswer) -> Response:
    headers = {"idempotent-replayed": "true"}
    if kept.content_type is not None:
        headers["content-type"] = kept.content_type
    return Response(kept.body or b"", kept.status or 200, headers)

"""Server-sent events, exactly as the official clients read them.

Frames are `data: JSON` and the end is `data: [DONE]`. A failure after the first byte is a frame
`data: {"error": ...}` with no event name, and then no [DONE]: a stream that just ended would look
like success. While nothing happens, comment lines keep the connection open. When the client leaves,
the frames' iterator is closed, and with it the generation behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, Self

import anyio
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from data.errors import ToolkitError
from serve.api.errors import envelope, internal_error
from serve.api.generation import unless_disconnected

KEEP_ALIVE_S = 10.0
SEND_LIMIT_S = 60.0  # a client that takes nothing for this long is gone
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

log = logging.getLogger("hone.requests")


Frame = dict[str, Any] | None  # None stands for silence and becomes a comment
Frames = AsyncGenerator[Frame, None]


class EventStream(Response):
    """Sends each frame as one event. Made by `begin`."""

    media_type = "text/event-stream"

    def __init__(self, first: Frame, rest: Frames):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.rest = rest

    @classmethod
    async def begin(cls, request: Request, frames: Frames) -> Self:
        """Wait for the first frame, so that an early failure is an ordinary error response."""
        return cls(await unless_disconnected(request, anext(frames)), frames)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                await self._send_frames(scope, send)
            finally:
                with anyio.CancelScope(shield=True):
                    await self.rest.aclose()
            group.cancel_scope.cancel()

    async def _send_frames(self, scope: Scope, send: Send) -> None:
        try:
            try:
                await _send_body(send, _event(self.first))
                async for frame in self.rest:
                    await _send_body(send, _event(frame))
                await _send_body(send, DONE)
            except ToolkitError as error:
                await _send_body(send, _event(envelope(error)))
            except _ReadsNothing:
                raise
            except Exception:
                request_id = scope["state"]["request_id"]
                log.exception("%s while streaming", request_id)
                await _send_body(send, _event(envelope(internal_error(request_id))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except _ReadsNothing:  # leave without an end, so that the connection is cut
            log.warning("%s: the client reads nothing", scope["state"]["request_id"])


class _ReadsNothing(Exception):
    """The connection has taken nothing for SEND_LIMIT_S."""


def _event(frame: Frame) -> bytes:
    return PING if frame is None else b"data: " + orjson.dumps(frame) + b"\n\n"


async def _send_body(send: Send, body: bytes) -> None:
    try:
        async with asyncio.timeout(SEND_LIMIT_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    except TimeoutError:
        raise _ReadsNothing from None

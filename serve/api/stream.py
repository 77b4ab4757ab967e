"""Server-sent events, exactly as the official clients read them.

Frames are `data: JSON` and the end is `data: [DONE]`. A failure after the first byte is a frame
`data: {"error": ...}` with no event name, and then no [DONE]: a stream that just ended would look
like success. While nothing happens, comment lines keep the connection open. When the client leaves,
the frames' iterator is closed, and with it the generation behind it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

import anyio
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from data.errors import ToolkitError
from serve.api.errors import envelope, for_exception
from serve.api.generation import unless_disconnected
from serve.api.inbox import LazyTimer

KEEP_ALIVE_S = 10.0
SEND_LIMIT_S = 60.0  # a client that takes nothing for this long is gone
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

log = logging.getLogger("hone.requests")


# What is sent together, an event each; an empty list stands for silence and becomes a comment.
Frames = AsyncGenerator[list[dict[str, Any]], None]


class EventStream(Response):
    """Sends each frame as one event. Made by `begin`."""

    media_type = "text/event-stream"

    def __init__(self, first: list[dict[str, Any]], rest: Frames):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.rest = rest

    @classmethod
    async def begin(cls, request: Request, frames: Frames) -> Self:
        """Wait for the first frames, so that an early failure is an ordinary error response."""
        return cls(await unless_disconnected(request, anext(frames)), frames)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        request_id = scope["state"]["request_id"]
        async with anyio.create_task_group() as group:
            sender = _Sender(send, request_id, group.cancel_scope.cancel)

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                await self._send_frames(sender, request_id)
            finally:
                sender.close()
                with anyio.CancelScope(shield=True):
                    await self.rest.aclose()
            group.cancel_scope.cancel()

    async def _send_frames(self, sender: _Sender, request_id: str) -> None:
        try:
            await sender.send(_events(self.first))
            async for frames in self.rest:
                await sender.send(_events(frames))
            last = DONE
        except ToolkitError as error:
            last = _events([envelope(error)])
        except Exception as error:
            log.exception("%s while streaming", request_id)
            last = _events([envelope(for_exception(error, request_id))])
        await sender.send(last, more=False)


class _Sender:
    """Sends, and gives up on a client that takes nothing for SEND_LIMIT_S.

    Args:
        give_up: Ends the stream without an end, so that the connection is cut.
    """

    def __init__(self, send: Send, request_id: str, give_up: Callable[[], None]):
        self._send = send
        self._request_id = request_id
        self._give_up = give_up
        self._is_sending = False
        self._timer = LazyTimer(SEND_LIMIT_S, self._check)

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send one piece of the body."""
        self._timer.renew()
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._is_sending = False

    def close(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _check(self) -> None:
        if self._is_sending:
            log.warning("%s: the client reads nothing", self._request_id)
            self._give_up()


def _events(frames: list[dict[str, Any]]) -> bytes:
    return b"".join([b"data: " + orjson.dumps(frame) + b"\n\n" for frame in frames]) or PING

"""`hone serve`: claim the port, open everything, answer until told to stop; reload on SIGHUP.

The port is bound before the model is loaded, so a port in use is told at once; connections are
accepted only when the model has answered. SIGTERM and SIGINT stop accepting, let answers in flight
finish for `shutdown_grace_s`, end what is left with an error, stop the worker, and exit with 0. A
second signal ends the server at once, as kill -9 does: nothing is lost but what was under way.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from data.errors import InvalidInput, ToolkitError
from data.settings import Settings
from data.tables import new_id
from serve import logs
from serve.api.errors import envelope

KEEP_ALIVE_S = 75
CUT_S = 2  # to send the errors of what is left


def run(settings: Settings, read: Callable[[], Settings]) -> None:
    """Serve until a signal; prints one line when ready.

    Args:
        read: Reads the settings again, for SIGHUP.

    Raises:
        InvalidInput: The port cannot be listened on.
        ModelUnavailable: The base model can be neither fetched nor read.
    """
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    logs.set_up(settings.log_level, settings.log_format)
    listener = _bind(settings.host, settings.port)
    from serve.app import create_app  # seconds of imports, which a port in use need not wait for
    from serve.reload import reload
    from serve.runtime import open_runtime

    try:
        runtime = open_runtime(settings)
        config = uvicorn.Config(
            create_app(settings, runtime),
            http=HttpProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.shutdown_grace_s + CUT_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        try:
            server = _Server(
                config, settings, started, lambda: reload(runtime, read), runtime.generator.stop
            )
            server.run(sockets=[listener])
        except OSError as error:  # another server bound the port too and was ready first
            raise _cannot_listen(settings.host, settings.port, error) from error
    finally:
        listener.close()


def _leave(_signal: int, _frame: object) -> None:
    """Exit quietly: during the start at once, later when uvicorn has shut down."""
    raise SystemExit(0)


class _Server(uvicorn.Server):
    """Says when it is ready, and ends what runs for too long when it stops.

    Args:
        on_hangup: Called at SIGHUP.
        on_end: Called when the time that answers in flight have is over.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        started: float,
        on_hangup: Callable[[], object],
        on_end: Callable[[], object],
    ):
        super().__init__(config)
        self._on_hangup = on_hangup
        self._on_end = on_end
        self._settings = settings
        self._started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        if self.started and sockets:
            gc.collect()
            gc.freeze()  # libraries and model stay; a look over all of it takes a third of a second
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            took_s = time.monotonic() - self._started
            print(
                f"hone is ready on http://{shown}:{port} "
                f"(model {self._settings.model}, {took_s:.1f} s)",
                flush=True,
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self._settings.shutdown_grace_s, self._on_end)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # whoever asks twice does not want to wait
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


class HttpProtocol(H11Protocol):
    """Answers bytes that are not HTTP in the API's own error shape."""

    def send_400_response(self, msg: str) -> None:
        error = InvalidInput(f"The request is not valid HTTP: {msg}")
        body = json.dumps(envelope(error)).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {new_id('req_', 32)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ToolkitError:
    reasons = {
        errno.EADDRINUSE: "the port is in use; stop the other program, or choose a port with "
        "--port (0 picks a free one)",
        errno.EACCES: "the system does not allow it; choose a port above 1023",
        errno.EADDRNOTAVAIL: "this machine has no such address; use 127.0.0.1 or 0.0.0.0",
    }
    reason = reasons.get(error.errno or 0, str(error))
    return InvalidInput(f"Cannot listen on {host}:{port}: {reason}", param="port")

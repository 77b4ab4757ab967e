"""Watches a server from outside its middleware: what was asked, what was answered, how long."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

MAX_KEPT_BYTES = 1 << 16
LATER = (429, 503)  # with `retry-after` an announced refusal
ENVELOPE = {"message", "type", "param", "code"}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer."""

    method: str
    path: str
    status: int  # 0: the connection ended before an answer began
    seconds: float
    headers: Headers
    body: bytes

    def fault(self) -> str | None:
        """Return what is wrong with the answer, None if nothing is."""
        if not self.headers.get("x-request-id", "").startswith("req_"):
            return "no x-request-id"
        if self.status >= 500 and not (self.status in LATER and "retry-after" in self.headers):
            return f"status {self.status}"
        if self.status < 400 or self.method == "HEAD":
            return None
        try:
            error = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return "not the envelope"
        if not set(error) >= ENVELOPE or not error["message"]:
            return "not the four keys"
        return None


class Recorder:
    """An ASGI application around another."""

    def __init__(self, slow_s: float) -> None:
        self.app: Any = None
        self.count = 0
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self.made: list[tuple[str, str, dict[str, Any]]] = []  # method, path, body of a success
        self.under_way: dict[int, tuple[str, str, float]] = {}
        self._slow_s = slow_s
        self._lock = threading.Lock()

    def wrap(self, app: Any) -> Recorder:
        """Watch this application."""
        self.app = app
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, headers, body = time.monotonic(), 0, Headers(), bytearray()
        method, path = scope["method"], scope["path"]
        self.under_way[id(scope)] = (method, path, started)

        async def send_and_note(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            elif len(body) < MAX_KEPT_BYTES:
                body.extend(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            del self.under_way[id(scope)]
            seconds = time.monotonic() - started
            self._note(Exchange(method, path, status, seconds, headers, bytes(body)))

    def _note(self, exchange: Exchange) -> None:
        fault = exchange.fault() if exchange.status else None
        if exchange.seconds > self._slow_s:
            fault = f"took {exchange.seconds:.1f} s"
        with self._lock:
            self.count += 1
            self.statuses[exchange.status] += 1
            if fault:
                where = f"{exchange.method} {exchange.path[:200]}"
                self.faults.append(f"{fault}: {where}: {exchange.body[:300]!r}")
            if exchange.status == 200 and exchange.method in ("POST", "DELETE"):
                self._note_success(exchange)

    def _note_success(self, exchange: Exchange) -> None:
        if exchange.headers.get("content-type", "").startswith("application/json"):
            try:
                found = json.loads(exchange.body)
            except ValueError:
                return  # longer than what is kept; no object that is made is
            if isinstance(found, dict):
                self.made.append((exchange.method, exchange.path, found))

"""Answers batches in the background, a few lines at a time, by the same routes as live calls.

Each answer is appended to a spool file before it counts, so a server that goes on after a crash
repeats at most the lines that were under way.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pydantic
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from data import batches
from data.accounts import Principal
from data.errors import (
    EndUserBlocked,
    Forbidden,
    InvalidInput,
    Overloaded,
    RateLimited,
    ToolkitError,
)
from data.files import BATCH_OUTPUT
from data.tables import Project, new_id, now
from data.tables_surface import Batch
from serve.api import chat, completions, embeddings, moderations
from serve.api.deps import Account
from serve.api.errors import describe, envelope, status_of
from serve.api.schemas import ChatRequest, CompletionRequest
from serve.runtime import Runtime

POLL_S = 1.0
LEASE_S = 60
AT_ONCE = 4  # lines of a batch that wait or run at a time: live calls go first
TRIES_WAIT_S = 1.0
Answer = Callable[..., Awaitable[Response]]
ENDPOINTS: dict[str, tuple[type[pydantic.BaseModel], Answer]] = {
    "/v1/completions": (CompletionRequest, completions.create_completion),
    "/v1/chat/completions": (ChatRequest, chat.create_chat_completion),
    "/v1/embeddings": (embeddings.EmbeddingRequest, embeddings.create_embeddings),
    "/v1/moderations": (moderations.ModerationRequest, moderations.create_moderation),
}

log = logging.getLogger("hone.batches")


async def run(runtime: Runtime) -> None:
    """Answer batches until cancelled."""
    worker_id = new_id("server_")
    while True:
        try:
            batch = await run_in_threadpool(batches.claim, runtime.database, worker_id, LEASE_S)
            if batch is not None:
                await _Run(runtime, batch, worker_id).go()
                continue
        except Exception:
            log.exception("a batch could not be worked on; trying again")
        await asyncio.sleep(POLL_S)


class _Closed(Exception):
    """The account is not served at the moment, or the batch is another server's."""


class _Run:
    """One batch in the hands of this server."""

    def __init__(self, runtime: Runtime, batch: Batch, worker_id: str):
        self._runtime = runtime
        self._batch = batch
        self._worker_id = worker_id
        self._spool = Path(runtime.settings.home) / "batches" / f"{batch.id}.jsonl"
        self._done: dict[str, bool] = {}  # custom ids, and whether the answer was one
        self._stopped = ""

    async def go(self) -> None:
        """Validate, answer, and write the files; what is left undone goes on later."""
        try:
            requests = await self._requests()
            if requests is None:
                return
            await run_in_threadpool(self._read_spool)
            await self._progress(status="in_progress", total=len(requests), **self._counts())
            waiting = [request for request in requests if request[0] not in self._done]
            await self._answer_all(waiting)
            await self._finish()
        except _Closed:
            await run_in_threadpool(
                batches.release, self._runtime.database, self._batch.id, self._worker_id
            )
        except asyncio.CancelledError:
            batches.release(self._runtime.database, self._batch.id, self._worker_id)
            raise

    async def _requests(self) -> list[tuple[str, dict[str, Any]]] | None:
        def read() -> Any:
            batch, files = self._batch, self._runtime.files
            with files.open(batch.project_id, batch.input_file_id) as stream:
                return batches.read_requests(stream, batch.endpoint)

        try:
            requests, errors = await run_in_threadpool(read)
        except ToolkitError as error:
            fault = {"line": None, "code": error.code, "param": "input_file_id"}
            requests, errors = [], [fault | {"message": error.public}]
        if errors:
            await self._progress(status="failed", errors=errors)
            return None
        found: list[tuple[str, dict[str, Any]]] = requests
        return found

    async def _answer_all(self, waiting: list[tuple[str, dict[str, Any]]]) -> None:
        queue = iter(waiting)

        async def work() -> None:
            for custom_id, body in queue:
                if self._stopped:
                    return
                await self._answer(custom_id, body)

        keeper = asyncio.create_task(self._keep())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(work())
        except* _Closed:
            raise _Closed from None
        finally:
            keeper.cancel()

    async def _keep(self) -> None:
        """Tell how far it is, and learn of a cancellation, an end of time, or another server."""
        while True:
            await asyncio.sleep(POLL_S)
            found = await run_in_threadpool(self._write, self._counts())
            if found is None:
                self._stopped = "lost"
            elif found.status == "cancelling":
                self._stopped = "cancelled"
            elif found.expires_at <= now():
                self._stopped = "expired"

    async def _answer(self, custom_id: str, body: dict[str, Any]) -> None:
        request_id = new_id("req_", 32)
        while True:
            try:
                status, answer = 200, await self._ask(request_id, body)
            except (Overloaded, RateLimited) as error:
                if isinstance(error, Overloaded) or error.retry_after_s is not None:
                    await asyncio.sleep(TRIES_WAIT_S)
                    if self._stopped:
                        return
                    continue
                status, answer = status_of(error), envelope(error)
            except ToolkitError as error:
                if isinstance(error, Forbidden) and not isinstance(error, EndUserBlocked):
                    raise _Closed from None
                status, answer = status_of(error), envelope(error)
            break
        response = {"status_code": status, "request_id": request_id, "body": answer}
        line = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response}
        await run_in_threadpool(self._append, {**line, "error": None})
        self._done[custom_id] = status == 200

    async def _ask(self, request_id: str, body: dict[str, Any]) -> Any:
        batch, runtime = self._batch, self._runtime
        schema, answer = ENDPOINTS[batch.endpoint]
        try:
            parsed = schema.model_validate(body)
        except pydantic.ValidationError as error:
            raise describe(error.errors()) from None
        if body.get("stream"):
            raise InvalidInput("Invalid 'stream': a batch is not streamed.", param="stream")
        slug = await run_in_threadpool(self._slug)
        principal = Principal(batch.project_id, slug, batch.key_id, "project")
        state = {"principal": principal, "request_id": request_id}
        request = Request({"type": "http", "state": state}, receive=_silence)
        response = await answer(parsed, request, Account(batch.project_id, slug), runtime)
        return json.loads(bytes(response.body))

    def _slug(self) -> str:
        with self._runtime.database.read() as session:
            return session.get_one(Project, self._batch.project_id).slug

    async def _finish(self) -> None:
        if self._stopped == "lost":
            raise _Closed
        if not self._stopped:
            await self._progress(status="finalizing", **self._counts())
        files = await run_in_threadpool(self._store)
        status = self._stopped or "completed"
        await self._progress(status=status, **self._counts(), **files)
        self._spool.unlink(missing_ok=True)

    async def _progress(self, **values: Any) -> Batch:
        found = await run_in_threadpool(self._write, values)
        if found is None:
            raise _Closed
        return found

    def _write(self, values: dict[str, Any]) -> Batch | None:
        return batches.progress(
            self._runtime.database, self._batch.id, self._worker_id, LEASE_S, **values
        )

    def _counts(self) -> dict[str, int]:
        completed = sum(self._done.values())
        return {"completed": completed, "failed": len(self._done) - completed}

    def _append(self, line: dict[str, Any]) -> None:
        self._spool.parent.mkdir(parents=True, exist_ok=True)
        with self._spool.open("ab") as target:
            target.write(json.dumps(line).encode() + b"\n")

    def _lines(self) -> list[bytes]:
        if not self._spool.exists():
            return []
        return [line for line in self._spool.read_bytes().splitlines(True) if line.endswith(b"\n")]

    def _read_spool(self) -> None:
        lines = self._lines()
        if lines:
            self._spool.write_bytes(b"".join(lines))  # without half a line that a crash left
        for line in lines:
            row = json.loads(line)
            self._done[row["custom_id"]] = row["response"]["status_code"] == 200

    def _store(self) -> dict[str, str | None]:
        right: list[bytes] = []
        wrong: list[bytes] = []
        for line in self._lines():
            is_right = json.loads(line)["response"]["status_code"] == 200
            (right if is_right else wrong).append(line)
        made: dict[str, str | None] = {}
        for kind, lines in (("output", right), ("error", wrong)):
            name = f"{self._batch.id}_{kind}.jsonl"
            create, project = self._runtime.files.create, self._batch.project_id
            made[f"{kind}_file_id"] = (
                create(project, lines, name, BATCH_OUTPUT).id if lines else None
            )
        return made


async def _silence() -> Any:
    """Nobody is connected, so nobody disconnects."""
    await asyncio.Event().wait()

"""Answers batches in the background, a few lines at a time, by the same routes as live calls.

Several accounts' batches go on beside each other, at most one an account, and share the lines that
a server asks at a time. Where more accounts wait than a server has hands, they take turns.

Each answer is appended to a spool file before it counts, so a server that goes on after a crash
repeats at most the lines that were under way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
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
from data.tables import File, Project, new_id, now
from data.tables_surface import Batch
from serve.api import chat, completions, embeddings, moderations
from serve.api.deps import Account
from serve.api.errors import describe, envelope, internal_error, status_of
from serve.api.schemas import ChatRequest, CompletionRequest
from serve.runtime import Runtime

POLL_S = 1.0
LEASE_S = 60
AT_ONCE = 4  # lines of all batches that wait or run at a time: live calls go first
BATCHES = 8  # in hand at a time, each of another account
TURN_S = 300.0  # of a batch, before it makes room for one that waits
TRIES_WAIT_S = 10.0  # at most, before a line that the account's rates refuse is asked again
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
    room = asyncio.Semaphore(AT_ONCE)
    in_hand: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        while True:
            batch = None
            if len(in_hand) < BATCHES:
                batch = await _claim(runtime, worker_id)
            if batch is None:
                await asyncio.sleep(POLL_S)
                continue
            task = group.create_task(_work(_Run(runtime, batch, worker_id, room)))
            in_hand.add(task)
            task.add_done_callback(in_hand.discard)


async def _claim(runtime: Runtime, worker_id: str) -> Batch | None:
    try:
        return await run_in_threadpool(batches.claim, runtime.database, worker_id, LEASE_S)
    except Exception:
        log.exception("no batch could be taken; trying again")
        return None


async def _work(found: _Run) -> None:
    try:
        await found.go()
    except Exception:  # its lease runs out, and it is taken again
        log.exception("a batch could not be worked on; trying again")


class _Closed(Exception):
    """The account is not served at the moment, or the batch is another server's."""


class _Run:
    """One batch in the hands of this server."""

    def __init__(self, runtime: Runtime, batch: Batch, worker_id: str, room: asyncio.Semaphore):
        self._runtime = runtime
        self._batch = batch
        self._worker_id = worker_id
        self._spool = Path(runtime.settings.home) / "batches" / f"{batch.id}.jsonl"
        self._done: dict[str, bool] = {}  # custom ids, and whether the answer was one
        self._room = room  # of the lines of all batches
        self._turn_ends = time.monotonic() + TURN_S
        self._stopped = ""
        self._halt = asyncio.Event()

    async def go(self) -> None:
        """Validate, answer, and write the files; what is left undone goes on later."""
        try:
            await run_in_threadpool(self._read_spool)
            self._heed(self._batch)
            if not self._stopped:
                requests = await self._requests()
                if requests is None:
                    return
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
            await self._end("failed", errors=errors)
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
        """Tell how far it is, and learn of a cancellation, an end of time, or another's turn."""
        while True:
            await asyncio.sleep(POLL_S)
            found = await run_in_threadpool(self._write, self._counts())
            if found is None:
                self._stop("given up")
                continue
            self._heed(found)
            if self._stopped or time.monotonic() < self._turn_ends:
                continue
            if await run_in_threadpool(batches.is_waiting, self._runtime.database):
                self._stop("given up")

    def _heed(self, batch: Batch) -> None:
        if batch.status == "cancelling":
            self._stop("cancelled")
        elif batch.expires_at <= now():
            self._stop("expired")

    def _stop(self, why: str) -> None:
        self._stopped = why
        self._halt.set()

    async def _answer(self, custom_id: str, body: dict[str, Any]) -> None:
        request_id = new_id("req_", 32)
        while True:
            try:
                async with self._room:
                    if self._stopped:
                        return
                    status, answer = 200, await self._ask(request_id, body)
            except (Overloaded, RateLimited) as error:
                if error.retry_after_s is not None:
                    with suppress(TimeoutError):  # it was not stopped meanwhile
                        wait_s = min(error.retry_after_s, TRIES_WAIT_S)
                        await asyncio.wait_for(self._halt.wait(), wait_s)
                    continue
                status, answer = status_of(error), envelope(error)
            except ToolkitError as error:
                if isinstance(error, Forbidden) and not isinstance(error, EndUserBlocked):
                    raise _Closed from None
                status, answer = status_of(error), envelope(error)
            except Exception:
                log.exception("%s: the line %s of %s failed", request_id, custom_id, self._batch.id)
                fault = internal_error(request_id)
                status, answer = status_of(fault), envelope(fault)
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
        state = {"principal": principal, "request_id": request_id, "batch": True}
        request = Request({"type": "http", "state": state}, receive=_silence)
        response = await answer(parsed, request, Account(batch.project_id, slug), runtime)
        return json.loads(bytes(response.body))

    def _slug(self) -> str:
        with self._runtime.database.read() as session:
            return session.get_one(Project, self._batch.project_id).slug

    async def _finish(self) -> None:
        if self._stopped == "given up":
            raise _Closed
        if not self._stopped:
            await self._progress(status="finalizing", **self._counts())
        await self._end(self._stopped or "completed")

    async def _end(self, status: str, **values: Any) -> None:
        """Store what was answered, and end the batch in the same transaction."""
        made = await run_in_threadpool(self._store)
        ids = {name: file.id for name, file in made.items()}
        files = list(made.values())
        await self._progress(status=status, files=files, **ids, **self._counts(), **values)
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

    def _store(self) -> dict[str, File]:
        """Write the answers' files: whatever the account may store, they are the batch's result."""
        right: list[bytes] = []
        wrong: list[bytes] = []
        for line in self._lines():
            is_right = json.loads(line)["response"]["status_code"] == 200
            (right if is_right else wrong).append(line)
        made: dict[str, File] = {}
        for kind, lines in (("output", right), ("error", wrong)):
            if lines:
                made[f"{kind}_file_id"] = self._runtime.files.stage(
                    self._batch.project_id,
                    lines,
                    f"{self._batch.id}_{kind}.jsonl",
                    BATCH_OUTPUT,
                    max_bytes=sum(map(len, lines)),
                )
        return made


async def _silence() -> Any:
    """Nobody is connected, so nobody disconnects."""
    await asyncio.Event().wait()

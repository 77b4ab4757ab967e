"""The application: routes, middleware, and what is opened at start and closed at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from data.settings import Settings
from serve.api import (
    chat,
    completions,
    errors,
    files,
    fine_tuning,
    health,
    limits,
    models,
    tiers,
    usage,
)
from serve.api.idempotency import Idempotency
from serve.api.middleware import Authentication, BodyLimit, RequestContext
from serve.runtime import Runtime, open_runtime
from serve.worker_process import WorkerProcess


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """Build the server's ASGI application.

    Args:
        runtime: Already opened; without it, the application opens one when it starts. Either way it
            is closed when the application stops.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.runtime = runtime or await run_in_threadpool(open_runtime, settings)
        worker = WorkerProcess(settings) if settings.embedded_worker else None
        try:
            if worker is not None:
                worker.start()
            yield
        finally:
            if worker is not None:
                await worker.stop()
            await run_in_threadpool(app.state.runtime.close)

    app = FastAPI(
        title="hone",
        lifespan=lifespan,
        redirect_slashes=False,  # clients do not repeat a POST after a redirect
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    # The last one added is the outermost.
    app.add_middleware(Idempotency, database=lambda: app.state.runtime.database)
    app.add_middleware(BodyLimit, max_upload_mb=settings.max_upload_mb)
    app.add_middleware(Authentication, database=lambda: app.state.runtime.database)
    app.add_middleware(
        RequestContext, observe=lambda *seen: app.state.runtime.metrics.observe(*seen)
    )
    errors.install(app)
    for routes in (models, completions, chat, files, fine_tuning, tiers, health, usage, limits):
        app.include_router(routes.router)
    return app

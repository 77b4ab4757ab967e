"""The application: routes, middleware, and what is opened at start and closed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from data.settings import Settings
from serve import batch_runner, round_runner
from serve.api import (
    access,
    batches,
    chat,
    comparisons,
    completions,
    content_policies,
    docs_page,
    embeddings,
    errors,
    estimates,
    feedback,
    files,
    fine_tuning,
    graders,
    health,
    keys,
    label_projects,
    label_rounds,
    legacy,
    limits,
    models,
    moderations,
    organization,
    organization_limits,
    oversight,
    permissions,
    stored_chats,
    tiers,
    tokens,
    uploads,
    usage,
    webhook_endpoints,
)
from serve.api.description import describe_api
from serve.api.idempotency import Idempotency
from serve.api.middleware import Authentication, BodyLimit, RequestContext
from serve.closed_accounts import watch
from serve.runtime import Runtime, open_runtime
from serve.web.site import make_site
from serve.webhook_sender import WebhookSender
from serve.worker_process import WorkerProcess

EXPOSED_HEADERS = ("x-request-id", "openai-processing-ms", "retry-after")


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
        sender = WebhookSender(app.state.runtime.database, settings)
        helpers = [
            asyncio.create_task(work(app.state.runtime))
            for work in (watch, batch_runner.run, round_runner.run)
        ]
        try:
            sender.start()
            if worker is not None:
                worker.start()
            yield
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            if worker is not None:
                await worker.stop()
            await sender.stop()
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
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    errors.install(app)
    jobs = (fine_tuning, estimates, permissions, graders, webhook_endpoints)
    for routes in (
        models,
        completions,
        chat,
        embeddings,
        moderations,
        stored_chats,
        files,
        uploads,
        batches,
        *jobs,
        tiers,
        tokens,
        legacy,
        keys,
        organization,
        oversight,
        content_policies,
        feedback,
        label_projects,
        label_rounds,
        comparisons,
        access,
        usage,
        limits,
        organization_limits,
        health,
        docs_page,
    ):
        app.include_router(routes.router)
    app.include_router(label_projects.task_router)
    app.mount("/web", make_site(lambda: app.state.runtime))
    app.openapi = partial(describe_api, app)  # type: ignore[method-assign]
    return app

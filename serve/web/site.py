"""The pages below `/web`, as an application of their own beside the API."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from serve.runtime import Runtime
from serve.web import admin, labeling, models, rounds, samples, session_pages
from serve.web.view import HERE, render

PROJECT = "/projects/{label_project_id}"
TASK = "/label/{label_project_id}"


def make_site(runtime: Callable[[], Runtime]) -> Starlette:
    """Return the pages' application.

    Args:
        runtime: Returns what the running server holds.
    """
    site = Starlette(
        routes=[
            Route("/", labeling.home),
            Route("/login", session_pages.login_page),
            Route("/login", session_pages.login, methods=["POST"]),
            Route("/logout", session_pages.logout, methods=["POST"]),
            Route(TASK, labeling.task),
            Route(TASK + "/guidelines", labeling.guidelines),
            Route(TASK + "/progress", labeling.own_progress),
            Route(TASK + "/{assignment_id}", labeling.own_answer),
            Route(TASK + "/{assignment_id}", labeling.submit, methods=["POST"]),
            Route(TASK + "/{assignment_id}/amend", labeling.amend, methods=["POST"]),
            Route("/projects/new", admin.new_project),
            Route("/projects/new", admin.create_project, methods=["POST"]),
            Route(PROJECT, admin.show_project),
            Route(PROJECT, admin.change_project, methods=["POST"]),
            Route(PROJECT + "/tasks", admin.import_tasks, methods=["POST"]),
            Route(PROJECT + "/sample", samples.sample_tasks, methods=["POST"]),
            Route(PROJECT + "/disagreements", admin.disagreements),
            Route(PROJECT + "/disagreements/{task_id}", admin.settle, methods=["POST"]),
            Route(PROJECT + "/rounds", rounds.start_round, methods=["POST"]),
            Route("/rounds", rounds.list_rounds),
            Route("/rounds/{round_id}/cancel", rounds.cancel_round, methods=["POST"]),
            Route("/models", models.models),
            Route("/jobs", models.list_jobs),
            Route("/jobs/{job_id}", models.show_job),
            Route("/playground", models.playground),
            Route("/playground", models.ask, methods=["POST"]),
            Route("/playground/prefer", models.prefer, methods=["POST"]),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_bug},
    )
    site.state.runtime = runtime
    return site


async def _on_http_error(_: Request, error: Exception) -> Response:
    """Answer what the framework refuses as a page."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = {404: "There is no such page.", 405: "This page does not take that."}
    return render("error.html", status, message=told.get(status, str(error)))


async def _on_bug(request: Request, _: Exception) -> Response:
    """Answer what hone did wrong; the log has the rest."""
    told = f"Something went wrong here. The log tells more under {request.state.request_id}."
    return render("error.html", 500, message=told)

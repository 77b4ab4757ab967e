"""Models and jobs, with curves that follow a running job; and the playground."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from typing import Any

from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import accounts, jobs, registry
from data.errors import InvalidInput, ToolkitError
from data.feedback import users
from data.feedback.users import Said
from data.tables import Job
from data.tables_feedback import StoredCompletion
from serve.api import completions
from serve.api.deps import Account
from serve.api.schemas import CompletionRequest
from serve.web.curves import curve
from serve.web.view import Visit, go, page, whole_number

LIVE = ("validating_files", "queued", "running", "paused")
CURVES = (
    ("loss", ("train_loss", "valid_loss")),
    ("token accuracy", ("train_mean_token_accuracy", "valid_mean_token_accuracy")),
    ("score", ("objective/scores", "eval/reward", "objective/gold_score", "reward")),
    ("KL of a response", ("objective/kl", "kl")),
    ("response length", ("response/length_mean",)),
    ("accuracy of comparisons", ("eval_accuracy", "rewards/accuracies")),
)
MAX_EVENTS = 5000


@page("admin")
def models(visit: Visit) -> Response:
    """List the account's models."""
    found = registry.list_versions(visit.runtime.database, visit.account)
    base = visit.runtime.models.base_model
    return visit.render("models.html", versions=found, base=base)


@page("admin")
def list_jobs(visit: Visit) -> Response:
    """List the account's jobs, newest first."""
    found, _ = jobs.list_jobs(visit.runtime.database, visit.account, 50)
    return visit.render("jobs.html", jobs=found)


@page("admin")
def show_job(visit: Visit) -> Response:
    """Show a job; a live one is asked for again every few seconds by htmx."""
    job = jobs.get(visit.runtime.database, visit.account, visit.path("job_id"))
    events, _ = jobs.list_events(visit.runtime.database, visit.account, job.id, MAX_EVENTS, None)
    template = "job_live.html" if visit.request.headers.get("hx-request") else "job.html"
    return visit.render(
        template,
        job=job,
        is_live=job.status in LIVE,
        curves=_curves(_numbers(visit, job, events)),
        events=[event for event in events if event.type != "metrics"][:50],
    )


def _numbers(visit: Visit, job: Job, events: Any) -> dict[str, list[tuple[float, float]]]:
    """Return each metric by step: of the finished job's table, or of its events until then."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for file_id in job.result_files or []:
        record = visit.runtime.files.get(visit.account, file_id)
        if record.filename.endswith(".csv"):
            with visit.runtime.files.open(visit.account, file_id) as stream:
                text = io.TextIOWrapper(stream, "utf-8")
                for row in csv.DictReader(text):
                    _note(found, row.get("step"), row)
            return found
    for event in reversed(events):
        data = event.data or {}
        _note(found, data.get("step"), data)
    return found


def _note(found: dict[str, list[tuple[float, float]]], step: Any, row: Any) -> None:
    try:
        at = float(step)
    except (TypeError, ValueError):
        return
    for name, value in row.items():
        try:
            found[name].append((at, float(value)))
        except (TypeError, ValueError):
            continue


def _curves(numbers: dict[str, list[tuple[float, float]]]) -> list[tuple[str, Any]]:
    made = []
    for title, names in CURVES:
        lines = [(name, numbers[name]) for name in names if numbers.get(name)]
        if lines:
            made.append((title, curve(title, lines)))
    return made


# ---- playground ----


@page("admin")
def playground(visit: Visit) -> Response:
    """Ask for a prompt and two models."""
    return _playground(visit)


def _playground(visit: Visit, status: int = 200, **values: Any) -> Response:
    names = [visit.runtime.models.base_model]
    for version in registry.list_versions(visit.runtime.database, visit.account):
        names.append(version.name)
    given = {name: visit.text(name) for name in ("prompt", "first", "second", "max_tokens")}
    filled = {"answers": [], "error": None, **values}
    return visit.render("playground.html", status, names=names, given=given, **filled)


@page("admin")
async def ask(visit: Visit) -> Response:
    """Answer a prompt with both models, under the account's limits and on its bill."""
    answers = []
    try:
        for side in ("first", "second"):
            answers.append(await _complete(visit, visit.text(side)))
    except ToolkitError as error:
        return await run_in_threadpool(_playground, visit, 400, error=error.public)
    return await run_in_threadpool(_playground, visit, 200, answers=answers)


async def _complete(visit: Visit, model: str) -> dict[str, Any]:
    """Run one completion by the API's own route, as a key of the account would."""
    request = visit.request
    project = await act_for_account(visit)
    body = CompletionRequest(
        model=model,
        prompt=visit.text("prompt").replace("\r\n", "\n"),
        max_tokens=min(whole_number(visit.form, "max_tokens") or 64, 512),
        temperature=0.7,
        store=True,
    )
    account = Account(visit.account, project)
    response = await completions.create_completion(body, request, account, visit.runtime)
    told = json.loads(bytes(response.body))
    return {"id": told["id"], "model": told["model"], "text": told["choices"][0]["text"]}


async def act_for_account(visit: Visit) -> str:
    """Let the request act as a key of the person's account would; returns the account's slug."""
    slug = await run_in_threadpool(_slug, visit)
    principal = accounts.Principal(visit.account, slug, visit.person.id, "project", role="member")
    visit.request.state.principal = principal
    return slug


def _slug(visit: Visit) -> str:
    from data.tables import Project

    with visit.runtime.database.read() as session:
        return session.get_one(Project, visit.account).slug


@page("admin")
def prefer(visit: Visit) -> Response:
    """Keep which of two answers is better."""
    better, worse = visit.text("better"), visit.text("worse")
    with visit.runtime.database.read() as session:
        query = select(StoredCompletion.id).where(
            StoredCompletion.id.in_([better, worse]),
            StoredCompletion.project_id == visit.account,
        )
        if len(list(session.scalars(query))) != 2:
            raise InvalidInput("These answers are no longer stored; ask again.")
    said = Said(preferred_over=worse, end_user=visit.person.id)
    users.give(visit.runtime.database, visit.account, better, said)
    return go("/web/playground", "saved")

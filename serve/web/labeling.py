"""The labeler's pages: projects, a task, guidelines, own progress."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback import judgements, leases, projects, reports
from data.feedback.judgements import TIMINGS, AlreadyJudged, Answer
from serve.web.view import Visit, go, page, whole_number


@page("labeler")
def home(visit: Visit) -> Response:
    """List the labeling projects, with what is left of each."""
    rows = reports.overview(visit.runtime.database, visit.account, visit.person.id)
    if visit.person.role == "labeler":
        rows = [row for row in rows if row.project.status == "open"]
    return visit.render("home.html", rows=rows)


@page("labeler")
def task(visit: Visit) -> Response:
    """Show the next task, or the one in hand."""
    project = _project(visit)
    try:
        given = (visit.runtime.database, visit.account, project.id, visit.person.id)
        shown = leases.next_task(*given)
    except StateConflict as error:
        return visit.render("task_none.html", project=project, message=error.message)
    if shown is None:
        message = "There is nothing more for you to judge here now."
        return visit.render("task_none.html", project=project, message=message)
    return _show(visit, project, shown)


def _show(
    visit: Visit, project: Any, shown: leases.Shown, status: int = 200, error: str | None = None
) -> Response:
    given = (visit.runtime.database, visit.account, project.id)
    return visit.render(
        "task.html",
        status,
        project=project,
        task=shown,
        turns=turns(shown.prompt),
        answered=reports.answered(visit.runtime.database, project.id, visit.person.id),
        guidelines=projects.guidelines(*given, shown.guidelines_version)[1],
        error=error,
        typed=visit.text("text") or None,
    )


def turns(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt as turns to show: text is one without a role."""
    if isinstance(prompt, str):
        return [{"role": "", "content": prompt}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


@page("labeler")
def submit(visit: Visit) -> Response:
    """Keep an answer, a skip or a flag, and go on to the next task."""
    project = _project(visit)
    database, assignment = visit.runtime.database, visit.path("assignment_id")
    given = (database, visit.account, assignment, visit.person.id)
    back = f"/web/label/{project.id}"
    try:
        action = visit.text("action", "answer")
        if action == "skip":
            judgements.skip(*given, visit.text("reason"))
            return go(back, "skipped")
        if action == "flag":
            judgements.flag(*given, visit.text("reason"))
            return go(back, "flagged")
        told = judgements.submit(*given, _answer(visit, project.kind))
    except AlreadyJudged:
        return go(back, "other")
    except NotFound:
        return go(back, "gone")
    except InvalidInput as error:
        shown = leases.next_task(database, visit.account, project.id, visit.person.id)
        if shown is None or shown.assignment_id != assignment:
            return go(back, "gone")
        return _show(visit, project, shown, 400, error.message)
    if told.right is not None:
        return go(back, "right" if told.right else "wrong")
    if told.note is not None:
        return go(back, "withdrawn" if "withdrawn" in told.note else "late")
    return go(back, "twice" if told.was_there else None)


def _answer(visit: Visit, kind: str) -> Answer:
    """Read the answer out of the form."""
    form = visit.form
    timings = {name: value for name in TIMINGS if (value := whole_number(form, name)) is not None}
    if kind == "pairwise":
        choice, _, strength = visit.text("choice").partition(":")
        return Answer(choice=choice, strength=int(strength) if strength else None, timings=timings)
    if kind == "ranking":
        names = [name for name in form if name.startswith("rank-")]
        ranking = {name.removeprefix("rank-"): whole_number(form, name) or 0 for name in names}
        return Answer(ranking=ranking, timings=timings)
    if kind == "likert":
        names = [name for name in form if name.startswith("axis-")]
        axes = {name.removeprefix("axis-"): whole_number(form, name) or 0 for name in names}
        return Answer(axes=axes, timings=timings)
    if kind == "thumbs":
        thumb = {"up": True, "down": False}.get(visit.text("thumb"))
        return Answer(thumb=thumb, timings=timings)
    text = visit.text("text").replace("\r\n", "\n")  # browsers send lines ended so
    return Answer(text=text, timings=timings)


@page("labeler")
def guidelines(visit: Visit) -> Response:
    """Show the guidelines."""
    project = _project(visit)
    version, text = projects.guidelines(visit.runtime.database, visit.account, project.id)
    return visit.render("guidelines.html", project=project, version=version, text=text)


@page("labeler")
def own_progress(visit: Visit) -> Response:
    """Show what the person has done in a project."""
    project = _project(visit)
    given = (visit.runtime.database, visit.account, project.id)
    return visit.render(
        "progress.html",
        project=project,
        mine=reports.progress(*given, visit.person.id),
        everybody=reports.progress(*given),
    )


def _project(visit: Visit) -> Any:
    """Return the project of the path; a closed one is as absent for labelers."""
    return projects.get(visit.runtime.database, visit.account, visit.path("label_project_id"))

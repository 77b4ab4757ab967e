"""The labeler's pages: projects, a task, guidelines, own progress."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback import judgements, leases, projects, reports
from data.feedback.judgements import TIMINGS, AlreadyJudged, Answer
from data.feedback.label_kinds import STRENGTHS
from serve.web.view import Visit, go, page, whole_number

RECENT = 20  # own answers that are listed, to be changed


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
    visit: Visit,
    project: Any,
    shown: leases.Shown,
    status: int = 200,
    error: str | None = None,
    earlier: dict[str, Any] | None = None,
) -> Response:
    """Show a task: to be judged, or with the answer that was given earlier, to be changed."""
    database = visit.runtime.database
    last = judgements.recent(database, project.id, visit.person.id, 1)
    given = (visit.runtime.database, visit.account, project.id)
    return visit.render(
        "task.html",
        status,
        project=project,
        task=shown,
        turns=turns(shown.prompt),
        answered=reports.answered(database, project.id, visit.person.id),
        earlier=earlier,
        said=said(earlier) if earlier else None,
        last=last[0] if last else None,
        guidelines=projects.guidelines(*given, shown.guidelines_version)[1],
        error=error,
        typed=visit.text("text") or None,
    )


def turns(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt as turns to show: text is one without a role."""
    if isinstance(prompt, str):
        return [{"role": "", "content": prompt}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def said(answer: dict[str, Any]) -> str:
    """Return an answer by letters in few words."""
    if "ranking" in answer:
        ranks = sorted(set(answer["ranking"].values()))
        same = (sorted(k for k, v in answer["ranking"].items() if v == rank) for rank in ranks)
        return ", ".join(" = ".join(letters) for letters in same)
    if "axes" in answer:
        return ", ".join(f"{axis} {value}" for axis, value in answer["axes"].items())
    if "thumb" in answer:
        return "good" if answer["thumb"] else "bad"
    if "text" in answer:
        return str(answer["text"])
    strength = f" ({answer['strength']} of {STRENGTHS})" if "strength" in answer else ""
    return str(answer["choice"]).replace("_", " ") + strength


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
        told = judgements.submit(*given, read_answer(visit, project.kind))
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


def read_answer(visit: Visit, kind: str) -> Answer:
    """Read the answer out of the form."""
    form = visit.form
    timings = {name: value for name in TIMINGS if (value := whole_number(form, name)) is not None}
    if kind == "pairwise":
        choice, _, strength = visit.text("choice").partition(":")
        found = whole_number({"strength": strength}, "strength")
        if strength and found is None:
            raise InvalidInput(f"'{strength[:20]}' is no strength.", param="answer")
        return Answer(choice=choice, strength=found, timings=timings)
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
def own_answer(visit: Visit) -> Response:
    """Show a task that the person has answered, to change the answer."""
    project, assignment = _project(visit), visit.path("assignment_id")
    given = (visit.runtime.database, visit.account, assignment, visit.person.id)
    shown, earlier = judgements.own(*given)
    return _show(visit, project, shown, earlier=earlier)


@page("labeler")
def amend(visit: Visit) -> Response:
    """Put an answer in the place of an earlier one."""
    project, assignment = _project(visit), visit.path("assignment_id")
    given = (visit.runtime.database, visit.account, assignment, visit.person.id)
    try:
        judgements.amend(*given, read_answer(visit, project.kind))
    except InvalidInput as error:
        shown, earlier = judgements.own(*given)
        return _show(visit, project, shown, 400, error.message, earlier)
    return go(f"/web/label/{project.id}", "changed")


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
        recent=[
            (one.assignment_id, turns(one.prompt)[-1]["content"], said(one.answer))
            for one in judgements.recent(
                visit.runtime.database, project.id, visit.person.id, RECENT
            )
        ],
    )


def _project(visit: Visit) -> Any:
    """Return the project of the path; a closed one is as absent for labelers."""
    return projects.get(visit.runtime.database, visit.account, visit.path("label_project_id"))

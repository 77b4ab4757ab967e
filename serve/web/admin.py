"""The pages of those who run labeling: a project's report, its tasks, labelers, disagreements."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.responses import Response

from data import people, registry
from data.errors import InvalidInput, ToolkitError
from data.feedback import export, gates, imports, projects, reports, rounds, tasks
from data.feedback.export import FITTING
from data.feedback.label_kinds import KINDS, LETTERS
from data.feedback.projects import Gates, ProjectSpec
from data.job_methods import REWARD_MODEL
from serve.web.labeling import read_answer, said, turns
from serve.web.view import Visit, go, page, whole_number


@page("admin")
def new_project(visit: Visit) -> Response:
    """Ask what a new project is."""
    return visit.render("project_new.html", kinds=KINDS, given={})


@page("admin")
def create_project(visit: Visit) -> Response:
    """Make a project, with tasks if a file came along."""
    given = {name: visit.text(name) for name in visit.form}
    try:
        made = projects.create(visit.runtime.database, visit.account, _spec(visit))
        _import(visit, made.id)
    except InvalidInput as error:
        return visit.render("project_new.html", 400, kinds=KINDS, given=given, error=error.message)
    return go(f"/web/projects/{made.id}")


def _spec(visit: Visit) -> ProjectSpec:
    def share(name: str) -> float | None:
        text = visit.text(name).strip()
        if not text:
            return None
        try:
            return float(text) / 100
        except ValueError as error:
            raise InvalidInput(f"'{text}' is no percentage.", param=name) from error

    kind = visit.text("kind", "pairwise")
    label: dict[str, Any] = {}
    if kind == "pairwise" and visit.text("strength"):
        label["strength"] = 4
    if kind == "likert":
        axes = [axis.strip() for axis in visit.text("axes").split(",") if axis.strip()]
        label = {"axes": axes or ["overall"]}
    return ProjectSpec(
        name=visit.text("name").strip(),
        kind=kind,
        label=label,
        guidelines=visit.text("guidelines").replace("\r\n", "\n"),
        overlap=whole_number(visit.form, "overlap") or 1,
        overlap_share=1.0 if (found := share("overlap_share")) is None else found,
        gold_rate=share("gold_rate") or 0.0,
        training_tasks=whole_number(visit.form, "training_tasks") or 0,
        lease_minutes=whole_number(visit.form, "lease_minutes") or 30,
        gates=Gates(min_gold_accuracy=share("min_gold_accuracy")),
    )


@page("admin")
def import_tasks(visit: Visit) -> Response:
    """Add the tasks of a file."""
    label_project_id = visit.path("label_project_id")
    try:
        if not _import(visit, label_project_id):
            raise InvalidInput("Choose a JSONL file.")
    except InvalidInput as error:
        return project_page(visit, 400, error.message)
    return go(f"/web/projects/{label_project_id}", "saved")


def _import(visit: Visit, label_project_id: str) -> int:
    """Add the tasks of the form's file, if there is one; returns how many."""
    file = visit.form.get("file")
    if not isinstance(file, UploadFile) or not file.filename:
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tasks.jsonl"
        with path.open("wb") as stream:
            while piece := file.file.read(1 << 20):
                stream.write(piece)
        try:
            found = imports.read_tasks(path, as_gold=bool(visit.text("as_gold")))
        except ToolkitError as error:
            told = error.message.replace(str(path), file.filename)
            raise InvalidInput(told) from error
    return tasks.add(visit.runtime.database, visit.account, label_project_id, found)


@page("reviewer")
def show_project(visit: Visit) -> Response:
    """Show what a project has come to."""
    return project_page(visit)


def project_page(visit: Visit, status: int = 200, error: str | None = None) -> Response:
    """Write a project's page."""
    given = (visit.runtime.database, visit.account, visit.path("label_project_id"))
    project = projects.get(*given)
    version, text = projects.guidelines(*given)
    base = visit.runtime.models.base_model
    names = {
        person.id: person.name
        for person in people.list_people(visit.runtime.database, visit.account)
    }
    return visit.render(
        "project.html",
        status,
        project=project,
        report=reports.report(*given),
        open_disagreements=len(tasks.disagreements(*given, limit=100)),
        flags=[
            (one.task.id, turns(one.task.prompt)[-1]["content"], one.labeler, one.reason)
            for one in tasks.flags(*given)
        ],
        guidelines=text,
        version=version,
        served=[base, *_answering(visit)],
        typed=visit.text("prompts"),
        models=[base, *rounds.improvable(visit.runtime.database, visit.account)],
        exports=[kind for kind, kinds in FITTING.items() if project.kind in kinds],
        names=names,
        error=error,
    )


def _answering(visit: Visit) -> list[str]:
    """Return the account's versions that answer: not reward models."""
    found = registry.list_versions(visit.runtime.database, visit.account)
    return [one.name for one in found if one.lineage.get("kind") != REWARD_MODEL]


@page("admin")
def change_project(visit: Visit) -> Response:
    """Do what a button of the project's page asks for."""
    database, label_project_id = visit.runtime.database, visit.path("label_project_id")
    given = (database, visit.account, label_project_id)
    action, labeler = visit.text("action"), visit.text("labeler")
    try:
        if action == "guidelines":
            projects.update_guidelines(*given, visit.text("guidelines").replace("\r\n", "\n"))
        elif action in ("open", "paused", "closed"):
            projects.set_status(*given, action)
        elif action == "withdraw":
            tasks.drop(database, visit.account, visit.text("task"))
        elif action == "pause":
            reason = visit.text("reason") or "paused by an admin"
            gates.pause_labeler(*given, labeler, reason)
        elif action == "resume":
            gates.resume_labeler(*given, labeler)
        elif action == "export":
            kind, votes = visit.text("kind"), visit.text("votes", "majority")
            made = export.freeze(
                database, visit.runtime.files, visit.account, label_project_id, kind, votes
            )
            return visit.render("exported.html", file=made, project=projects.get(*given))
        else:
            raise InvalidInput(f"Unknown action '{action}'.")
    except ToolkitError as error:
        return project_page(visit, 400, error.message)
    return go(f"/web/projects/{label_project_id}", "saved")


@page("reviewer")
def disagreements(visit: Visit) -> Response:
    """Show the first task on which labelers differ."""
    return _disagreements(visit)


def _disagreements(visit: Visit, status: int = 200, error: str | None = None) -> Response:
    given = (visit.runtime.database, visit.account, visit.path("label_project_id"))
    found = tasks.disagreements(*given, limit=100)
    first = found[0] if found else None
    votes = (
        []
        if first is None
        else [
            said(tasks.shown_answer(answer, range(len(first.candidates))))
            for _, answer in first.votes
        ]
    )
    return visit.render(
        "disagreements.html",
        status,
        project=projects.get(*given),
        count=len(found),
        first=first,
        turns=turns(first.task.prompt) if first else [],
        options=list(zip(LETTERS, first.candidates, strict=False)) if first else [],
        votes=votes,
        typed=visit.text("text"),
        error=error,
    )


@page("reviewer")
def settle(visit: Visit) -> Response:
    """Decide the task."""
    given = (visit.runtime.database, visit.account)
    project = projects.get(*given, visit.path("label_project_id"))
    answer = read_answer(visit, project.kind).fields()
    if project.kind == "ranking":
        answer = {"ranking": _ranks(visit.text("ranking"))}
    try:
        tasks.settle(*given, visit.path("task_id"), visit.person.id, answer)
    except InvalidInput as error:
        return _disagreements(visit, 400, error.message)
    return go(f"/web/projects/{project.id}/disagreements", "saved")


def _ranks(text: str) -> dict[str, int]:
    """Read an order such as "B A=C" as ranks."""
    found = {}
    for rank, group in enumerate(text.upper().split(), start=1):
        for letter in group.split("="):
            found[letter] = rank
    return found

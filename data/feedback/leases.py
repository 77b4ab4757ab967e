"""Who gets which task: leases, overlap, gold, and an order of candidates for each labeler.

One transaction decides, and writers take turns, so a task never has more judgements and leases than
it wants, and nobody gets a task twice. A lease that ends frees the task; what its labeler submits
later counts if there is still room, and is kept in any case.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import NotFound, StateConflict
from data.feedback import projects
from data.feedback.label_kinds import LETTERS
from data.feedback.tasks import candidates_of
from data.tables import new_id, now
from data.tables_feedback import (
    Assignment,
    Judgement,
    LabelerState,
    LabelProject,
    LabelTask,
)

TAKEN = ("leased", "done", "skipped")  # an assignment in another state can be taken up again


class LabelerPaused(StateConflict):
    """This labeler gets no tasks until somebody resumes them."""

    code = "labeler_paused"


class ProjectNotOpen(StateConflict):
    """The project gives out no tasks now."""

    code = "label_project_not_open"


@dataclass(frozen=True, slots=True)
class ShownOption:
    """A candidate as a labeler sees it."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A task as a labeler sees it: nothing tells which model wrote what, or that it is gold."""

    assignment_id: str
    task_id: str
    kind: str
    prompt: Any
    options: list[ShownOption]
    label: dict[str, Any]
    guidelines_version: int
    expires_at: int
    is_training: bool


def next_task(
    database: Database, project_id: str, label_project_id: str, labeler: str
) -> Shown | None:
    """Give a labeler a task, the one in their hands first; None when there is none for them.

    Raises:
        NotFound: No such labeling project.
        ProjectNotOpen: It is paused or closed.
        LabelerPaused: The labeler is paused.
    """
    with database.write() as session:
        project = projects.find(session, project_id, label_project_id)
        _check_open(session, project, labeler)
        free_expired(session, project.id)
        assignment = _in_hand(session, project, labeler)
        if assignment is None:
            task = _choose(session, project, labeler)
            if task is None:
                return None
            assignment = _lease(session, project, task, labeler)
        return show(session, project, assignment)


def renew(database: Database, project_id: str, assignment_id: str, labeler: str) -> int:
    """Lengthen a lease, as somebody is still at it; returns when it ends.

    Raises:
        NotFound: No such assignment of this labeler.
        StateConflict: The lease is over.
    """
    with database.write() as session:
        assignment, project = find(session, project_id, assignment_id, labeler)
        if assignment.state != "leased" or assignment.expires_at <= now():
            raise StateConflict("This task is no longer in your hands; ask for the next one.")
        assignment.expires_at = now() + 60 * project.lease_minutes
        return assignment.expires_at


def release(database: Database, project_id: str, assignment_id: str, labeler: str) -> None:
    """Give a task back unjudged; the labeler may get it again. Raises NotFound."""
    with database.write() as session:
        assignment, _ = find(session, project_id, assignment_id, labeler)
        if assignment.state == "leased":
            end_lease(session, assignment, "released")


def find(
    session: Session, project_id: str, assignment_id: str, labeler: str
) -> tuple[Assignment, LabelProject]:
    """Return an assignment and its project; that of another labeler is as absent."""
    found = session.get(Assignment, assignment_id)
    project = None if found is None else session.get(LabelProject, found.label_project_id)
    if found is None or project is None or project.project_id != project_id:
        raise NotFound(f"No such assignment: {assignment_id}", param="assignment_id")
    if found.labeler != labeler:
        raise NotFound(f"No such assignment: {assignment_id}", param="assignment_id")
    return found, project


def free_expired(session: Session, label_project_id: str) -> None:
    """End the leases whose time is over."""
    query = select(Assignment).where(
        Assignment.state == "leased",
        Assignment.expires_at <= now(),
        Assignment.label_project_id == label_project_id,
    )
    for assignment in session.scalars(query).all():
        end_lease(session, assignment, "expired")


def end_lease(session: Session, assignment: Assignment, state: str) -> LabelTask:
    """Take a task out of a labeler's hands; returns it."""
    task = session.get_one(LabelTask, assignment.task_id)
    if assignment.state == "leased":
        task.leased -= 1
    assignment.state = state
    return task


def has_room(task: LabelTask) -> bool:
    """Tell whether a task wants one more judgement than it has and awaits."""
    is_gold = task.gold is not None
    return task.status == "open" and (is_gold or task.judged + task.leased < task.wanted)


def _check_open(session: Session, project: LabelProject, labeler: str) -> None:
    if project.status != "open":
        raise ProjectNotOpen(f"'{project.name}' is {project.status}; it gives out no tasks now.")
    state = session.get(LabelerState, (project.id, labeler))
    if state is not None and state.paused:
        raise LabelerPaused(
            f"Your labeling is paused: {state.reason or 'no reason was given'}. Your work is kept; "
            "ask the people who run the project."
        )


def _in_hand(session: Session, project: LabelProject, labeler: str) -> Assignment | None:
    query = select(Assignment).where(
        Assignment.label_project_id == project.id,
        Assignment.labeler == labeler,
        Assignment.state == "leased",
    )
    return session.scalars(query.order_by(Assignment.served_at)).first()


def _choose(session: Session, project: LabelProject, labeler: str) -> LabelTask | None:
    """Choose training first, then gold at its rate, then the least judged, then the oldest."""
    mine = exists().where(
        Assignment.task_id == LabelTask.id,
        Assignment.labeler == labeler,
        Assignment.state.in_(TAKEN),
    )
    unseen = (
        select(LabelTask)
        .where(LabelTask.label_project_id == project.id, LabelTask.status == "open", ~mine)
        .limit(1)
    )
    trained = (
        select(func.count())
        .select_from(Assignment)
        .join(LabelTask, LabelTask.id == Assignment.task_id)
        .where(Assignment.label_project_id == project.id, Assignment.labeler == labeler)
        .where(Assignment.state.in_(TAKEN))
    )
    if session.scalar(trained.where(LabelTask.is_training)) < project.training_tasks:  # type: ignore[operator]
        found = session.scalar(unseen.where(LabelTask.is_training).order_by(LabelTask.number))
        if found is not None:
            return found
    given = session.scalar(trained) or 0
    gold = unseen.where(LabelTask.gold.is_not(None), ~LabelTask.is_training)
    if random.Random(f"{project.seed}/{labeler}/{given}").random() < project.gold_rate:
        found = session.scalar(gold.order_by(LabelTask.number))
        if found is not None:
            return found
    load = LabelTask.judged + LabelTask.leased
    plain = unseen.where(LabelTask.gold.is_(None), load < LabelTask.wanted)
    order = (LabelTask.priority.desc(), load, LabelTask.number)
    return session.scalar(plain.order_by(*order))


def _lease(session: Session, project: LabelProject, task: LabelTask, labeler: str) -> Assignment:
    """Put a task into a labeler's hands; one that they had before keeps its order."""
    query = select(Assignment).where(Assignment.task_id == task.id, Assignment.labeler == labeler)
    assignment = session.scalar(query)
    expires_at = now() + 60 * project.lease_minutes
    task.leased += 1
    if assignment is not None:
        assignment.state, assignment.expires_at = "leased", expires_at
        assignment.served_at = now()
        return assignment
    order = list(range(len(candidates_of(session, [task.id])[task.id])))
    random.Random(f"{project.seed}/{task.id}/{labeler}").shuffle(order)
    assignment = Assignment(
        id=new_id("asg-"),
        task_id=task.id,
        label_project_id=project.id,
        labeler=labeler,
        order=order,
        guidelines_version=project.guidelines_version,
        state="leased",
        expires_at=expires_at,
    )
    session.add(assignment)
    session.flush()
    return assignment


def show(session: Session, project: LabelProject, assignment: Assignment) -> Shown:
    """Return what the labeler of an assignment sees of its task."""
    task = session.get_one(LabelTask, assignment.task_id)
    candidates = candidates_of(session, [task.id])[task.id]
    return Shown(
        assignment.id,
        task.id,
        project.kind,
        task.prompt,
        [
            ShownOption(LETTERS[index], candidates[position].text)
            for index, position in enumerate(assignment.order)
        ],
        project.label,
        assignment.guidelines_version,
        assignment.expires_at,
        task.is_training,
    )


def judged_by(session: Session, label_project_id: str, labeler: str) -> list[Judgement]:
    """Return a labeler's judgements that were not superseded, oldest first."""
    query = select(Judgement).where(
        Judgement.label_project_id == label_project_id,
        Judgement.labeler == labeler,
        Judgement.superseded_by.is_(None),
    )
    return list(session.scalars(query.order_by(Judgement.created_at, Judgement.id)))

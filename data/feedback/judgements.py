"""Judgements: submitted once, amended by a new one, never rewritten and never deleted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data.db import Database
from data.errors import InvalidInput, StateConflict
from data.feedback import gates, leases
from data.feedback.label_kinds import read_answer
from data.feedback.leases import Shown
from data.feedback.tasks import shown_answer, tell_completed
from data.tables import new_id, now
from data.tables_feedback import Assignment, Judgement, LabelTask

MAX_REASON = 500
TIMINGS = ("first_input_ms", "active_ms", "total_ms")
MAX_MS = 24 * 3600 * 1000


class AlreadyJudged(StateConflict):
    """The labeler has said something else of this task before."""

    code = "already_judged"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a labeler says, with the letters that were shown; see `label_kinds.read_answer`.

    Attributes:
        timings: Milliseconds since the task was shown: `first_input_ms`, `active_ms` (idle time
            removed) and `total_ms`; any may be missing.
    """

    choice: str | None = None
    ranking: Mapping[str, int] | None = None
    axes: Mapping[str, int] | None = None
    thumb: bool | None = None
    text: str | None = None
    strength: int | None = None
    timings: Mapping[str, int] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return what is answered, without the timings."""
        names = ("choice", "ranking", "axes", "thumb", "text", "strength")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a submission.

    Attributes:
        counted: False for training, and where the lease had ended and others took the place.
        was_there: The same had been submitted before.
        note: What to tell the labeler, if anything.
        right: Of a training task: whether the answer was the right one.
    """

    judgement: Judgement
    counted: bool
    was_there: bool = False
    note: str | None = None
    right: bool | None = None


def submit(
    database: Database, project_id: str, assignment_id: str, labeler: str, answer: Answer
) -> Submitted:
    """Keep an answer.

    Raises:
        NotFound: No such assignment of this labeler.
        InvalidInput: It is no answer to this task.
        AlreadyJudged: The labeler answered otherwise before, or skipped the task.
    """
    timings = _timings(answer.timings)
    with database.write() as session:
        assignment, project = leases.find(session, project_id, assignment_id, labeler)
        found = read_answer(project.kind, project.label, assignment.order, answer.fields())
        earlier = _current(session, assignment)
        if earlier is not None:
            if earlier.kind == "answer" and earlier.answer == found:
                return Submitted(earlier, earlier.counts, was_there=True)
            raise AlreadyJudged(
                "You have answered this task before, and differently. The first answer stands; "
                "change it on the page of your progress, or by the API with 'amend'."
                if earlier.kind == "answer"
                else "You have skipped this task; it is no longer in your hands."
            )
        task, note, counts = _take(session, assignment)
        judgement = _record(session, assignment, "answer", found, timings, counts)
        assignment.state = "done"
        gates.count(task, 1 if counts else 0)
        if counts and task.status == "done":
            tell_completed(session, project)
        right = gates.after_answer(session, project, task, judgement)
        return Submitted(judgement, counts, note=note, right=right)


def amend(
    database: Database, project_id: str, assignment_id: str, labeler: str, answer: Answer
) -> Judgement:
    """Replace an answer by a new one; the old is kept and no longer counts.

    Raises:
        NotFound: No such assignment of this labeler.
        InvalidInput: It is no answer to this task.
        StateConflict: There is no answer to amend, or the task was settled.
    """
    timings = _timings(answer.timings)
    with database.write() as session:
        assignment, project = leases.find(session, project_id, assignment_id, labeler)
        found = read_answer(project.kind, project.label, assignment.order, answer.fields())
        earlier = _current(session, assignment)
        if earlier is None or earlier.kind != "answer":
            raise StateConflict("There is no answer of yours to change; answer the task first.")
        task = session.get_one(LabelTask, assignment.task_id)
        if task.settled is not None:
            raise StateConflict("A reviewer has settled this task; its answers stay as they are.")
        counts = earlier.counts
        judgement = _record(session, assignment, "answer", found, timings, counts)
        earlier.superseded_by, earlier.counts = judgement.id, False
        return judgement


def own(
    database: Database, project_id: str, assignment_id: str, labeler: str
) -> tuple[Shown, dict[str, Any]]:
    """Return a task that a labeler has answered, and the answer by the letters that were shown.

    Raises:
        NotFound: No such assignment of this labeler.
        StateConflict: They have not answered it.
    """
    with database.read() as session:
        assignment, project = leases.find(session, project_id, assignment_id, labeler)
        found = _current(session, assignment)
        if found is None or found.kind != "answer":
            raise StateConflict("There is no answer of yours to change; answer the task first.")
        if not found.answer:
            raise StateConflict("This task was deleted, and what was said of it.")
        shown = leases.show(session, project, assignment)
        return shown, shown_answer(found.answer, assignment.order)


@dataclass(frozen=True, slots=True)
class Recent:
    """An answer that its labeler may change, by the letters that were shown."""

    assignment_id: str
    prompt: Any
    answer: dict[str, Any]


def recent(database: Database, label_project_id: str, labeler: str, limit: int) -> list[Recent]:
    """Return a labeler's newest answers in a project."""
    query = (
        select(Judgement.answer, Assignment.id, Assignment.order, LabelTask.prompt)
        .join(Assignment, Assignment.id == Judgement.assignment_id)
        .join(LabelTask, LabelTask.id == Judgement.task_id)
        .where(Judgement.label_project_id == label_project_id, Judgement.labeler == labeler)
        .where(Judgement.kind == "answer", Judgement.superseded_by.is_(None))
        .order_by(Judgement.created_at.desc(), LabelTask.number.desc())
        .limit(limit)
    )
    with database.read() as session:
        return [
            Recent(assignment, prompt, shown_answer(answer, order))
            for answer, assignment, order, prompt in session.execute(query)
            if answer  # else it was erased
        ]


def skip(
    database: Database, project_id: str, assignment_id: str, labeler: str, reason: str
) -> Judgement:
    """Leave a task to others, and say why; raises NotFound or AlreadyJudged."""
    return _refuse(database, project_id, assignment_id, labeler, "skip", reason)


def flag(
    database: Database, project_id: str, assignment_id: str, labeler: str, reason: str
) -> Judgement:
    """Skip a task and have a reviewer look at its content; raises NotFound or AlreadyJudged."""
    if not reason.strip():
        raise InvalidInput("Say what is wrong with the content.", param="reason")
    return _refuse(database, project_id, assignment_id, labeler, "flag", reason)


def _refuse(
    database: Database, project_id: str, assignment_id: str, labeler: str, kind: str, reason: str
) -> Judgement:
    if len(reason) > MAX_REASON:
        raise InvalidInput(f"A reason has at most {MAX_REASON} characters.", param="reason")
    with database.write() as session:
        assignment, project = leases.find(session, project_id, assignment_id, labeler)
        earlier = _current(session, assignment)
        if earlier is not None:
            if earlier.kind == kind:
                return earlier
            raise AlreadyJudged("You have answered or skipped this task before.")
        leases.end_lease(session, assignment, "skipped")
        judgement = _record(session, assignment, kind, {"reason": reason}, {}, False)
        gates.after_skip(session, project, labeler)
        return judgement


def _take(session: Session, assignment: Assignment) -> tuple[LabelTask, str | None, bool]:
    """Return the task, what to tell the labeler, and whether an answer to it counts."""
    is_late = assignment.state != "leased" or assignment.expires_at <= now()
    task = leases.end_lease(session, assignment, "done")
    if task.status == "dropped":
        return task, "This task was withdrawn meanwhile. Your answer is kept but not used.", False
    if task.is_training:
        return task, None, False
    if not is_late or leases.has_room(task):
        return task, None, True
    return (
        task,
        "Your time for this task had run out and others have judged it. Your answer is kept but "
        "does not count.",
        False,
    )


def _current(session: Session, assignment: Assignment) -> Judgement | None:
    query = select(Judgement).where(
        Judgement.assignment_id == assignment.id, Judgement.superseded_by.is_(None)
    )
    return session.scalars(query).first()


def _record(
    session: Session,
    assignment: Assignment,
    kind: str,
    answer: dict[str, Any],
    timings: dict[str, int],
    counts: bool,
) -> Judgement:
    judgement = Judgement(
        id=new_id("jdg-"),
        assignment_id=assignment.id,
        task_id=assignment.task_id,
        label_project_id=assignment.label_project_id,
        labeler=assignment.labeler,
        kind=kind,
        answer=answer,
        shown_first=assignment.order[0],
        timings={"served_s": max(0, now() - assignment.served_at), **timings},
        guidelines_version=assignment.guidelines_version,
        counts=counts,
    )
    session.add(judgement)
    session.flush()
    return judgement


def _timings(given: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name, value in given.items():
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MS
        if name not in TIMINGS or not good:
            raise InvalidInput(
                f"Invalid 'timings.{name}': give {', '.join(TIMINGS)} in milliseconds.",
                param="timings",
            )
        found[name] = value
    return found

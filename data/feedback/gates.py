"""Quality gates: a labeler who fails one is paused, and their work goes to others.

Nothing is deleted: the judgements of a paused labeler stay, and no longer count.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import StateConflict
from data.feedback import leases, projects
from data.feedback.projects import Gates
from data.feedback.rankings import is_right
from data.tables import now
from data.tables_feedback import (
    Assignment,
    Judgement,
    LabelerState,
    LabelProject,
    LabelTask,
)

FEW_TIMES = 10  # judgements before their median time says something
FEW_CHOICES = 20


@dataclass(frozen=True, slots=True)
class Record:
    """What a labeler has done in a project, as gates and reports look at it.

    Attributes:
        gold_right: Right answers of `gold` gold tasks, training not among them.
        first: Choices of what was shown first, of `sided` choices for one of two.
        seconds: Of each answer: active time where it was told, else from being shown.
    """

    answers: int
    skips: int
    flags: int
    gold: int
    gold_right: int
    sided: int
    first: int
    seconds: list[float]


def record_of(session: Session, project: LabelProject, labeler: str) -> Record:
    """Return what a labeler has done."""
    judged = leases.judged_by(session, project.id, labeler)
    ids = {judgement.task_id for judgement in judged}
    query = select(LabelTask.id, LabelTask.gold, LabelTask.is_training)
    query = query.where(LabelTask.label_project_id == project.id, LabelTask.gold.is_not(None))
    golds = {row.id: row for row in session.execute(query) if row.id in ids}
    return summarize(
        project.kind,
        judged,
        {i: row.gold for i, row in golds.items()},
        {i for i, row in golds.items() if row.is_training},
    )


def summarize(
    kind: str,
    judged: Sequence[Judgement],
    golds: Mapping[str, dict[str, object]],
    training: set[str],
) -> Record:
    """Return the record of one labeler's judgements; of erased ones nothing is known."""
    judged = [j for j in judged if j.answer]
    answers = [j for j in judged if j.kind == "answer" and j.task_id not in training]
    with_gold = [j for j in answers if j.task_id in golds]
    choices = [j for j in answers if isinstance(j.answer.get("choice"), int)]
    return Record(
        answers=len(answers),
        skips=sum(j.kind == "skip" for j in judged),
        flags=sum(j.kind == "flag" for j in judged),
        gold=len(with_gold),
        gold_right=sum(is_right(kind, j.answer, golds[j.task_id]) for j in with_gold),
        sided=len(choices),
        first=sum(j.answer["choice"] == j.shown_first for j in choices),
        seconds=[seconds(j.timings) for j in answers],
    )


def seconds(timings: Mapping[str, int]) -> float:
    """Return how long an answer took: active time where it was told, else since it was served."""
    active = timings.get("active_ms", timings.get("total_ms"))
    return float(timings.get("served_s", 0)) if active is None else active / 1000


def failed(gates: Gates, record: Record) -> str | None:
    """Return why a labeler is to be paused, if they are."""
    if gates.min_gold_accuracy is not None and record.gold >= gates.min_gold:
        share = record.gold_right / record.gold
        if share < gates.min_gold_accuracy:
            return f"{record.gold_right} of {record.gold} test questions right"
    if gates.min_seconds is not None and len(record.seconds) >= FEW_TIMES:
        median = statistics.median(record.seconds)
        if median < gates.min_seconds:
            return f"half of the answers took less than {median:.1f} s"
    if gates.max_side_share is not None and record.sided >= FEW_CHOICES:
        share = max(record.first, record.sided - record.first) / record.sided
        if share > gates.max_side_share:
            return f"{share:.0%} of the choices are on one side"
    total = record.answers + record.skips + record.flags
    if gates.max_skip_share is not None and total >= FEW_CHOICES:
        share = record.skips / total
        if share > gates.max_skip_share:
            return f"{share:.0%} of the tasks skipped"
    return None


def after_answer(
    session: Session, project: LabelProject, task: LabelTask, judgement: Judgement
) -> bool | None:
    """Check the gates; returns whether a training task was answered rightly."""
    if task.is_training and task.gold is not None:
        return is_right(project.kind, judgement.answer, task.gold)
    after_skip(session, project, judgement.labeler)
    return None


def after_skip(session: Session, project: LabelProject, labeler: str) -> None:
    """Pause the labeler if a gate says so."""
    gates = Gates(**project.gates)
    if all(getattr(gates, name) is None for name in Gates.__slots__ if name != "min_gold"):
        return
    reason = failed(gates, record_of(session, project, labeler))
    if reason is not None and not _state(session, project.id, labeler).paused:
        _pause(session, project, labeler, reason)


def pause_labeler(
    database: Database, project_id: str, label_project_id: str, labeler: str, reason: str
) -> int:
    """Pause a labeler and give their work to others; returns how many judgements that are.

    Raises:
        StateConflict: They are paused.
    """
    with database.write() as session:
        project = projects.find(session, project_id, label_project_id)
        if _state(session, project.id, labeler).paused:
            raise StateConflict(f"{labeler} is paused already.")
        return _pause(session, project, labeler, reason)


def resume_labeler(database: Database, project_id: str, label_project_id: str, labeler: str) -> int:
    """Let a labeler go on; what they did counts again where the task still wants it.

    Returns:
        How many of their judgements count again.

    Raises:
        StateConflict: They are not paused.
    """
    with database.write() as session:
        project = projects.find(session, project_id, label_project_id)
        state = _state(session, project.id, labeler)
        if not state.paused:
            raise StateConflict(f"{labeler} is not paused.")
        state.paused, state.reason, state.changed_at = False, None, now()
        counted = 0
        for judgement in leases.judged_by(session, project.id, labeler):
            task = session.get_one(LabelTask, judgement.task_id)
            if judgement.kind != "answer" or judgement.counts or task.is_training:
                continue
            if leases.has_room(task):
                judgement.counts = True
                count(task, 1)
                counted += task.gold is None
        audit.record(session, "labeler.resumed", project.id, project_id, labeler=labeler)
        return counted


def count(task: LabelTask, change: int) -> None:
    """Count judgements of a task in or out, and close or open it; gold never closes."""
    if task.gold is not None:
        return
    task.judged += change
    if task.status != "dropped" and task.settled is None:
        task.status = "done" if task.judged >= task.wanted else "open"


def _pause(session: Session, project: LabelProject, labeler: str, reason: str) -> int:
    state = _state(session, project.id, labeler)
    state.paused, state.reason, state.changed_at = True, reason, now()
    held = select(Assignment).where(
        Assignment.label_project_id == project.id,
        Assignment.labeler == labeler,
        Assignment.state == "leased",
    )
    for assignment in session.scalars(held).all():
        leases.end_lease(session, assignment, "released")
    taken = 0
    for judgement in leases.judged_by(session, project.id, labeler):
        if judgement.counts:
            task = session.get_one(LabelTask, judgement.task_id)
            judgement.counts = False
            count(task, -1)
            taken += task.gold is None
    audit.record(
        session, "labeler.paused", project.id, project.project_id, labeler=labeler, reason=reason
    )
    return taken


def _state(session: Session, label_project_id: str, labeler: str) -> LabelerState:
    found = session.get(LabelerState, (label_project_id, labeler))
    if found is None:
        found = LabelerState(label_project_id=label_project_id, labeler=labeler, paused=False)
        session.add(found)
        session.flush()
    return found

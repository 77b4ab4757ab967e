"""What a labeling project has come to: progress, agreement, labelers, strengths of the models."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data.db import Database
from data.feedback import agreement, gates, projects
from data.feedback.agreement import Measure
from data.feedback.bradley_terry import Strength, strengths
from data.feedback.rankings import best_of, comparisons
from data.feedback.tasks import candidates_of
from data.intervals import wilson
from data.tables_feedback import (
    Assignment,
    Candidate,
    Judgement,
    LabelerState,
    LabelProject,
    LabelTask,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts; `judgements` are those that count, `wanted` what the open tasks still want of them.

    Of one labeler: `judgements` are theirs, `tasks` what is left for them at most.
    """

    tasks: int
    done: int
    judgements: int
    wanted: int
    skipped: int
    flagged: int
    in_hand: int
    median_seconds: float | None


@dataclass(frozen=True, slots=True)
class Labeler:
    """What one labeler did; shares come with Wilson's interval, or None where nothing is known."""

    labeler: str
    answers: int
    skips: int
    flags: int
    gold: int
    gold_accuracy: float | None
    gold_interval: tuple[float, float] | None
    first_share: float | None  # of choices, for what was shown first
    first_interval: tuple[float, float] | None
    longer_share: float | None  # of choices, for the longer answer
    majority_agreement: float | None  # with most of the others
    median_seconds: float | None
    paused: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All of it; JSON by `dataclasses.asdict`."""

    progress: Progress
    alpha: dict[str, Measure]
    raw_agreement: Measure
    kappas: list[tuple[str, str, Measure]]
    gold_accuracy: float | None
    gold_interval: tuple[float, float] | None
    first_share: float | None
    longer_share: float | None
    both_bad_share: float | None
    tie_share: float | None
    labelers: list[Labeler]
    models: list[Strength]
    no_models: str | None


def progress(
    database: Database, project_id: str, label_project_id: str, labeler: str | None = None
) -> Progress:
    """Return how far a project, or a labeler in it, has come; raises NotFound."""
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        return _progress(session, project, labeler)


def _progress(session: Session, project: LabelProject, labeler: str | None) -> Progress:
    plain = (LabelTask.label_project_id == project.id, LabelTask.gold.is_(None))
    by_status = select(LabelTask.status, func.count()).where(*plain).group_by(LabelTask.status)
    counts: dict[str, int] = dict(session.execute(by_status).all())
    left = select(func.coalesce(func.sum(LabelTask.wanted - LabelTask.judged), 0))
    judged = select(Judgement).where(
        Judgement.label_project_id == project.id, Judgement.superseded_by.is_(None)
    )
    held = select(func.count()).where(
        Assignment.label_project_id == project.id, Assignment.state == "leased"
    )
    if labeler is not None:
        judged = judged.where(Judgement.labeler == labeler)
        held = held.where(Assignment.labeler == labeler)
    rows = list(session.scalars(judged))
    answers = [row for row in rows if row.kind == "answer"]
    seconds = gates.summarize(project.kind, answers, {}, set()).seconds
    tasks = sum(counts.values()) - counts.get("dropped", 0)
    return Progress(
        tasks=tasks,
        done=counts.get("done", 0),
        judgements=sum(row.counts for row in answers) if labeler is None else len(answers),
        wanted=int(session.scalar(left.where(*plain, LabelTask.status == "open")) or 0),
        skipped=sum(row.kind == "skip" for row in rows),
        flagged=sum(row.kind == "flag" for row in rows),
        in_hand=session.scalar(held) or 0,
        median_seconds=round(statistics.median(seconds), 1) if seconds else None,
    )


def report(database: Database, project_id: str, label_project_id: str) -> Report:
    """Return everything that is known of a project; raises NotFound."""
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        query = select(LabelTask).where(LabelTask.label_project_id == project.id)
        tasks = {task.id: task for task in session.scalars(query)}
        judged = select(Judgement).where(
            Judgement.label_project_id == project.id, Judgement.superseded_by.is_(None)
        )
        rows = list(session.scalars(judged.order_by(Judgement.created_at, Judgement.id)))
        paused = select(LabelerState).where(LabelerState.label_project_id == project.id)
        states = {state.labeler: state for state in session.scalars(paused)}
        found = _progress(session, project, None)
        texts = candidates_of(session, sorted({row.task_id for row in rows}))
    counted = [row for row in rows if row.counts and tasks[row.task_id].gold is None]
    counted = [row for row in counted if row.kind == "answer"]
    people = _labelers(project.kind, rows, tasks, texts, states)
    golds = sum(person.gold for person in people)
    right = sum(round((person.gold_accuracy or 0) * person.gold) for person in people)
    choices = [row for row in counted if "choice" in row.answer]
    sided = [row for row in choices if isinstance(row.answer["choice"], int)]
    results = list(_results(project.kind, counted, texts))
    models, no_models = strengths(results)
    return Report(
        progress=found,
        alpha=_alphas(project.kind, counted),
        raw_agreement=agreement.raw_agreement(_units(project.kind, counted)),
        kappas=agreement.kappas(_by_labeler(project.kind, counted)),
        gold_accuracy=right / golds if golds else None,
        gold_interval=wilson(right, golds) if golds else None,
        first_share=_share(sum(r.answer["choice"] == r.shown_first for r in sided), len(sided)),
        longer_share=_longer(sided, texts),
        both_bad_share=_share(sum(r.answer["choice"] == "both_bad" for r in choices), len(choices)),
        tie_share=_share(sum(r.answer["choice"] == "tie" for r in choices), len(choices)),
        labelers=people,
        models=models,
        no_models=no_models,
    )


def _share(part: int, count: int) -> float | None:
    return part / count if count else None


def _units(kind: str, rows: Sequence[Judgement]) -> list[list[Any]]:
    """Return what the labelers of each task said; of a ranking, of each pair of its answers."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        if kind == "ranking":
            for first, second, wins in comparisons(kind, row.answer):
                found[row.task_id, first, second].append(wins)
        else:
            found[row.task_id].append(best_of(kind, row.answer))
    return list(found.values())


def _alphas(kind: str, rows: Sequence[Judgement]) -> dict[str, Measure]:
    """Return alpha of what can be compared: choices, pairs of a ranking, each axis."""
    if kind == "likert":
        axes: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            for axis, value in row.answer["axes"].items():
                axes[axis][row.task_id].append(value)
        return {
            axis: agreement.alpha(list(units.values()), "ordinal") for axis, units in axes.items()
        }
    if kind == "edit":
        return {"edits": Measure(None, reason="edits are free text")}
    metric: agreement.Metric = "ordinal" if kind == "ranking" else "nominal"
    name = {"ranking": "pairs", "thumbs": "thumbs"}.get(kind, "choice")
    return {name: agreement.alpha(_units(kind, rows), metric)}


def _by_labeler(kind: str, rows: Sequence[Judgement]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        found[row.labeler][row.task_id] = best_of(kind, row.answer)
    return found


def _longer(sided: Sequence[Judgement], texts: Mapping[str, Sequence[Candidate]]) -> float | None:
    longer = count = 0
    for row in sided:
        lengths = [len(candidate.text) for candidate in texts[row.task_id]]
        if lengths[0] != lengths[1]:
            count += 1
            longer += lengths[row.answer["choice"]] == max(lengths)
    return _share(longer, count)


def _results(
    kind: str, rows: Sequence[Judgement], texts: Mapping[str, Sequence[Candidate]]
) -> list[tuple[str, str, float]]:
    found = []
    for row in rows:
        models = [candidate.model for candidate in texts[row.task_id]]
        for first, second, wins in comparisons(kind, row.answer):
            one, other = models[first], models[second]
            if one is not None and other is not None:
                found.append((one, other, wins))
    return found


def _labelers(
    kind: str,
    rows: Sequence[Judgement],
    tasks: Mapping[str, LabelTask],
    texts: Mapping[str, Sequence[Candidate]],
    states: Mapping[str, LabelerState],
) -> list[Labeler]:
    golds = {task.id: task.gold for task in tasks.values() if task.gold is not None}
    training = {task.id for task in tasks.values() if task.is_training}
    votes: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for row in rows:
        if row.kind == "answer" and row.task_id not in golds:
            votes[row.task_id].append((row.labeler, best_of(kind, row.answer)))
    found = []
    for name in sorted({row.labeler for row in rows}):
        mine = [row for row in rows if row.labeler == name]
        record = gates.summarize(kind, mine, golds, training)
        sided = [r for r in mine if isinstance(r.answer.get("choice"), int)]
        sided = [r for r in sided if r.task_id not in training]
        state = states.get(name)
        has_gold, has_side = bool(record.gold), bool(record.sided)
        found.append(
            Labeler(
                labeler=name,
                answers=record.answers,
                skips=record.skips,
                flags=record.flags,
                gold=record.gold,
                gold_accuracy=_share(record.gold_right, record.gold),
                gold_interval=wilson(record.gold_right, record.gold) if has_gold else None,
                first_share=_share(record.first, record.sided),
                first_interval=wilson(record.first, record.sided) if has_side else None,
                longer_share=_longer(sided, texts),
                majority_agreement=_with_majority(name, votes),
                median_seconds=(
                    round(statistics.median(record.seconds), 1) if record.seconds else None
                ),
                paused=bool(state and state.paused),
                reason=state.reason if state else None,
            )
        )
    return found


def _with_majority(name: str, votes: Mapping[str, Sequence[tuple[str, Any]]]) -> float | None:
    """Return the share of tasks on which a labeler says what most of the others say."""
    same = count = 0
    for given in votes.values():
        others = [value for labeler, value in given if labeler != name]
        mine = [value for labeler, value in given if labeler == name]
        if not mine or not others:
            continue
        tally = sorted(((others.count(value), str(value)) for value in set(others)), reverse=True)
        if len(tally) > 1 and tally[0][0] == tally[1][0]:
            continue  # there is no majority
        count += 1
        same += str(mine[0]) == tally[0][1]
    return _share(same, count)

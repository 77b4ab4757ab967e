"""What a labeling project has come to: progress, agreement, labelers, strengths of the models."""

from __future__ import annotations

import statistics
import zlib
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
from data.intervals import wilson
from data.tables_feedback import (
    Assignment,
    Candidate,
    Judgement,
    LabelerState,
    LabelProject,
    LabelTask,
)

Shown = dict[str, list[tuple[str | None, int]]]  # model and length of the answers of a task


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
    judged = select(Judgement.kind, Judgement.counts, Judgement.timings).where(
        Judgement.label_project_id == project.id, Judgement.superseded_by.is_(None)
    )
    held = select(func.count()).where(
        Assignment.label_project_id == project.id, Assignment.state == "leased"
    )
    if labeler is not None:
        judged = judged.where(Judgement.labeler == labeler)
        held = held.where(Assignment.labeler == labeler)
    rows = session.execute(judged).all()
    answers = [row for row in rows if row.kind == "answer"]
    seconds = [gates.seconds(row.timings) for row in answers]
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


@dataclass(frozen=True, slots=True)
class Overview:
    """A project in a list of them: its tasks without gold, and a labeler's answers."""

    project: LabelProject
    tasks: int
    done: int
    mine: int


def overview(database: Database, project_id: str, labeler: str) -> list[Overview]:
    """Return the account's projects, newest first, as somebody who labels sees them."""
    found = projects.list_all(database, project_id)
    ids = [project.id for project in found]
    key = LabelTask.label_project_id
    query = select(key, LabelTask.status, func.count()).where(key.in_(ids))
    query = query.where(LabelTask.gold.is_(None)).group_by(key, LabelTask.status)
    with database.read() as session:
        counts = {(row[0], row[1]): row[2] for row in session.execute(query)}
        mine = dict(session.execute(_answered(labeler)).all())
    return [
        Overview(
            project,
            counts.get((project.id, "open"), 0) + counts.get((project.id, "done"), 0),
            counts.get((project.id, "done"), 0),
            mine.get(project.id, 0),
        )
        for project in found
    ]


def answered(database: Database, label_project_id: str, labeler: str) -> int:
    """Return how many tasks of a project a labeler has answered."""
    query = _answered(labeler).where(Judgement.label_project_id == label_project_id)
    with database.read() as session:
        return dict(session.execute(query).all()).get(label_project_id, 0)


def _answered(labeler: str) -> Any:
    """Select a labeler's answers by project."""
    where = (Judgement.labeler == labeler, Judgement.kind == "answer")
    query = select(Judgement.label_project_id, func.count()).where(*where)
    return query.where(Judgement.superseded_by.is_(None)).group_by(Judgement.label_project_id)


def report(database: Database, project_id: str, label_project_id: str) -> Report:
    """Return everything that is known of a project; raises NotFound."""
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        query = select(LabelTask.id, LabelTask.gold, LabelTask.is_training)
        query = query.where(LabelTask.label_project_id == project.id, LabelTask.gold.is_not(None))
        golds = {row.id: row for row in session.execute(query)}
        found_rows = session.execute(_judged(project.id))
        rows: Sequence[Any] = [row for row in found_rows if row.answer]  # not erased
        paused = select(LabelerState).where(LabelerState.label_project_id == project.id)
        states = {state.labeler: state for state in session.scalars(paused)}
        found = _progress(session, project, None)
        shown = _candidates(session, project.id)
    counted = [row for row in rows if row.counts and row.task_id not in golds]
    counted = [row for row in counted if row.kind == "answer"]
    people = _labelers(project.kind, rows, golds, shown, states)
    asked = sum(person.gold for person in people)
    right = sum(round((person.gold_accuracy or 0) * person.gold) for person in people)
    choices = [row for row in counted if "choice" in row.answer]
    sided = [row for row in choices if isinstance(row.answer["choice"], int)]
    results = list(_results(project.kind, counted, shown))
    models, no_models = strengths(results)
    return Report(
        progress=found,
        alpha=_alphas(project.kind, counted),
        raw_agreement=agreement.raw_agreement(_units(project.kind, counted)),
        kappas=agreement.kappas(_by_labeler(project.kind, counted)),
        gold_accuracy=right / asked if asked else None,
        gold_interval=wilson(right, asked) if asked else None,
        first_share=_share(sum(r.answer["choice"] == r.shown_first for r in sided), len(sided)),
        longer_share=_longer(sided, shown),
        both_bad_share=_share(sum(r.answer["choice"] == "both_bad" for r in choices), len(choices)),
        tie_share=_share(sum(r.answer["choice"] == "tie" for r in choices), len(choices)),
        labelers=people,
        models=models,
        no_models=no_models,
    )


def _judged(label_project_id: str) -> Any:
    """Select what the report needs of the judgements that were not superseded, oldest first."""
    columns = (Judgement.task_id, Judgement.labeler, Judgement.kind, Judgement.answer)
    more = (Judgement.shown_first, Judgement.timings, Judgement.counts)
    query = select(*columns, *more).where(Judgement.label_project_id == label_project_id)
    query = query.where(Judgement.superseded_by.is_(None))
    return query.order_by(Judgement.created_at, Judgement.id)


def _candidates(session: Session, label_project_id: str) -> Shown:
    """Return by task the model and the length of each answer, in order of position."""
    query = (
        select(Candidate.task_id, Candidate.model, func.length(Candidate.text))
        .join(LabelTask, LabelTask.id == Candidate.task_id)
        .where(LabelTask.label_project_id == label_project_id)
        .order_by(Candidate.task_id, Candidate.position)
    )
    found: Shown = defaultdict(list)
    for task_id, model, length in session.execute(query):
        found[task_id].append((model, length))
    return found


def _share(part: int, count: int) -> float | None:
    return part / count if count else None


def _units(kind: str, rows: Sequence[Judgement]) -> list[list[Any]]:
    """Return what the labelers of each task said; of a ranking, of each pair of its answers."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        if kind == "ranking":
            for first, second, wins in comparisons(kind, row.answer):
                pair = row.task_id, first, second
                found[pair].append(1 - wins if _is_turned(*pair) else wins)
        else:
            found[row.task_id].append(_vote(kind, row))
    return list(found.values())


def _is_turned(task_id: str, first: int = 0, second: int = 1) -> bool:
    """Tell whether a pair's answers change names where chance agreement is reckoned: by a coin.

    Two answers are the first and the second by accident, or by an import whose preferred answer
    always comes first. Without the coin, labelers who rightly agree on such a file would seem to
    have one favourite word, and alpha and kappa would take their agreement for chance.
    """
    return bool(zlib.crc32(f"{task_id}/{first}/{second}".encode()) & 1)


def _vote(kind: str, row: Judgement) -> Any:
    best = best_of(kind, row.answer)
    is_side = kind == "pairwise" and best in (0, 1)
    return 1 - best if is_side and _is_turned(row.task_id) else best


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
        found[row.labeler][row.task_id] = _vote(kind, row)
    return found


def _longer(sided: Sequence[Judgement], shown: Shown) -> float | None:
    longer = count = 0
    for row in sided:
        lengths = [length for _, length in shown[row.task_id]]
        if lengths[0] != lengths[1]:
            count += 1
            longer += lengths[row.answer["choice"]] == max(lengths)
    return _share(longer, count)


def _results(kind: str, rows: Sequence[Judgement], shown: Shown) -> list[tuple[str, str, float]]:
    found = []
    for row in rows:
        models = [model for model, _ in shown[row.task_id]]
        for first, second, wins in comparisons(kind, row.answer):
            one, other = models[first], models[second]
            if one is not None and other is not None:
                found.append((one, other, wins))
    return found


def _labelers(
    kind: str,
    rows: Sequence[Judgement],
    gold_tasks: Mapping[str, Any],
    shown: Shown,
    states: Mapping[str, LabelerState],
) -> list[Labeler]:
    golds = {task.id: task.gold for task in gold_tasks.values()}
    training = {task.id for task in gold_tasks.values() if task.is_training}
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
                longer_share=_longer(sided, shown),
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

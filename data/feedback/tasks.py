"""Tasks: prompts with candidate answers, some with a right answer that is known (gold)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from data import audit, webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback import projects
from data.feedback.label_kinds import LETTERS, check_count, read_answer
from data.feedback.rankings import best_of
from data.tables import new_id, now
from data.tables_feedback import Candidate, Judgement, LabelProject, LabelTask

MAX_CANDIDATE = 200_000
Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CandidateSpec:
    """An answer; `model` and `origin` (sampling fields, completion id, token ids) stay hidden."""

    text: str
    model: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task to add.

    Attributes:
        prompt: Text, or messages with role and content.
        gold: The right answer, with letters for the candidates in the order given here.
        is_training: A gold task that labelers do first.
        end_user: Whose data it is, to be deleted with them.
    """

    prompt: Prompt
    candidates: Sequence[CandidateSpec]
    gold: Mapping[str, Any] | None = None
    is_training: bool = False
    priority: int = 0
    end_user: str | None = None


def add(
    database: Database, project_id: str, label_project_id: str, specs: Iterable[TaskSpec]
) -> int:
    """Add tasks, all or none; returns how many.

    Raises:
        InvalidInput: One is not right; the message tells its number.
    """
    count = 0
    with database.write() as session:
        project = projects.find(session, project_id, label_project_id)
        for spec in specs:
            count += 1
            try:
                _add(session, project, spec)
            except InvalidInput as error:
                raise InvalidInput(f"Task {count}: {error.message}", param=error.param) from error
        if count == 0:
            raise InvalidInput("No tasks were given.", param="tasks")
        audit.record(session, "label_tasks.added", project.id, project_id, count=count)
    return count


def _add(session: Session, project: LabelProject, spec: TaskSpec) -> None:
    check_prompt(spec.prompt)
    check_count(project.kind, len(spec.candidates))
    for candidate in spec.candidates:
        if len(candidate.text) > MAX_CANDIDATE:
            raise InvalidInput(
                f"A candidate has {len(candidate.text)} characters; at most {MAX_CANDIDATE}.",
                param="candidates",
            )
    texts = [candidate.text for candidate in spec.candidates]
    if len(texts) == 2 and texts[0] == texts[1]:
        raise InvalidInput("Both candidates are the same text.", param="candidates")
    if spec.is_training and spec.gold is None:
        raise InvalidInput("A training task needs the right answer as 'gold'.", param="gold")
    order = range(len(texts))
    gold = None
    if spec.gold is not None:
        gold = read_answer(project.kind, project.label, order, spec.gold)
    project.tasks_added += 1
    draw = random.Random(f"{project.seed}/{project.tasks_added}").random()
    task = LabelTask(
        id=new_id("ltask-"),
        label_project_id=project.id,
        number=project.tasks_added,
        prompt=spec.prompt if isinstance(spec.prompt, str) else [dict(m) for m in spec.prompt],
        priority=spec.priority,
        gold=gold,
        is_training=spec.is_training,
        wanted=project.overlap if draw < project.overlap_share else 1,
        end_user=spec.end_user,
    )
    session.add(task)
    session.flush()
    session.add_all(
        Candidate(
            id=new_id("cand-"),
            task_id=task.id,
            position=position,
            text=candidate.text,
            model=candidate.model,
            origin=dict(candidate.origin),
        )
        for position, candidate in enumerate(spec.candidates)
    )


def check_prompt(prompt: Any) -> None:
    """Make sure that something is a prompt; raises InvalidInput."""
    if isinstance(prompt, str):
        return
    good = isinstance(prompt, Sequence) and len(prompt) > 0
    for message in prompt if good else ():
        good = good and isinstance(message, Mapping) and isinstance(message.get("role"), str)
        good = good and isinstance(message.get("content"), str)
    if not good:
        raise InvalidInput(
            "Invalid 'prompt': give text, or a list of messages with role and content.",
            param="prompt",
        )


def get(database: Database, project_id: str, task_id: str) -> tuple[LabelTask, list[Candidate]]:
    """Return a task and its candidates in order of position; raises NotFound."""
    with database.read() as session:
        task = find(session, project_id, task_id)
        return task, candidates_of(session, [task.id])[task.id]


def drop(database: Database, project_id: str, task_id: str) -> None:
    """Take a task out of the queue; its judgements stay. Raises NotFound."""
    with database.write() as session:
        task = find(session, project_id, task_id)
        task.status = "dropped"
        audit.record(session, "label_task.dropped", task.id, project_id)
        tell_completed(session, session.get_one(LabelProject, task.label_project_id))


def find(session: Session, project_id: str, task_id: str) -> LabelTask:
    """Return a task within a transaction; another account's is as absent."""
    task = session.get(LabelTask, task_id)
    owner = None if task is None else session.get(LabelProject, task.label_project_id)
    if task is None or owner is None or owner.project_id != project_id:
        raise NotFound(f"No such labeling task: {task_id}", param="task_id")
    return task


def candidates_of(session: Session, task_ids: Sequence[str]) -> dict[str, list[Candidate]]:
    """Return the candidates of tasks, in order of position."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for at in range(0, len(task_ids), 500):
        query = select(Candidate).where(Candidate.task_id.in_(task_ids[at : at + 500]))
        for candidate in session.scalars(query.order_by(Candidate.task_id, Candidate.position)):
            found[candidate.task_id].append(candidate)
    return found


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A task on which labelers differ; `votes` are answers by position, with who gave them."""

    task: LabelTask
    candidates: list[Candidate]
    votes: list[tuple[str, dict[str, Any]]]


def disagreements(
    database: Database, project_id: str, label_project_id: str, limit: int = 50
) -> list[Disagreement]:
    """Return the tasks whose labelers name different best answers or edits, not yet settled."""
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        several = (
            select(Judgement.task_id)
            .where(Judgement.label_project_id == project.id, Judgement.counts)
            .where(Judgement.kind == "answer")
            .group_by(Judgement.task_id)
            .having(func.count() > 1)
        )
        query = select(LabelTask).where(LabelTask.id.in_(several), LabelTask.gold.is_(None))
        all_votes = _votes(session, Judgement.task_id.in_(several))
        found = []
        for task in session.scalars(query.order_by(LabelTask.number)):
            if task.settled is not None or task.status == "dropped":
                continue
            votes = all_votes[task.id]
            said = {str(answer.get("text", best_of(project.kind, answer))) for _, answer in votes}
            if len(said) > 1:
                found.append(Disagreement(task, [], votes))
            if len(found) == limit:
                break
        all_candidates = candidates_of(session, [entry.task.id for entry in found])
        return [
            Disagreement(entry.task, all_candidates[entry.task.id], entry.votes) for entry in found
        ]


def answers_of(session: Session, task_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Return who answered what, of the judgements of a task that count."""
    return _votes(session, Judgement.task_id == task_id)[task_id]


def _votes(session: Session, which: Any) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return by task who answered what."""
    columns = (Judgement.task_id, Judgement.labeler, Judgement.answer)
    query = select(*columns).where(which, Judgement.counts, Judgement.kind == "answer")
    found = defaultdict(list)
    for row in session.execute(query.order_by(Judgement.created_at, Judgement.id)):
        found[row.task_id].append((row.labeler, row.answer))
    return found


def settle(
    database: Database, project_id: str, task_id: str, reviewer: str, given: Mapping[str, Any]
) -> LabelTask:
    """Decide a task on which labelers differ; the decision is exported in place of their votes.

    Args:
        given: An answer with letters for the candidates in order of position.

    Raises:
        InvalidInput: It is no answer to such a task.
        StateConflict: The task is gold.
    """
    with database.write() as session:
        task = find(session, project_id, task_id)
        if task.gold is not None:
            raise StateConflict("The right answer of a gold task is known already.")
        project = session.get_one(LabelProject, task.label_project_id)
        order = range(len(candidates_of(session, [task.id])[task.id]))
        answer = read_answer(project.kind, project.label, order, given)
        task.settled = {"answer": answer, "reviewer": reviewer}
        task.status = "done"
        audit.record(session, "label_task.settled", task.id, project_id, reviewer=reviewer)
        tell_completed(session, project)
    return task


def tell_completed(session: Session, project: LabelProject) -> None:
    """Tell the account's webhooks if no task of a project wants a judgement any more."""
    session.flush()
    wanting = select(LabelTask.id).where(
        LabelTask.label_project_id == project.id,
        LabelTask.status == "open",
        LabelTask.gold.is_(None),
    )
    if session.scalar(wanting.limit(1)) is None:
        kind = "label_project.completed"
        webhooks.enqueue(session, project.project_id, kind, now(), {"id": project.id})


@dataclass(frozen=True, slots=True)
class Flag:
    """A task whose content a labeler flagged, and why."""

    task: LabelTask
    labeler: str
    reason: str


def flags(
    database: Database, project_id: str, label_project_id: str, limit: int = 50
) -> list[Flag]:
    """Return what was flagged of a project and is not withdrawn, newest first."""
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        query = (
            select(LabelTask, Judgement.labeler, Judgement.answer)
            .join(Judgement, Judgement.task_id == LabelTask.id)
            .where(Judgement.label_project_id == project.id, Judgement.kind == "flag")
            .where(LabelTask.status != "dropped")
            .order_by(Judgement.created_at.desc(), Judgement.id)
            .limit(limit)
        )
        return [
            Flag(task, labeler, answer.get("reason", ""))
            for task, labeler, answer in session.execute(query)
        ]


def shown_answer(answer: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Return an answer by positions with the letters of an order instead."""
    letters = {position: LETTERS[index] for index, position in enumerate(order)}
    found = dict(answer)
    if "choice" in found:
        found["choice"] = letters.get(found["choice"], found["choice"])
    if "ranks" in found:
        ranks = found.pop("ranks")
        found["ranking"] = {letters[position]: rank for position, rank in enumerate(ranks)}
    return found

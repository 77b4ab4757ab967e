"""Gold, training, paused labelers, disagreement, and labelers whose noise is known."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from label_tasks import account, database, gold, letter, make, pair
from sqlalchemy import select

from data.db import Database
from data.errors import InvalidInput, StateConflict
from data.feedback import gates, judgements, leases, projects, reports, tasks
from data.feedback.judgements import Answer
from data.feedback.leases import LabelerPaused
from data.feedback.projects import Gates, ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import LabelTask

__all__ = ["account", "database"]  # fixtures


# ---- gold, training, gates ----


def test_training_comes_first_and_does_not_count(database: Database, account: str) -> None:
    extra = [gold(100 + i, is_training=True) for i in range(2)]
    project = make(database, account, 3, extra, training_tasks=2)
    found = []
    for word in ("good", "bad"):
        shown = leases.next_task(database, account, project, "a")
        assert shown is not None
        assert shown.is_training
        answer = Answer(choice=letter(shown, word))
        told = judgements.submit(database, account, shown.assignment_id, "a", answer)
        assert not told.counted
        found.append(told.right)
    assert found == [True, False]
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    assert not shown.is_training


def test_gold_comes_at_its_rate_once_each_and_looks_like_the_rest(
    database: Database, account: str
) -> None:
    project = make(database, account, 200, [gold(500 + i) for i in range(60)], gold_rate=0.2)
    golds = 0
    seen = set()
    for _ in range(150):
        shown = leases.next_task(database, account, project, "a")
        assert shown is not None
        assert shown.task_id not in seen
        seen.add(shown.task_id)
        assert not shown.is_training
        golds += int(str(shown.prompt).split()[1]) >= 500
        judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))
    assert 12 < golds < 50  # 30 +- 4 standard deviations


def until_paused(database: Database, account: str, project: str, name: str) -> str:
    """Answer "bad", or always the letter that is the labeler's name; returns why it ended."""
    for _ in range(40):
        try:
            shown = leases.next_task(database, account, project, name)
        except LabelerPaused as error:
            return error.message
        assert shown is not None
        answer = Answer(choice=name if name == "A" else letter(shown, name))
        judgements.submit(database, account, shown.assignment_id, name, answer)
    return "never"


def test_a_labeler_who_fails_gold_is_paused_and_their_work_goes_to_others(
    database: Database, account: str
) -> None:
    rules = Gates(min_gold_accuracy=0.7, min_gold=5)
    extra = [gold(500 + i) for i in range(30)]
    project = make(database, account, 30, extra, gold_rate=0.5, gates=rules)
    assert "test questions right" in until_paused(database, account, project, "bad")
    told = reports.report(database, account, project)
    (labeler,) = told.labelers
    assert labeler.paused
    assert (labeler.gold, labeler.gold_accuracy) == (5, 0.0)
    assert labeler.answers > 5  # kept
    assert (told.progress.judgements, told.progress.done) == (0, 0)
    assert told.progress.wanted == 30
    while (shown := leases.next_task(database, account, project, "good")) is not None:
        answer = Answer(choice=letter(shown, "good"))
        judgements.submit(database, account, shown.assignment_id, "good", answer)
    assert reports.progress(database, account, project).done == 30
    assert gates.resume_labeler(database, account, project, "bad") == 0  # others did it
    with pytest.raises(StateConflict, match="not paused"):
        gates.resume_labeler(database, account, project, "bad")


def test_a_labeler_who_is_resumed_has_their_work_back(database: Database, account: str) -> None:
    project = make(database, account, 5)
    for _ in range(3):
        shown = leases.next_task(database, account, project, "a")
        assert shown is not None
        judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))
    held = leases.next_task(database, account, project, "a")
    assert held is not None
    assert gates.pause_labeler(database, account, project, "a", "to be asked") == 3
    with pytest.raises(LabelerPaused, match="to be asked"):
        leases.next_task(database, account, project, "a")
    assert reports.progress(database, account, project).wanted == 5
    assert gates.resume_labeler(database, account, project, "a") == 3
    assert reports.progress(database, account, project).judgements == 3
    again = leases.next_task(database, account, project, "a")
    assert again is not None
    assert again.task_id == held.task_id


def test_always_the_same_side_pauses(database: Database, account: str) -> None:
    project = make(database, account, 40, gates=Gates(max_side_share=0.8))
    assert "on one side" in until_paused(database, account, project, "A")


# ---- disagreement ----


def test_disagreements_are_listed_and_settled(database: Database, account: str) -> None:
    project = make(database, account, 2, overlap=2)
    for name, words in (("a", ("good", "good")), ("b", ("good", "bad"))):
        for word in words:
            shown = leases.next_task(database, account, project, name)
            assert shown is not None
            answer = Answer(choice=letter(shown, word))
            judgements.submit(database, account, shown.assignment_id, name, answer)
    (found,) = tasks.disagreements(database, account, project)
    assert found.task.prompt == "question 1"
    assert sorted(name for name, _ in found.votes) == ["a", "b"]
    tasks.settle(database, account, found.task.id, "reviewer", {"choice": "A"})
    assert tasks.disagreements(database, account, project) == []
    with database.read() as session:
        assert session.get_one(LabelTask, found.task.id).settled == {
            "answer": {"choice": 0},
            "reviewer": "reviewer",
        }


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "pair"}, "Supported values"),
        ({"overlap": 0}, "overlap"),
        ({"gold_rate": 0.9}, "gold_rate"),
        ({"lease_minutes": 0}, "lease_minutes"),
        ({"label": {"ti": True}}, "did you mean 'tie'"),
        ({"label": {"strength": 3}}, "label.strength"),
        ({"kind": "likert", "label": {"axes": []}}, "label.axes"),
        ({"gates": Gates(max_side_share=2)}, "max_side_share"),
        ({"name": ""}, "name"),
    ],
)
def test_projects_that_cannot_be(
    database: Database, account: str, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        projects.create(
            database, account, ProjectSpec(**({"name": "p", "kind": "pairwise"} | values))
        )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (TaskSpec("q", [CandidateSpec("a")]), "Task 2: A pairwise task has 2 candidates, got 1"),
        (TaskSpec("q", [CandidateSpec("a"), CandidateSpec("a")]), "same text"),
        (TaskSpec([{"role": "user"}], [CandidateSpec("a"), CandidateSpec("b")]), "prompt"),
        (pair(1, gold={"choice": "D"}), "answer.choice"),
        (pair(1, is_training=True), "needs the right answer"),
    ],
)
def test_tasks_that_cannot_be_are_refused_with_all_others(
    database: Database, account: str, spec: TaskSpec, told: str
) -> None:
    made = projects.create(database, account, ProjectSpec("p", "pairwise"))
    with pytest.raises(InvalidInput, match=told):
        tasks.add(database, account, made.id, [pair(0), spec])
    with database.read() as session:
        assert session.scalars(select(LabelTask)).all() == []


# ---- labelers whose noise is known ----


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_agreement_of_noisy_labelers_is_what_it_must_be(
    database: Database, account: str, noise: float
) -> None:
    """Each errs independently, so two agree with probability (1 - e)^2 + e^2."""
    project = make(database, account, 150, overlap=3)
    for name in ("a", "b", "c"):
        draw = random.Random(f"{name}/{noise}")
        while (shown := leases.next_task(database, account, project, name)) is not None:
            choice = letter(shown, "bad" if draw.random() < noise else "good")
            answer = Answer(choice=choice)
            judgements.submit(database, account, shown.assignment_id, name, answer)
    told = reports.report(database, account, project)
    truth = (1 - noise) ** 2 + noise**2
    interval = told.raw_agreement.interval
    assert interval is not None
    assert interval[0] < truth < interval[1]
    assert interval[1] - interval[0] < 0.15
    (best, _) = told.models
    assert best.model == "m1"
    odds = 2 * best.value  # strengths have mean 0
    assert odds == pytest.approx(math.log((1 - noise) / noise), abs=0.5)
    # The good answer comes first in every task; chance still agrees on half of two answers.
    low, high = told.alpha["choice"].interval
    assert low <= 1 - 4 * noise * (1 - noise) <= high

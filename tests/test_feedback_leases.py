"""Giving tasks out: overlap, leases, gold, orders, gates; what is judged is never lost."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from data import accounts, webhooks
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.feedback import gates, judgements, leases, projects, reports, tasks
from data.feedback.judgements import AlreadyJudged, Answer
from data.feedback.leases import LabelerPaused, ProjectNotOpen
from data.feedback.projects import Gates, ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Assignment, Judgement, LabelTask
from data.tables_jobs import WebhookDelivery


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(f"sqlite:///{tmp_path / 'hone.db'}")
    made.migrate()
    return made


@pytest.fixture
def account(database: Database) -> str:
    return accounts.create_account(database, "acme")[0].id


def pair(index: int, **values: Any) -> TaskSpec:
    candidates = [CandidateSpec(f"good {index}", "m1"), CandidateSpec(f"bad {index} longer", "m2")]
    return TaskSpec(f"question {index}", candidates, **values)


def make(database: Database, account: str, count: int, specs: Any = (), **values: Any) -> str:
    spec = ProjectSpec(**({"name": "p", "kind": "pairwise"} | values))
    made = projects.create(database, account, spec)
    tasks.add(database, account, made.id, [*(pair(i) for i in range(count)), *specs])
    return made.id


def expire(database: Database, assignment_id: str) -> None:
    with database.write() as session:
        session.get_one(Assignment, assignment_id).expires_at = 1


def letter(shown: leases.Shown, word: str) -> str:
    return next(option.key for option in shown.options if option.text.startswith(word))


# ---- overlap ----


def test_twenty_labelers_at_once_never_exceed_the_overlap(database: Database, account: str) -> None:
    project = make(database, account, 60, overlap=3, lease_minutes=5)
    seen: dict[str, list[str]] = {}
    faults: list[Exception] = []

    def work(name: str) -> None:
        draw = random.Random(name)
        mine = seen.setdefault(name, [])
        try:
            while True:
                nothing_out = reports.progress(database, account, project).in_hand == 0
                shown = leases.next_task(database, account, project, name)
                if shown is None and nothing_out:
                    return
                if shown is None:  # somebody may skip what they have in hand
                    time.sleep(0.01)
                    continue
                mine.append(shown.task_id)
                if draw.random() < 0.1:
                    judgements.skip(database, account, shown.assignment_id, name, "hard")
                else:
                    answer = Answer(choice=letter(shown, "good"))
                    judgements.submit(database, account, shown.assignment_id, name, answer)
        except Exception as error:  # noqa: BLE001 - told by the assertion below
            faults.append(error)

    threads = [threading.Thread(target=work, args=(f"labeler-{i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for mine in seen.values():
        assert len(mine) == len(set(mine))
    with database.read() as session:
        counted = Counter(session.scalars(select(Judgement.task_id).where(Judgement.counts)))
        assert set(counted.values()) == {3}
        assert len(counted) == 60
        found = session.scalars(select(LabelTask)).all()
        assert all((task.judged, task.leased, task.status) == (3, 0, "done") for task in found)
    told = reports.progress(database, account, project)
    assert (told.tasks, told.done, told.judgements, told.wanted) == (60, 60, 180, 0)


def test_a_share_of_the_tasks_has_the_overlap(database: Database, account: str) -> None:
    make(database, account, 400, overlap=3, overlap_share=0.25)
    with database.read() as session:
        wanted = Counter(session.scalars(select(LabelTask.wanted)))
    assert set(wanted) == {1, 3}
    assert 60 < wanted[3] < 140  # 100 +- 4.6 standard deviations


def test_the_least_judged_come_first_then_the_oldest(database: Database, account: str) -> None:
    project = make(database, account, 3, overlap=2)
    order = []
    for name in ("a", "b"):
        for _ in range(3):
            shown = leases.next_task(database, account, project, name)
            assert shown is not None
            order.append(shown.prompt)
            answer = Answer(choice="A")
            judgements.submit(database, account, shown.assignment_id, name, answer)
        assert leases.next_task(database, account, project, name) is None
    assert order == 2 * [f"question {i}" for i in range(3)]
    assert leases.next_task(database, account, project, "c") is None


def test_priority_comes_before_age(database: Database, account: str) -> None:
    project = make(database, account, 2, [pair(9, priority=1)])
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    assert shown.prompt == "question 9"


# ---- leases ----


def test_the_task_in_hand_comes_back(database: Database, account: str) -> None:
    project = make(database, account, 2)
    first = leases.next_task(database, account, project, "a")
    again = leases.next_task(database, account, project, "a")
    assert first == again
    other = leases.next_task(database, account, project, "b")
    assert other is not None
    assert first is not None
    assert other.task_id != first.task_id
    assert leases.next_task(database, account, project, "c") is None


def test_a_lease_that_ended_frees_the_task_and_a_late_answer_is_kept(
    database: Database, account: str
) -> None:
    project = make(database, account, 1)
    late = leases.next_task(database, account, project, "late")
    assert late is not None
    expire(database, late.assignment_id)
    other = leases.next_task(database, account, project, "other")
    assert other is not None
    assert other.task_id == late.task_id
    told = judgements.submit(database, account, other.assignment_id, "other", Answer(choice="A"))
    assert told.counted
    kept = judgements.submit(database, account, late.assignment_id, "late", Answer(choice="B"))
    assert not kept.counted
    assert "kept" in str(kept.note)
    with database.read() as session:
        task = session.get_one(LabelTask, late.task_id)
        assert (task.judged, task.leased, task.status) == (1, 0, "done")


def test_a_late_answer_counts_where_nobody_else_judged(database: Database, account: str) -> None:
    project = make(database, account, 1)
    late = leases.next_task(database, account, project, "late")
    assert late is not None
    expire(database, late.assignment_id)
    told = judgements.submit(database, account, late.assignment_id, "late", Answer(choice="A"))
    assert told.counted
    with database.read() as session:
        assert session.get_one(LabelTask, late.task_id).leased == 0


def test_an_ended_lease_may_be_had_again_in_the_same_order(
    database: Database, account: str
) -> None:
    project = make(database, account, 1)
    first = leases.next_task(database, account, project, "a")
    assert first is not None
    expire(database, first.assignment_id)
    with pytest.raises(StateConflict, match="no longer in your hands"):
        leases.renew(database, account, first.assignment_id, "a")
    again = leases.next_task(database, account, project, "a")
    assert again is not None
    assert again.assignment_id == first.assignment_id
    assert again.options == first.options
    assert leases.renew(database, account, first.assignment_id, "a") > 1


def test_a_released_task_goes_to_whoever_asks(database: Database, account: str) -> None:
    project = make(database, account, 1)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    leases.release(database, account, shown.assignment_id, "a")
    assert leases.next_task(database, account, project, "b") is not None


def test_a_skipped_task_goes_to_others_only(database: Database, account: str) -> None:
    project = make(database, account, 1)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    judgements.skip(database, account, shown.assignment_id, "a", "do not know")
    assert leases.next_task(database, account, project, "a") is None
    assert leases.next_task(database, account, project, "b") is not None
    with pytest.raises(AlreadyJudged):
        judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))


def test_a_project_that_is_not_open_gives_nothing_out(database: Database, account: str) -> None:
    project = make(database, account, 2)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    projects.pause(database, account, project)
    with pytest.raises(ProjectNotOpen, match="paused"):
        leases.next_task(database, account, project, "a")
    told = judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))
    assert told.counted
    projects.resume(database, account, project)
    assert leases.next_task(database, account, project, "a") is not None


def test_a_task_that_was_dropped_meanwhile(database: Database, account: str) -> None:
    project = make(database, account, 1)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    tasks.drop(database, account, shown.task_id)
    told = judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))
    assert not told.counted
    assert "withdrawn" in str(told.note)


def told(database: Database) -> list[tuple[str, str]]:
    with database.read() as session:
        bodies = [json.loads(one.body) for one in session.scalars(select(WebhookDelivery))]
    return [(body["type"], body["data"]["id"]) for body in bodies]


def test_webhooks_tell_when_nothing_is_wanted_any_more(database: Database, account: str) -> None:
    events = ["label_project.completed"]
    webhooks.create(database, account, "me", "https://93.184.216.34/", events)
    project = make(database, account, 3, [gold(9)])
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    judgements.submit(database, account, shown.assignment_id, "a", Answer(choice="A"))
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    tasks.settle(database, account, shown.task_id, "reviewer", {"choice": "A"})
    assert told(database) == []
    shown = leases.next_task(database, account, project, "b")
    assert shown is not None
    tasks.drop(database, account, shown.task_id)
    assert told(database) == [("label_project.completed", project)]
    tasks.add(database, account, project, [pair(5)])
    shown = leases.next_task(database, account, project, "c")
    assert shown is not None
    judgements.submit(database, account, shown.assignment_id, "c", Answer(choice="A"))
    assert told(database) == 2 * [("label_project.completed", project)]


def test_flags_are_listed_until_the_task_is_withdrawn(database: Database, account: str) -> None:
    project = make(database, account, 2)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    judgements.flag(database, account, shown.assignment_id, "a", "an address")
    [found] = tasks.flags(database, account, project)
    assert (found.task.id, found.labeler, found.reason) == (shown.task_id, "a", "an address")
    tasks.drop(database, account, shown.task_id)
    assert tasks.flags(database, account, project) == []


# ---- orders ----


def test_orders_are_shuffled_stored_and_the_same_for_the_same_seed(
    database: Database, account: str
) -> None:
    project = make(database, account, 40, overlap=2)
    firsts = Counter()
    for name in ("a", "b"):
        for _ in range(40):
            shown = leases.next_task(database, account, project, name)
            assert shown is not None
            assert [option.key for option in shown.options] == ["A", "B"]
            firsts[shown.options[0].text.split()[0]] += 1
            choice = letter(shown, "good")
            judgements.submit(database, account, shown.assignment_id, name, Answer(choice=choice))
    assert 20 < firsts["good"] < 60
    with database.read() as session:
        kept = session.scalars(select(Judgement)).all()
    assert {judgement.answer["choice"] for judgement in kept} == {0}  # whatever was shown first
    assert {judgement.shown_first for judgement in kept} == {0, 1}


# ---- submitting ----


def test_the_same_answer_twice_is_one_and_another_is_refused(
    database: Database, account: str
) -> None:
    project = make(database, account, 1)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    key = shown.assignment_id
    first = judgements.submit(database, account, key, "a", Answer(choice="A"))
    again = judgements.submit(database, account, key, "a", Answer(choice="A"))
    assert again.was_there
    assert again.judgement.id == first.judgement.id
    with pytest.raises(AlreadyJudged, match="differently"):
        judgements.submit(database, account, key, "a", Answer(choice="B"))
    new = judgements.amend(database, account, key, "a", Answer(choice="tie"))
    with database.read() as session:
        rows = {row.id: row for row in session.scalars(select(Judgement))}
    assert rows[first.judgement.id].superseded_by == new.id
    assert [row.id for row in rows.values() if row.counts] == [new.id]
    with database.read() as session:
        assert session.get_one(LabelTask, shown.task_id).judged == 1


def test_nobody_answers_for_another(database: Database, account: str) -> None:
    project = make(database, account, 1)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    stranger = accounts.create_account(database, "other")[0].id
    for who, name in ((account, "b"), (stranger, "a")):
        with pytest.raises(NotFound, match="No such assignment"):
            judgements.submit(database, who, shown.assignment_id, name, Answer(choice="A"))
    with pytest.raises(NotFound):
        leases.next_task(database, stranger, project, "a")


@pytest.mark.parametrize(
    ("kind", "label", "answer", "told"),
    [
        ("pairwise", {}, {"choice": "C"}, "answer.choice"),
        ("pairwise", {"tie": False}, {"choice": "tie"}, "answer.choice"),
        ("pairwise", {}, {"choice": "A", "strength": 2}, "does not ask for strengths"),
        ("pairwise", {"strength": 4}, {"choice": "A", "strength": 5}, "answer.strength"),
        ("pairwise", {"strength": 4}, {"choice": "tie", "strength": 1}, "no strength"),
        ("pairwise", {}, {"thumb": True}, "has choice and strength"),
        ("ranking", {}, {"ranking": {"A": 1}}, "a rank for each of A, B"),
        ("ranking", {"ties": False}, {"ranking": {"A": 1, "B": 1}}, "no ties"),
        ("ranking", {}, {"ranking": {"A": 0, "B": 1}}, "from 1"),
    ],
)
def test_answers_that_are_none(
    database: Database, account: str, kind: str, label: Any, answer: Any, told: str
) -> None:
    project = make(database, account, 1, kind=kind, label=label)
    shown = leases.next_task(database, account, project, "a")
    assert shown is not None
    with pytest.raises(InvalidInput, match=told):
        judgements.submit(database, account, shown.assignment_id, "a", Answer(**answer))


@pytest.mark.parametrize(
    ("kind", "label", "answer", "kept"),
    [
        ("likert", {"axes": ["tone"], "scale": 7}, {"axes": {"tone": 7}}, {"axes": {"tone": 7}}),
        ("thumbs", {}, {"thumb": False}, {"thumb": False}),
        ("edit", {}, {"text": "better\u202e"}, {"text": "better\u202e"}),
    ],
)
def test_kinds_with_one_candidate(
    database: Database, account: str, kind: str, label: Any, answer: Any, kept: Any
) -> None:
    made = projects.create(database, account, ProjectSpec("p", kind, label))
    tasks.add(database, account, made.id, [TaskSpec("q", [CandidateSpec("x" * 100_000)])])
    shown = leases.next_task(database, account, made.id, "a")
    assert shown is not None
    assert len(shown.options[0].text) == 100_000
    told = judgements.submit(database, account, shown.assignment_id, "a", Answer(**answer))
    assert told.judgement.answer == kept


def test_rankings_are_kept_by_position(database: Database, account: str) -> None:
    made = projects.create(database, account, ProjectSpec("p", "ranking"))
    texts = ["zero", "one", "two", "three"]
    tasks.add(database, account, made.id, [TaskSpec("q", [CandidateSpec(text) for text in texts])])
    shown = leases.next_task(database, account, made.id, "a")
    assert shown is not None
    wanted = {"zero": 3, "one": 1, "two": 3, "three": 9}
    given = {option.key: wanted[option.text] for option in shown.options}
    told = judgements.submit(database, account, shown.assignment_id, "a", Answer(ranking=given))
    assert told.judgement.answer == {"ranks": [2, 1, 2, 3]}


# ---- gold, training, gates ----


def gold(index: int, **values: Any) -> TaskSpec:
    return pair(index, gold={"choice": "A"}, **values)


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

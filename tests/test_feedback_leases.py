"""Giving tasks out: overlap, leases; what is judged is never lost."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter

import pytest
from label_tasks import account, database, expire, gold, letter, make, pair
from sqlalchemy import select

from data import webhooks
from data.db import Database
from data.errors import StateConflict
from data.feedback import judgements, leases, projects, reports, tasks
from data.feedback.judgements import AlreadyJudged, Answer
from data.feedback.leases import ProjectNotOpen
from data.tables_feedback import Judgement, LabelTask
from data.tables_jobs import WebhookDelivery

__all__ = ["account", "database"]  # fixtures


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

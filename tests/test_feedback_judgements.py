"""Orders of what is shown, and answers: what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from label_tasks import account, database, letter, make
from sqlalchemy import select

from data import accounts
from data.db import Database
from data.errors import InvalidInput, NotFound
from data.feedback import export, judgements, leases, projects, tasks
from data.feedback.judgements import AlreadyJudged, Answer
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Judgement, LabelTask

__all__ = ["account", "database"]  # fixtures


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


@pytest.mark.parametrize(
    ("kind", "texts", "said", "exported"),
    [
        (
            "ranking",
            ["x", "y"],
            [{"ranking": {"x": 1, "y": 2}}, {"ranking": {"x": 2, "y": 1}}],
            ("preference", "ranks", [[1, 2], [2, 1]]),
        ),
        (
            "thumbs",
            ["x"],
            [{"thumb": True}, {"thumb": False}],
            ("unpaired", "label", [True, False]),
        ),
        ("edit", ["x"], [{"text": "y"}, {"text": "z"}], ("preference", "chosen", ["y", "z"])),
    ],
)
def test_a_row_a_vote_says_whose_it_is(
    database: Database,
    account: str,
    kind: Any,
    texts: list[str],
    said: list[dict[str, Any]],
    exported: tuple[str, str, list[Any]],
) -> None:
    made = projects.create(database, account, ProjectSpec("p", kind, overlap=2))
    tasks.add(database, account, made.id, [TaskSpec("q", [CandidateSpec(text) for text in texts])])
    for name, answer in zip(("ann", "bob"), said, strict=True):
        shown = leases.next_task(database, account, made.id, name)
        assert shown is not None
        keys = {option.text: option.key for option in shown.options}
        if "ranking" in answer:
            answer = {"ranking": {keys[text]: rank for text, rank in answer["ranking"].items()}}
        judgements.submit(database, account, shown.assignment_id, name, Answer(**answer))
    form, column, values = exported
    found = export.rows(database, account, made.id, form, votes="each").rows
    assert {row["labeler"]: row[column] for row in found} == dict(
        zip(("ann", "bob"), values, strict=True)
    )
    unsigned = export.rows(database, account, made.id, form).rows
    assert not any("labeler" in row for row in unsigned)

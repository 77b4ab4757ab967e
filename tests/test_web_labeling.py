"""The pages of labelers: every kind of task, changed answers, what goes wrong."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from api_server import MODEL, Server
from sqlalchemy import select
from web_forms import (
    XSS,
    account,
    form_of,
    make_project,
    person,
    server,
)

from data.feedback import privacy, projects, tasks
from data.feedback.projects import Gates, ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Assignment, Judgement

__all__ = ["account", "server"]  # fixtures


# ---- labeling ----


def test_pairs_from_first_to_last(server: Server, account: str) -> None:
    project = make_project(server, account, guidelines="# Be *kind*\n\n<b>no</b>")
    browser = person(server, account, "labeler")
    text = browser.get(f"/web/label/{project}")
    assert "<h1>Be <em>kind</em></h1>" in text
    assert "&lt;b&gt;no&lt;/b&gt;" in text
    for _ in range(4):
        assert "ft:" not in text
        path, letters = form_of(text)
        text = browser.post(path, choice=letters["good"], active_ms="1500", total_ms="2000")
    assert "nothing more for you to judge" in text
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == project)
        found = session.scalars(query).all()
    assert [judgement.answer for judgement in found] == [{"choice": 0}] * 4
    assert found[0].timings["active_ms"] == 1500
    assert "4 of 4 tasks done" in browser.get(f"/web/label/{project}/progress")


@pytest.mark.parametrize(
    ("kind", "values", "form", "kept"),
    [
        ("pairwise", {"label": {"strength": 4}}, {"choice": "tie"}, {"choice": "tie"}),
        (
            "likert",
            {"label": {"axes": ["tone", "facts"]}},
            {"axis-tone": "5", "axis-facts": "1"},
            {"axes": {"tone": 5, "facts": 1}},
        ),
        ("thumbs", {}, {"thumb": "down"}, {"thumb": False}),
        ("edit", {}, {"text": "two\r\nlines \u202e"}, {"text": "two\nlines \u202e"}),
    ],
)
def test_kinds(
    server: Server, account: str, kind: str, values: Any, form: Any, kept: dict[str, Any]
) -> None:
    project = make_project(server, account, kind, **values)
    browser = person(server, account, "labeler")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    browser.post(path, **form)
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == project)
        (found,) = session.scalars(query).all()
    assert found.answer == kept


def test_rankings_and_strengths(server: Server, account: str) -> None:
    browser = person(server, account, "labeler")
    project = make_project(server, account, "ranking")
    path, letters = form_of(browser.get(f"/web/label/{project}"))
    ranks = {"good": "1", "middling": "2", "bad": "2"}
    browser.post(path, **{f"rank-{letters[word]}": rank for word, rank in ranks.items()})
    strong = make_project(server, account, label={"strength": 4})
    path, letters = form_of(browser.get(f"/web/label/{strong}"))
    browser.post(path, choice=f"{letters['bad']}:3")
    with server.runtime.database.read() as session:
        found = {j.label_project_id: j.answer for j in session.scalars(select(Judgement))}
    assert found[project] == {"ranks": [1, 2, 2]}
    assert found[strong] == {"choice": 1, "strength": 3}


def test_what_goes_wrong_in_labeling_is_told_and_nothing_is_lost(
    server: Server, account: str
) -> None:
    browser = person(server, account, "labeler")
    project = make_project(server, account, "edit", count=8)
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    text = browser.post(path, 400, text="   ")
    assert "give the better answer" in text
    assert form_of(text)[0] == path
    two_tabs = form_of(browser.get(f"/web/label/{project}"))[0]
    assert two_tabs == path
    browser.post(path, text="better")
    assert "counts once" in browser.post(two_tabs, text="better")
    assert "first answer stands" in browser.post(two_tabs, text="other")
    gone = f"/web/label/{project}/asg-none"
    assert "no longer in your hands" in browser.post(gone, text="x")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    key = path.rsplit("/", 1)[1]
    with server.runtime.database.write() as session:
        session.get_one(Assignment, key).expires_at = 1
    other = person(server, account, "labeler")
    stolen, _ = form_of(other.get(f"/web/label/{project}"))
    other.post(stolen, text="theirs")
    assert "does not count" in browser.post(path, text="late")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    assert "Skipped" in browser.post(path, action="skip", reason="hard")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    assert "Say what is wrong" in browser.post(path, 400, action="flag", reason="")
    assert "Flagged" in browser.post(path, action="flag", reason="an address")
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == project)
        kinds = sorted(judgement.kind for judgement in session.scalars(query))
    assert kinds == ["answer", "answer", "answer", "flag", "skip"]


def test_a_lost_session_leads_back(server: Server, account: str) -> None:
    browser = person(server, account, "labeler")
    project = make_project(server, account)
    path, letters = form_of(browser.get(f"/web/label/{project}"))
    browser.http.cookies.clear()
    page = f"/web/label/{project}"
    for host, target in ((server.url, page), ("https://evil.example", "/web/")):
        headers = {"origin": server.url, "referer": f"{host}{page}?note=late"}
        text = browser.http.post(path, data={"choice": letters["good"]}, headers=headers).text
        assert "Sign in" in text
        assert f'name="next" value="{target}"' in text


def test_training_says_right_or_wrong(server: Server, account: str) -> None:
    project = make_project(server, account, training_tasks=1)
    pair = [CandidateSpec("good"), CandidateSpec("bad")]
    spec = TaskSpec("trained", pair, gold={"choice": "A"}, is_training=True)
    tasks.add(server.runtime.database, account, project, [spec])
    browser = person(server, account, "labeler")
    text = browser.get(f"/web/label/{project}")
    assert "training" in text
    path, letters = form_of(text)
    assert "Read them again" in browser.post(path, choice=letters["bad"])


def test_empty_and_closed_projects(server: Server, account: str) -> None:
    browser = person(server, account, "labeler")
    made = projects.create(server.runtime.database, account, ProjectSpec("Empty", "pairwise"))
    assert "nothing more for you" in browser.get(f"/web/label/{made.id}")
    projects.close(server.runtime.database, account, made.id)
    assert "is closed" in browser.get(f"/web/label/{made.id}")
    assert "Empty" not in browser.get("/web/")


def test_text_of_models_and_users_is_never_markup(server: Server, account: str) -> None:
    database = server.runtime.database
    spec = ProjectSpec(XSS, "pairwise", guidelines=XSS + "\n\n[a](javascript:alert(1))", overlap=2)
    made = projects.create(database, account, spec)
    messages = [{"role": XSS, "content": XSS}]
    candidates = [CandidateSpec(XSS + "1", XSS), CandidateSpec("x" * 100_000, "other")]
    tasks.add(database, account, made.id, [TaskSpec(messages, candidates)])
    admin, labeler = person(server, account, "admin"), person(server, account, "labeler")
    pages = []
    for browser, choice in ((admin, "A"), (labeler, "A")):
        text = browser.get(f"/web/label/{made.id}")
        pages.append(text)
        path = re.search(r'id="task"[^>]*action="([^"]*)"', text)
        assert path is not None
        browser.post(path[1], choice=choice)
    for path in ("", f"projects/{made.id}", f"projects/{made.id}/disagreements"):
        pages.append(admin.get(f"/web/{path}"))
    pages.append(labeler.get(f"/web/label/{made.id}/guidelines"))
    answers = admin.post("/web/playground", prompt=XSS, first=MODEL, second=MODEL, max_tokens=2)
    pages.append(answers)
    for text in pages:
        assert "<script>alert" not in text
        assert "<img" not in text
        assert 'href="javascript' not in text
        assert len(re.findall("<script", text)) == 2  # the page's own


# ---- changing an answer ----


@pytest.mark.parametrize(
    ("kind", "values", "first", "shown", "second", "kept"),
    [
        ("pairwise", {}, {"choice": "tie"}, "tie", {"choice": "both_bad"}, {"choice": "both_bad"}),
        (
            "ranking",
            {},
            {"rank-A": "1", "rank-B": "2", "rank-C": "2"},
            "A, B = C",
            {"rank-A": "1", "rank-B": "1", "rank-C": "1"},
            {"ranks": [1, 1, 1]},
        ),
        (
            "likert",
            {"label": {"axes": ["tone"]}},
            {"axis-tone": "5"},
            "tone 5",
            {"axis-tone": "2"},
            {"axes": {"tone": 2}},
        ),
        ("thumbs", {}, {"thumb": "down"}, "bad", {"thumb": "up"}, {"thumb": True}),
        ("edit", {}, {"text": "better <b>"}, "better &lt;b&gt;", {"text": "b"}, {"text": "b"}),
    ],
)
def test_the_last_answer_is_changed(
    server: Server, account: str, kind: str, values: Any, first: Any, shown: str, second: Any,
    kept: Any,
) -> None:  # fmt: skip
    project = make_project(server, account, kind, count=2, **values)
    browser = person(server, account, "labeler")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    text = browser.post(path, **first)
    assert f'<a href="{path}" data-press="z">' in text
    progress = browser.get(f"/web/label/{project}/progress")
    assert f'href="{path}"' in progress
    assert shown in progress
    text = browser.get(path)
    assert f'<strong dir="auto">{shown}</strong>' in text
    assert "Skip or flag" not in text
    change, _ = form_of(text)
    assert change == f"{path}/amend"
    assert "Your answer was changed" in browser.post(change, **second)
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == project)
        found = session.scalars(query.order_by(Judgement.created_at)).all()
    [now] = [judgement for judgement in found if judgement.counts]
    assert (len(found), now.answer) == (2, kept)


def test_changes_that_cannot_be(server: Server, account: str) -> None:
    project = make_project(server, account, "edit", count=2)
    browser, other = (person(server, account, "labeler") for _ in range(2))
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    assert "answer the task first" in browser.get(path, 400)
    assert "answer the task first" in browser.post(f"{path}/amend", 400, text="x")
    browser.post(path, text="better")
    other.get(path, 404)
    other.post(f"{path}/amend", 404, text="stolen")
    assert "give the better answer" in browser.post(f"{path}/amend", 400, text=" ")
    task = path.rsplit("/", 1)[1]
    with server.runtime.database.read() as session:
        task_id = session.get_one(Assignment, task).task_id
    tasks.settle(server.runtime.database, account, task_id, "reviewer", {"text": "settled"})
    assert "A reviewer has settled this task" in browser.post(f"{path}/amend", 400, text="late")
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == project)
        assert [judgement.answer["text"] for judgement in session.scalars(query)] == ["better"]


# ---- what goes wrong ----


def test_a_labeler_who_skips_all_is_told_when_there_is_no_more(
    server: Server, account: str
) -> None:
    project = make_project(server, account, count=3)
    browser = person(server, account, "labeler")
    text = browser.get(f"/web/label/{project}")
    for _ in range(3):
        text = browser.post(form_of(text)[0], action="skip", reason="")
    assert "nothing more for you to judge" in text
    progress = browser.get(f"/web/label/{project}/progress")
    assert "<th>Skipped</th><td>3</td>" in progress
    assert "0 of 3 tasks done" in progress
    assert "question 0" in person(server, account, "labeler").get(f"/web/label/{project}")


def test_a_labeler_who_skips_too_much_is_paused(server: Server, account: str) -> None:
    project = make_project(server, account, count=30, gates=Gates(max_skip_share=0.5))
    browser = person(server, account, "labeler")
    text = browser.get(f"/web/label/{project}")
    for _ in range(20):
        text = browser.post(form_of(text)[0], action="skip", reason="hard")
    assert "Your labeling is paused: 100% of the tasks skipped" in text


def test_a_task_withdrawn_or_deleted_while_it_is_in_hand(server: Server, account: str) -> None:
    database = server.runtime.database
    project = make_project(server, account, "edit", count=1)
    browser = person(server, account, "labeler")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    with database.read() as session:
        task_id = session.get_one(Assignment, path.rsplit("/", 1)[1]).task_id
    tasks.drop(database, account, task_id)
    assert "withdrawn meanwhile. Your answer is kept" in browser.post(path, text="typed")
    with database.read() as session:
        query = select(Judgement).where(Judgement.task_id == task_id)
        assert [judgement.answer for judgement in session.scalars(query)] == [{"text": "typed"}]
    theirs = [
        TaskSpec("theirs", [CandidateSpec("their words")], end_user=user) for user in ("bob", "ann")
    ]
    tasks.add(database, account, project, theirs)
    judged, _ = form_of(browser.get(f"/web/label/{project}"))
    browser.post(judged, text="better")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    privacy.delete_end_user(database, account, "ann")
    assert "withdrawn" in browser.post(path, text="about their words")
    privacy.delete_end_user(database, account, "bob")
    assert "better" not in browser.get(f"/web/label/{project}/progress")
    assert "This task was deleted" in browser.get(judged, 400)
    assert "nothing more" in browser.get(f"/web/label/{project}")
    assert "Krippendorff" in person(server, account, "admin").get(f"/web/projects/{project}")


def test_long_and_strange_texts_come_back_as_they_were(server: Server, account: str) -> None:
    strange = (
        "\u202eright to left \u2066\x07\x1b[31m \u0645\u0631\u062d\u0628\u0627 \u200d\ufeff end"
    )
    long = strange + "x" * 100_000
    made = projects.create(server.runtime.database, account, ProjectSpec("Long", "edit"))
    task = TaskSpec("q \x01", [CandidateSpec(long)])
    tasks.add(server.runtime.database, account, made.id, [task])
    browser = person(server, account, "labeler")
    text = browser.get(f"/web/label/{made.id}")
    assert html.escape(long) in text
    assert text.count('dir="auto"') >= 2
    assert "nothing more" in browser.post(form_of(text)[0], text=long + "!")
    with server.runtime.database.read() as session:
        query = select(Judgement).where(Judgement.label_project_id == made.id)
        assert [judgement.answer for judgement in session.scalars(query)] == [{"text": long + "!"}]


@pytest.mark.parametrize("choice", ["", "C", "A:x", "A:9", "A:" + "9" * 5000])
def test_choices_that_are_none_keep_the_task(server: Server, account: str, choice: str) -> None:
    project = make_project(server, account, label={"strength": 4})
    browser = person(server, account, "labeler")
    path, _ = form_of(browser.get(f"/web/label/{project}"))
    text = browser.post(path, 400, choice=choice)
    assert 'role="alert"' in text
    assert form_of(text)[0] == path

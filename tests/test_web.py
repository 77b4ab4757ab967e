"""The pages over HTTP, as a browser sends its forms: every screen, every role, every refusal."""

from __future__ import annotations

import html
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import select, update

from data import accounts, people
from data.feedback import privacy, projects, rounds, tasks
from data.feedback.projects import Gates, ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Assignment, Feedback, Judgement, LabelTask
from data.tables_people import WebSession

PASSWORD = "correct horse battery"
XSS = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'&'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("web"))) as found:
        yield found


class Browser:
    """Follows redirects, keeps cookies, and says where its forms come from."""

    def __init__(self, server: Server):
        self.url = server.url
        self.http = httpx.Client(base_url=server.url, follow_redirects=True, timeout=60)
        server.clients.callback(self.http.close)

    def get(self, path: str, status: int = 200) -> str:
        answer = self.http.get(path)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"].startswith("text/html")
        assert "unsafe" not in answer.headers["content-security-policy"]
        return answer.text

    def post(self, path: str, status: int = 200, files: Any = None, **form: Any) -> str:
        answer = self.http.post(path, data=form, files=files, headers={"origin": self.url})
        assert answer.status_code == status, answer.text
        return answer.text

    def sign_in(self, login: str) -> Browser:
        assert "Sign out" in self.post("/web/login", login=login, password=PASSWORD)
        return self


@pytest.fixture
def account(server: Server) -> str:
    return server.new_account(f"pages-{secrets.token_hex(4)}")[0].id


def person(server: Server, account: str, role: str) -> Browser:
    login = f"{role}-{secrets.token_hex(4)}@example.org"
    people.create(server.runtime.database, account, login, role.title(), role, PASSWORD)
    return Browser(server).sign_in(login)


def make_project(
    server: Server, account: str, kind: str = "pairwise", count: int = 4, **values: Any
) -> str:
    database = server.runtime.database
    spec = ProjectSpec(**({"name": f"My {kind}", "kind": kind} | values))
    made = projects.create(database, account, spec)
    texts = {"pairwise": ["good", "bad"], "ranking": ["good", "middling", "bad"]}.get(kind, ["one"])
    tasks.add(
        database,
        account,
        made.id,
        [
            TaskSpec(
                f"question {i}", [CandidateSpec(f"{text} {i}", f"ft:{text}") for text in texts]
            )
            for i in range(count)
        ],
    )
    return made.id


def form_of(text: str) -> tuple[str, dict[str, str]]:
    """Return where the task's form goes, and the letter of each answer shown."""
    action = re.search(r'id="task"[^>]*action="([^"]*)"', text)
    assert action is not None, text
    shown = re.findall(r'data-letter="(\w)".*?<div class="text"[^>]*>(.*?)</div>', text, re.S)
    return action[1], {html.unescape(answer).split()[0]: letter for letter, answer in shown}


# ---- signing in ----


def test_nobody_sees_anything_without_a_session(server: Server) -> None:
    for path in ("/web/", "/web/jobs", "/web/label/lproj-x", "/web/projects/new"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/web/login?next=/web/")
    assert "no such page" in Browser(server).get("/web/nowhere", 404)


def test_signing_in_and_out(server: Server, account: str) -> None:
    browser = Browser(server)
    people.create(server.runtime.database, account, "Ann@example.org", "Ann", "labeler", PASSWORD)
    wrong = browser.post("/web/login", 401, login="ann@example.org", password="wrong password")
    unknown = browser.post("/web/login", 401, login="nobody", password=PASSWORD)
    assert all("The login or the password is wrong." in text for text in (wrong, unknown))
    text = browser.post(
        "/web/login", login="ANN@example.org", password=PASSWORD, next="//evil.example"
    )
    assert "Ann (labeler)" in text
    cookie = next(iter(browser.http.cookies.jar))
    assert cookie.name == "hone_session"
    assert cookie.path == "/web"
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "lax"
    with server.runtime.database.read() as session:
        assert cookie.value not in list(session.scalars(select(WebSession.token_hash)))
    token = cookie.value
    browser.post("/web/logout")
    answer = httpx.get(f"{server.url}/web/", cookies={"hone_session": str(token)})
    assert answer.status_code == 303


def test_a_session_ends_with_idleness_a_new_password_and_a_disabled_person(
    server: Server, account: str
) -> None:
    database = server.runtime.database
    login = f"ends-{secrets.token_hex(4)}"
    people.create(database, account, login, "", "labeler", PASSWORD)
    browser = Browser(server).sign_in(login)
    with database.write() as session:
        session.execute(update(WebSession).values(seen_at=1))
    assert "Sign in" in browser.get("/web/")
    browser.sign_in(login)
    people.change(database, login, password=PASSWORD)
    assert "Sign in" in browser.get("/web/")
    browser.sign_in(login)
    people.change(database, login, disabled=True)
    assert "Sign in" in browser.get("/web/")
    assert "wrong" in browser.post("/web/login", 401, login=login, password=PASSWORD)


def test_guessing_is_slowed(server: Server) -> None:
    browser = Browser(server)
    for _ in range(30):
        browser.post("/web/login", 401, login="guessed", password="a guess at it")
    assert "try again in" in browser.post("/web/login", 429, login="guessed", password=PASSWORD)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site", "origin": "HERE"},
        {"sec-fetch-site": "same-site"},
        {"origin": "null"},
        {},
    ],
)
def test_forms_from_elsewhere_are_refused(
    server: Server, account: str, headers: dict[str, str]
) -> None:
    browser = person(server, account, "admin")
    project = make_project(server, account)
    headers = {k: v.replace("HERE", server.url) for k, v in headers.items()}
    for path, form in (
        (f"/web/projects/{project}", {"action": "closed"}),
        ("/web/logout", {}),
        ("/web/login", {"login": "a", "password": "b"}),
    ):
        answer = browser.http.post(path, data=form, headers=headers)
        assert answer.status_code == 403, path
        assert "not sent from a page of this server" in answer.text
    assert projects.get(server.runtime.database, account, project).status == "open"
    browser.get("/web/")


# ---- roles ----


ADMIN = ("/web/rounds", "/web/models", "/web/jobs", "/web/playground", "/web/projects/new")


@pytest.mark.parametrize(("role", "rank"), [("labeler", 0), ("reviewer", 1), ("admin", 2)])
def test_pages_by_role(server: Server, account: str, role: str, rank: int) -> None:
    browser = person(server, account, role)
    project = make_project(server, account)
    for path in ("/web/", f"/web/label/{project}", f"/web/label/{project}/guidelines"):
        browser.get(path)
    browser.get(f"/web/label/{project}/progress")
    for path in (f"/web/projects/{project}", f"/web/projects/{project}/disagreements"):
        text = browser.get(path, 200 if rank >= 1 else 403)
        assert (rank >= 1) == ("My pairwise" in text)
    for path in ADMIN:
        browser.get(path, 200 if rank >= 2 else 403)
    status = 200 if rank >= 2 else 403
    browser.post(f"/web/projects/{project}", status, action="paused")
    browser.post("/web/playground", status, prompt="a", first=MODEL, second=MODEL, max_tokens=1)


def test_another_accounts_pages_are_as_absent(server: Server, account: str) -> None:
    other = server.new_account(f"other-{secrets.token_hex(4)}")[0].id
    browser = person(server, account, "admin")
    theirs = make_project(server, other)
    for path in ("label/{}", "projects/{}", "projects/{}/disagreements", "jobs/{}"):
        for name in (theirs, "lproj-none"):
            answer = browser.http.get("/web/" + path.format(name))
            assert answer.status_code == 404
            assert theirs not in answer.text.replace(name, "")


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


# ---- deciding disagreements ----


@pytest.mark.parametrize(
    ("kind", "values", "says", "shown", "decision", "kept"),
    [
        (
            "likert",
            {"label": {"axes": ["tone", "facts"]}},
            ({"axis-tone": "5", "axis-facts": "1"}, {"axis-tone": "2", "axis-facts": "1"}),
            ("tone 5, facts 1", "tone 2, facts 1"),
            {"axis-tone": "3", "axis-facts": "1"},
            {"axes": {"tone": 3, "facts": 1}},
        ),
        (
            "thumbs",
            {},
            ({"thumb": "up"}, {"thumb": "down"}),
            ("good", "bad"),
            {"thumb": "down"},
            {"thumb": False},
        ),
        (
            "edit",
            {},
            ({"text": "one <i>"}, {"text": "two"}),
            ("one &lt;i&gt;", "two"),
            {"text": "one <i>\r\nand two"},
            {"text": "one <i>\nand two"},
        ),
        (
            "ranking",
            {},
            (
                {"rank-A": "1", "rank-B": "2", "rank-C": "3"},
                {"rank-A": "1", "rank-B": "1", "rank-C": "1"},
            ),
            ("A = B = C",),
            {"ranking": "b a=c"},
            {"ranks": [2, 1, 2]},
        ),
    ],
)
def test_every_kind_of_disagreement_is_decided(
    server: Server, account: str, kind: str, values: Any, says: Any, shown: Any, decision: Any,
    kept: Any,
) -> None:  # fmt: skip
    project = make_project(server, account, kind, count=1, overlap=2, **values)
    for said in says:
        browser = person(server, account, "labeler")
        browser.post(form_of(browser.get(f"/web/label/{project}"))[0], **said)
    reviewer = person(server, account, "reviewer")
    page = f"/web/projects/{project}/disagreements"
    text = reviewer.get(page)
    assert "1 left" in text
    assert all(word in text for word in shown)
    paths = re.findall(r'action="(/web/projects/[^"]*/disagreements/[^"]*)"', text)
    assert paths
    refused = reviewer.post(paths[0], 400)
    assert 'role="alert"' in refused
    assert "1 left" in refused
    browser.post(paths[0], 403, **decision)
    assert "None:" in reviewer.post(paths[0], **decision)
    with server.runtime.database.read() as session:
        settled = session.get_one(LabelTask, paths[0].rsplit("/", 1)[1]).settled
    assert settled is not None
    assert settled["answer"] == kept


# ---- admins ----


def test_a_project_is_made_filled_reported_and_exported(server: Server, account: str) -> None:
    admin = person(server, account, "admin")
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    file = ("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    refused = admin.post("/web/projects/new", 400, name="", kind="pairwise", overlap="2")
    assert "Invalid &#39;name&#39;" in refused
    assert 'name="overlap" inputmode="numeric" value="2"' in refused
    text = admin.post(
        "/web/projects/new", name="Tone", kind="pairwise", overlap="2", files={"file": file}
    )
    assert "0 of 3 tasks done" in text
    project = re.search(r"lproj-\w+", text)
    assert project is not None
    path = f"/web/projects/{project[0]}"
    bad = ("bad.jsonl", b'{"prompt": "q", "candidates": ["a"]}\n')
    assert "2 candidates, got 1" in admin.post(f"{path}/tasks", 400, files={"file": bad})
    labelers = [person(server, account, "labeler") for _ in range(2)]
    for number, labeler in enumerate(labelers):
        text = labeler.get(f"/web/label/{project[0]}")
        for _ in range(3):
            task, letters = form_of(text)
            wanted = "bad" if number and "q 2" in text else "good"
            text = labeler.post(task, choice=letters[wanted])
    text = admin.get(path)
    assert "Krippendorff" in text
    assert "Disagreements (1)" in text
    text = admin.get(f"{path}/disagreements")
    settle = re.search(r'action="([^"]*disagreements/[^"]*)"', text)
    assert settle is not None
    assert "None:" in admin.post(settle[1], choice="A")
    exported = admin.post(path, action="export", kind="preference")
    assert re.search(r"file-\w+", exported)
    names = re.findall(r'name="labeler" value="(user-\w+)"', admin.get(path))
    assert len(names) == 2
    assert "paused: paused by an admin" in admin.post(path, action="pause", labeler=names[0])
    assert "is paused already" in admin.post(path, 400, action="pause", labeler=names[0])
    admin.post(path, action="resume", labeler=names[0])
    assert "Version 2" in admin.post(path, action="guidelines", guidelines="# New")
    assert "closed" in admin.post(path, action="closed")
    assert "Unknown action" in admin.post(path, 400, action="burn")


def test_what_is_flagged_is_shown_and_withdrawn(server: Server, account: str) -> None:
    project = make_project(server, account, count=2)
    labeler, admin = person(server, account, "labeler"), person(server, account, "admin")
    path, _ = form_of(labeler.get(f"/web/label/{project}"))
    labeler.post(path, action="flag", reason="an <address>")
    page = f"/web/projects/{project}"
    text = admin.get(page)
    assert "an &lt;address&gt;" in text
    found = re.search(r'name="task" value="(ltask-[^"]*)"', text)
    assert found is not None
    assert "question 0" in person(server, account, "reviewer").get(page)
    labeler.post(page, 403, action="withdraw", task=found[1])
    text = admin.post(page, action="withdraw", task=found[1])
    assert "Flagged</h2>" not in text
    assert "0 of 1 tasks done" in text
    assert "No such labeling task" in admin.post(page, 400, action="withdraw", task="ltask-none")


def test_a_round_is_started_followed_and_cancelled(server: Server, account: str) -> None:
    admin = person(server, account, "admin")
    project = make_project(server, account, count=8)
    text = admin.get(f"/web/label/{project}")
    path, form = f"/web/projects/{project}", {"comparisons": "2", "min_judgements": "2"}
    start = f"{path}/rounds"
    none_yet = admin.post(start, 400, min_win_rate="55", **form)
    assert "has no judgements to export as preference" in none_yet
    for _ in range(8):
        task, letters = form_of(text)
        text = admin.post(task, choice=letters["good"])
    assert f"<option>{MODEL}</option>" in admin.get(path)
    assert "is no percentage" in admin.post(start, 400, min_win_rate="much", **form)
    assert "Invalid &#39;method&#39;" in admin.post(
        start, 400, min_win_rate="55", method="sft", **form
    )
    text = admin.post(start, min_win_rate="55", certain="1", method="dpo", model=MODEL, **form)
    made = re.search(r"round-\w+", text)
    assert made is not None
    assert 'hx-trigger="every 5s"' in text
    [found] = rounds.list_all(server.runtime.database, account)
    expected = {"min_win_rate": 0.55, "min_judgements": 2, "certain": True}
    assert (found.rule, len(found.prompts)) == (expected, 2)
    labeler = person(server, account, "labeler")
    labeler.post(f"/web/rounds/{found.id}/cancel", 403)
    stranger = person(server, server.new_account(f"other-{secrets.token_hex(4)}")[0].id, "admin")
    assert found.id not in stranger.get("/web/rounds")
    stranger.post(f"/web/rounds/{found.id}/cancel", 404)
    text = admin.post(f"/web/rounds/{found.id}/cancel")
    assert '<span class="tag">cancelled</span>' in text
    assert "hx-trigger" not in text
    assert "has ended already" in admin.post(f"/web/rounds/{found.id}/cancel", 400)


def test_the_playground_keeps_what_is_preferred(server: Server, account: str) -> None:
    admin = person(server, account, "admin")
    text = admin.post("/web/playground", prompt="The cat", first=MODEL, second=MODEL, max_tokens=3)
    pairs = re.findall(
        r'name="better" value="([^"]*)"><input[^>]*name="worse" value="([^"]*)"', text
    )
    assert len(pairs) == 2
    assert pairs[0] == pairs[1][::-1]
    assert "Saved." in admin.post("/web/playground/prefer", better=pairs[0][0], worse=pairs[0][1])
    with server.runtime.database.read() as session:
        (kept,) = session.scalars(select(Feedback).where(Feedback.project_id == account)).all()
    assert (kept.kind, kept.prompt, kept.completion_id) == ("preference", "The cat", pairs[0][0])
    told = admin.post("/web/playground", 400, prompt="a", first="ft:none", second=MODEL)
    assert "does not exist" in told


def test_jobs_and_models(server: Server, account: str) -> None:
    admin = person(server, account, "admin")
    assert MODEL in admin.get("/web/models")
    assert "No jobs yet" in admin.get("/web/jobs")
    database = server.runtime.database
    key = accounts.create_key(database, account)[1]
    client = server.client(key)
    rows = b"".join(
        json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n"
        for i in range(12)
    )
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, metadata={"team": "support"}
    )
    assert job.id in admin.get("/web/jobs")
    text = admin.get(f"/web/jobs/{job.id}")
    assert 'hx-trigger="every 3s"' in text
    live = admin.http.get(f"/web/jobs/{job.id}", headers={"hx-request": "true"}).text
    assert live.startswith('<div id="live"')

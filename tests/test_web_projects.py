"""The pages of reviewers and admins: disagreements, projects, rounds, jobs and models."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

import pytest
from api_server import MODEL, Server
from sqlalchemy import select
from web_forms import (
    account,
    form_of,
    make_project,
    person,
    server,
)

from data import accounts
from data.feedback import rounds
from data.tables_feedback import Feedback, LabelTask

__all__ = ["account", "server"]  # fixtures


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
    pair = {"better": pairs[0][0], "worse": pairs[0][1]}
    stranger = person(server, server.new_account(f"other-{secrets.token_hex(4)}")[0].id, "admin")
    for form in (pair, dict.fromkeys(pair, "cmpl-absent")):  # told alike
        assert "no longer stored" in stranger.post("/web/playground/prefer", 400, **form)
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

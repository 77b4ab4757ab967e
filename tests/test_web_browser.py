"""The pages in a real browser: labeling by keyboard alone, every page checked by axe-core.

`BROWSER_SHOTS=folder` keeps a picture of every page.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from api_server import Server, running, tiny_settings
from client_env import SCRIPTS, node_env, python_env, run_client
from sqlalchemy import select

from data import people
from data.feedback import judgements, leases, projects, tasks
from data.feedback.judgements import Answer
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Judgement

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PASSWORD = "correct horse battery"
GUIDELINES = """# What to look for

1. Is it **true**?
2. Is it *kind*?

Prefer the shorter answer where both are good.
"""
STRANGE = "\u202eright to left \u2066\x07\x1b[31m \u0645\u0631\u062d\u0628\u0627 " + "x" * 100_000
AXES = ["tone", "facts"]
LONG = "A good answer that says what was asked, and then a little more. " * 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in (CHROMIUM, DRIVER), reason="chromium is not installed"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm, which brings axe-core, is not"),
]


def make(server: Server, kind: str, count: int, texts: list[str], **values: Any) -> str:
    database, account = server.runtime.database, server.project.id
    spec = ProjectSpec(f"My {kind}", kind, guidelines=GUIDELINES, **values)
    made = projects.create(database, account, spec)
    messages = [
        {"role": "system", "content": "You answer customers of a bakery."},
        {"role": "user", "content": "Do you have bread without nuts?"},
    ]
    specs = [
        TaskSpec(
            messages, [CandidateSpec(f"{text} {i}", f"ft:{n}") for n, text in enumerate(texts)]
        )
        for i in range(count)
    ]
    tasks.add(database, account, made.id, specs)
    return made.id


def judge(server: Server, project: str, count: int) -> None:
    """Have somebody else answer before, at odds with the labeler now and then."""
    database, account = server.runtime.database, server.project.id
    for number in range(count):
        shown = leases.next_task(database, account, project, "somebody")
        assert shown is not None
        word = "poor" if number % 5 == 0 else "good"
        key = next(option.key for option in shown.options if word in option.text)
        judgements.submit(database, account, shown.assignment_id, "somebody", Answer(choice=key))


def disagree(server: Server, project: str, answers: list[Answer]) -> None:
    """Have as many people say different things of a task."""
    database, account = server.runtime.database, server.project.id
    for number, answer in enumerate(answers):
        shown = leases.next_task(database, account, project, f"person-{number}")
        assert shown is not None
        judgements.submit(database, account, shown.assignment_id, f"person-{number}", answer)


def test_a_labeler_and_an_admin_at_work(tmp_path: Path) -> None:
    python = python_env("browser", "selenium==4.51.0")
    axe = node_env("axe", "axe-core@4.11.1") / "node_modules/axe-core/axe.min.js"
    shots = os.environ.get("BROWSER_SHOTS")
    with running(tiny_settings(tmp_path)) as server:
        database, account = server.runtime.database, server.project.id
        for role in ("labeler", "admin"):
            people.create(database, account, f"{role}@example.org", role, role, PASSWORD)
        poor = "A poor answer. " * 3
        script = "<script>window.stolen = true</script><img src=x onerror='window.stolen=true'>"
        given = {
            "url": server.url,
            "password": PASSWORD,
            "people": {role: f"{role}@example.org" for role in ("labeler", "admin")},
            "projects": {
                "pairs": make(server, "pairwise", 24, [LONG, poor], overlap=2),
                "edits": make(server, "edit", 2, ["We have bread without nuts"]),
                "ranking": make(server, "ranking", 2, ["good", "middling", "poor"]),
                "likert": make(server, "likert", 2, [LONG], label={"axes": ["tone", "facts"]}),
                "tabs": make(server, "pairwise", 4, ["good", "poor"]),
                "strange": make(server, "edit", 2, [STRANGE]),
                "edited": make(server, "edit", 1, ["We has bread"], overlap=2),
                "rated": make(server, "likert", 1, [LONG], overlap=2, label={"axes": AXES}),
                "script": make(server, "pairwise", 1, [script, "plain"]),
            },
            "chromium": CHROMIUM,
            "chromedriver": DRIVER,
            "axe": str(axe),
            "shots": shots,
        }
        judge(server, given["projects"]["pairs"], 24)
        edits = [Answer(text="We have bread."), Answer(text="Yes, we have bread without nuts.")]
        disagree(server, given["projects"]["edited"], edits)
        ratings = [Answer(axes={"tone": 5, "facts": 4}), Answer(axes={"tone": 2, "facts": 4})]
        disagree(server, given["projects"]["rated"], ratings)
        client = server.client()
        rows = b"".join(
            json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n"
            for i in range(12)
        )
        file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        model = server.runtime.models.base_model
        given["job"] = client.fine_tuning.jobs.create(model=model, training_file=file.id).id
        told = run_client([python, SCRIPTS / "browser_flow.py", json.dumps(given)])
        with database.read() as session:
            query = select(Judgement).where(Judgement.labeler.startswith("user-"))
            kept = session.scalars(query.order_by(Judgement.created_at)).all()
    for part in ("label", "trouble", "manage", "phone"):
        assert told[part]["serious"] == {}, part
        assert told[part]["console"] == [], part
    seen = told["label"]
    assert seen["after_skip"]
    assert "Answered 20" in seen["progress"]
    assert "Skipped 1" in seen["progress"]
    assert seen["draft"] == "We have bread without nuts 0 and more"
    assert not seen["script_ran"]
    assert seen["script_text"]
    answers = [judgement.answer for judgement in kept if judgement.kind == "answer"]
    of_pairs = [j for j in kept if j.label_project_id == given["projects"]["pairs"]]
    pairs = [judgement.answer.get("choice") for judgement in of_pairs]
    assert pairs.count(0) == 19
    assert pairs.count("tie") == 1
    assert {"text": "We have bread without nuts 0 and more"} in answers
    assert {"axes": {"tone": 4, "facts": 2}} in answers
    assert seen["changed"]
    [changed] = [j for j in kept if j.answer.get("axes") == {"tone": 5, "facts": 2}]
    assert changed.counts
    in_trouble = told["trouble"]
    assert in_trouble["same_task"]
    assert in_trouble["other_tab"]
    assert "2 answered" in in_trouble["after_two_clicks"]
    of_tabs = [j for j in kept if j.label_project_id == given["projects"]["tabs"]]
    assert [judgement.answer for judgement in of_tabs] == 2 * [{"choice": "tie"}]
    assert in_trouble["too_wide"] <= 0
    assert {"text": f"{STRANGE} 0!"} in answers
    ranks = next(answer["ranks"] for answer in answers if "ranks" in answer)
    assert sorted(ranks) == [1, 2, 3]
    assert all(
        judgement.timings.get("active_ms", 0) > 0
        for judgement in kept
        if judgement.kind == "answer"
    )
    report = told["manage"]["report"]
    assert "Krippendorff" in report
    assert "undefined" not in report.split("Gold accuracy")[0]
    assert "of 25 tasks done" in told["manage"]["drawn"]
    assert told["phone"]["too_wide"] <= 0
    print(f"median time of a page: {statistics.median(seen['times']) * 1000:.0f} ms")

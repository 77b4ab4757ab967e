"""Training files under an account's content policy: told, or refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fake_worker
import pytest

from data import accounts, content, content_events, jobs
from data.content import Policy, Rule
from data.job_spec import JobSpec
from data.tables import Job, Project
from train.worker import Worker
from train.workshop import Workshop

MODEL = "smollm2-135m-instruct"
TEXTS = ["fine"] * 10 + ["a zorg", "fine", "more ZORG, zorg"]
RULES = (Rule("word", "zorg", name="zorgs"),)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    shop = fake_worker.make_shop(tmp_path / "home")
    yield shop
    shop.database.close()


@pytest.fixture
def project(shop: Workshop) -> Project:
    return accounts.create_account(shop.database, "acme")[0]


def run(shop: Workshop, project: Project, policy: Policy) -> Job:
    content.replace_policy(shop.database, project.id, policy)
    rows = [json.dumps({"prompt": f"q {i}", "completion": text}) for i, text in enumerate(TEXTS)]
    text = "\n".join(rows).encode() + b"\n"
    file = shop.files.create(project.id, [text], "train.jsonl", "fine-tune")
    job = jobs.create(shop.database, project.id, JobSpec(MODEL, file.id), [MODEL])
    Worker(shop).run(once=True)
    return jobs.get(shop.database, project.id, job.id)


def test_a_policy_that_blocks_fails_the_job(shop: Workshop, project: Project) -> None:
    job = run(shop, project, Policy(training="block", rules=RULES))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "content_policy_violation"
    assert job.error["param"] == "training_file"
    assert "2 of 13 rows" in job.error["message"]
    assert "lines 11, 13" in job.error["message"]
    [event], _ = content_events.list_events(shop.database, project.id, 5)
    assert (event.side, event.mode, event.matched) == ("training", "block", ["zorgs"])


def test_a_policy_that_scores_tells_and_trains(shop: Workshop, project: Project) -> None:
    job = run(shop, project, Policy(training="score", rules=RULES))
    assert job.status == "succeeded"
    events, _ = jobs.list_events(shop.database, project.id, job.id, limit=100)
    [told] = [event for event in events if "content policy" in event.message]
    assert told.level == "warn"
    assert told.data is not None
    found = told.data["content_policy"]
    assert found == {"rows": 13, "count": 2, "matched": {"zorgs": 2}, "lines": [11, 13]}


def test_no_policy_no_screening(shop: Workshop, project: Project) -> None:
    job = run(shop, project, Policy(input="block", output="block", rules=RULES))
    assert job.status == "succeeded"
    assert content_events.list_events(shop.database, project.id, 5) == ([], False)

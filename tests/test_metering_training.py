"""What a job trained is billed once, however it ended; with a fake trainer as a real process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_worker
import pytest
from sqlalchemy import select
from test_train_worker import add_job, checkpoint_told, wait_for, worker_thread

from data import accounts, job_pause, jobs
from data.metering import Meter
from data.settings import Prices
from data.tables import Job, Project
from data.tables_metering import UsageRecord
from serve.api.fine_tuning import describe_job
from train.worker import Worker
from train.workshop import Workshop

EACH = 100  # tokens of a step


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    shop = fake_worker.make_shop(tmp_path / "home")
    yield shop
    shop.stopping.set()
    shop.database.close()


@pytest.fixture
def project(shop: Workshop) -> Project:
    return accounts.create_account(shop.database, "acme")[0]


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda **plan: monkeypatch.setenv("FAKE_TRAINER", json.dumps({"tokens": EACH} | plan))


def billed(shop: Workshop) -> list[tuple[str, int, str]]:
    """Return job, tokens and status of every bill, after several ledgers have looked."""
    for _ in range(2):
        meter = Meter(shop.database, Prices(training=3.0))
        meter.flush()
        meter.flush()
    with shop.database.read() as session:
        records = session.scalars(select(UsageRecord).where(UsageRecord.kind == "training"))
        return [(r.request_id, r.prompt_tokens, r.status) for r in records]


def read(shop: Workshop, job: Job) -> Job:
    return jobs.get(shop.database, job.project_id, job.id)


def test_a_failed_job_is_billed_for_the_steps_it_did(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(fault="told", at=3)
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    assert read(shop, job).status == "failed"
    assert describe_job(read(shop, job))["trained_tokens"] == 3 * EACH
    assert billed(shop) == [(job.id, 3 * EACH, "error")]


def test_steps_that_are_done_again_after_a_crash_count_once(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(fault="killed", at=5)  # from the checkpoint of step 4, each time
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    assert read(shop, job).status == "failed"
    assert billed(shop) == [(job.id, 5 * EACH, "error")]


def test_a_cancelled_job_is_billed_for_the_steps_it_did(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(steps=10_000)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 4))
        running = read(shop, job)
        assert describe_job(running)["trained_tokens"] is None  # as long as it runs
        assert billed(shop) == []
        jobs.request_cancel(shop.database, project.id, job.id)
        ((of, tokens, status),) = billed(shop)
    assert (of, status) == (job.id, "error")
    assert 4 * EACH <= tokens <= steps_done(shop, job) * EACH
    assert tokens == describe_job(read(shop, job))["trained_tokens"]
    assert billed(shop) == [(job.id, tokens, "error")]  # not more, now that the trainer is gone


def test_a_paused_job_is_billed_when_it_ends(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(steps=10_000)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 4))
        job_pause.pause(shop.database, project.id, job.id)
        wait_for(lambda: read(shop, job).worker_id is None)
        before = read(shop, job).trained_tokens or 0
        assert before >= 4 * EACH
        assert billed(shop) == []
        job_pause.resume(shop.database, project.id, job.id)
        wait_for(lambda: (read(shop, job).trained_tokens or 0) > before)
        jobs.request_cancel(shop.database, project.id, job.id)
    ((_, tokens, _),) = billed(shop)
    assert before < tokens <= steps_done(shop, job) * EACH


def test_a_job_that_never_trained_costs_nothing(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave()
    job = add_job(shop, project)
    jobs.request_cancel(shop.database, project.id, job.id)
    assert billed(shop) == []
    assert describe_job(read(shop, job))["trained_tokens"] is None


def steps_done(shop: Workshop, job: Job) -> int:
    lines = shop.run_of(job).metrics.read_text("utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return max(record["step"] for record in records)

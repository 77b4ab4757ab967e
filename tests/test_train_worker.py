"""The worker: what becomes of a job, whatever dies; with a fake trainer as a real process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_worker
import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from data import accounts, adapter_folders, job_lease, jobs, registry
from data.job_spec import JobSpec
from data.tables import AdapterVersion, File, Job, JobEvent, Project
from train import job_training, worker
from train.job_training import MAX_CRASHES, fail_job
from train.lease import Lease
from train.trainer_process import RUN_MARK
from train.worker import Worker
from train.workshop import BULK, Workshop

MODEL = "smollm2-135m-instruct"
WORKER = [sys.executable, str(Path(fake_worker.__file__))]
ROWS = [json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) for i in range(12)]


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
    return lambda **plan: monkeypatch.setenv("FAKE_TRAINER", json.dumps(plan))


def add_job(shop: Workshop, project: Project, rows: list[str] = ROWS, **spec: Any) -> Job:
    text = "\n".join(rows).encode() + b"\n"
    file = shop.files.create(project.id, [text], "train.jsonl", "fine-tune")
    asked = JobSpec(spec.pop("model", MODEL), file.id, **spec)
    return jobs.create(shop.database, project.id, asked, [MODEL])


def status_of(shop: Workshop, job: Job) -> str:
    return jobs.get(shop.database, job.project_id, job.id).status


def messages_of(shop: Workshop, job: Job) -> list[str]:
    found, _ = jobs.list_events(shop.database, job.project_id, job.id, limit=1000)
    return [event.message for event in reversed(found)]


def data_of(shop: Workshop, job: Job, message: str) -> Any:
    found, _ = jobs.list_events(shop.database, job.project_id, job.id, limit=1000)
    return next(event.data for event in found if event.message == message)


def checkpoint_told(shop: Workshop, job: Job, step: int) -> bool:
    start = f"Checkpoint created at step {step}: "
    return any(message.startswith(start) for message in messages_of(shop, job))


def wait_for(condition: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return value


def trainers_of(shop: Workshop, job: Job) -> list[psutil.Process]:
    folder, found = str(shop.run_of(job).path.resolve()), []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_MARK) == folder:
                found.append(process)
        except psutil.Error:
            pass
    return sorted(found, key=lambda process: process.create_time())


@contextmanager
def worker_process(
    shop: Workshop, *words: str, die_at: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*WORKER, str(shop.settings.home), *words],
        env={**os.environ, "DIE_AT": die_at},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def worker_thread(shop: Workshop) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=Worker(shop).run)
    thread.start()
    try:
        yield thread
    finally:
        shop.stopping.set()
        thread.join()


def check_succeeded(shop: Workshop, job: Job) -> None:
    """One adapter, one table, one story, and nothing left running or half-done."""
    job = jobs.get(shop.database, job.project_id, job.id)
    assert job.status == "succeeded", job.error
    with shop.database.read() as session:
        versions = session.scalars(select(AdapterVersion).order_by(AdapterVersion.created_at)).all()
        (table,) = session.scalars(select(File).where(File.purpose == "fine-tune-results")).all()
        seqs = session.scalars(select(JobEvent.seq).where(JobEvent.job_id == job.id)).all()
    (version,) = (v for v in versions if "ckpt" not in v.name)
    assert job.fine_tuned_model == version.name
    names = [f"{version.name}:ckpt-step-{step}" for step in (2, 4, 6)]
    assert sorted(v.name for v in versions) == [version.name, *names]
    listed = jobs.list_checkpoints(shop.database, job.project_id, job.id)
    assert [found.name for _, found in listed] == names[::-1]
    assert job.result_files == [table.id]
    adapter_folders.verify(version, shop.settings.adapters_dir)
    alias = registry.alias_of(version.name)
    assert registry.resolve(shop.database, job.project_id, alias).id == version.id
    assert len(registry.history(shop.database, job.project_id, alias)) == 1
    told = Counter(messages_of(shop, job))
    for step in range(1, 7):
        assert told[f"Step {step}/6: training loss={1 / step:.4g}"] == 1
    for step, name in zip((2, 4, 6), names, strict=True):
        assert told[f"Checkpoint created at step {step}: {name}"] == 1
    for message in ("Fine-tuning job started", "The job has successfully completed"):
        assert told[message] == 1
    assert len(seqs) == len(set(seqs))
    assert not trainers_of(shop, job)
    assert not (shop.run_of(job).path / "two-trainers-at-once").exists()
    adapter_folders.sweep(shop.database, shop.settings.adapters_dir, min_age_s=0)
    shop.files.sweep(min_age_s=0)
    folders = {path.name for path in shop.settings.adapters_dir.iterdir()}
    assert folders == {found.path for found in versions}
    for found in versions:
        adapter_folders.verify(found, shop.settings.adapters_dir)
    with shop.files.open(job.project_id, table.id) as stream:
        assert len(stream.read().splitlines()) == 7


def test_a_job_from_file_to_model(shop: Workshop, project: Project) -> None:
    job = add_job(shop, project, suffix="intents", seed=7)
    Worker(shop).run(once=True)
    check_succeeded(shop, job)
    job = jobs.get(shop.database, project.id, job.id)
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:acme:intents:")
    assert job.hyperparameters == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
    }
    assert (job.trained_tokens, job.error, job.worker_id) == (123, None, None)
    assert job.created_at <= job.started_at <= job.finished_at  # type: ignore[operator]
    assert messages_of(shop, job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
        "Job enqueued. Waiting for jobs ahead to complete. Queue number: 0.",
        "Fine-tuning job started",
        *messages_of(shop, job)[5:-3],
        f"Uploaded result files: {job.result_files[0]}",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert not any((shop.run_of(job).path / name).exists() for name in BULK["succeeded"])
    assert shop.run_of(job).metrics.exists()
    tokens = sum(
        len((row["prompt"] + row["completion"]).encode()) + 1 for row in map(json.loads, ROWS)
    )
    cost = {"value": 3 * tokens * shop.settings.prices.training / 1e6, "currency": "usd"}
    told = {"examples": len(ROWS), "tokens": tokens, "est_seconds": None, "est_cost": cost}
    assert data_of(shop, job, "Files validated, moving job to queued state") == told


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:9], "the file has 9 examples; at least 10 are needed"),
        ([*ROWS, '{"prompt": "a"}', *ROWS, '{"prompt": 1, "completion": "b"}'], ":26:"),
        (
            [json.dumps({"prompt": "p", "chosen": str(i), "rejected": "r"}) for i in range(12)],
            "kind",
        ),
        ([*ROWS, '{"prompt": "a", "completion": "b<|end|>"}'], "<|end|>"),
    ],
)
def test_unusable_files_fail_the_job(
    shop: Workshop, project: Project, rows: list[str], said: str
) -> None:
    job = add_job(shop, project, rows)
    Worker(shop).run(once=True)
    job = jobs.get(shop.database, project.id, job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert said in job.error["message"]
    assert "failed" in messages_of(shop, job)[-1]


def test_a_weight_of_prompts_needs_prompts(shop: Workshop, project: Project) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [json.dumps({"messages": chat})] * 12
    job = add_job(shop, project, rows, options={"prompt_loss_weight": 0.1})
    Worker(shop).run(once=True)
    job = jobs.get(shop.database, project.id, job.id)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert "are of the kind chat, but `prompt_loss_weight` needs" in job.error["message"]


def test_every_problem_is_in_the_event(shop: Workshop, project: Project) -> None:
    job = add_job(shop, project, [*ROWS, *['{"prompt": "a"}'] * 30])
    Worker(shop).run(once=True)
    (last, *_), _ = jobs.list_events(shop.database, project.id, job.id)
    assert last.level == "error"
    assert last.data is not None
    assert [error["line"] for error in last.data["errors"]] == list(range(13, 43))


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("told", "loss_not_finite", "The loss is nan at step 3"),
        ("traceback", "training_failed", "ZeroDivisionError: something odd"),
        ("disk", "disk_full", "is full"),
        ("no_result", "training_failed", "left no result"),
        ("base", "adapter_wrong_base", "failed a check (adapter_wrong_base)"),
    ],
)
def test_failures_tell_their_cause(
    shop: Workshop, project: Project, behave: Callable[..., None], fault: str, code: str, said: str
) -> None:
    behave(fault=fault)
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    job = jobs.get(shop.database, project.id, job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == code
    assert said in job.error["message"]
    names = [version.name for version in registry.list_versions(shop.database, project.id)]
    assert all(":ckpt-step-" in name for name in names)
    assert len(list(shop.settings.adapters_dir.glob("*"))) == len(names)
    assert not list(shop.run_of(job).checkpoints.glob("checkpoint-99"))


@pytest.mark.parametrize(("fault", "name"), [("killed_once", "KILL"), ("stopped_once", "TERM")])
def test_a_killed_trainer_goes_on_from_its_checkpoint(
    shop: Workshop, project: Project, behave: Callable[..., None], fault: str, name: str
) -> None:
    behave(fault=fault)
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    check_succeeded(shop, job)
    assert any(
        f"killed by SIG{name}" in text and "goes on from the checkpoint of step 2" in text
        for text in messages_of(shop, job)
    )


def test_a_trainer_that_always_dies_is_given_up(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(fault="killed", at=1)
    job = add_job(shop, project)
    Worker(shop).run(once=True)
    job = jobs.get(shop.database, project.id, job.id)
    assert job.error is not None
    assert job.error["code"] == "trainer_killed"
    assert "when memory runs out" in job.error["message"]
    starts = (shop.run_of(job).path / "starts").read_text().split()
    assert len(starts) == MAX_CRASHES


@pytest.mark.parametrize("fault", [None, "deaf"])
def test_cancelling_stops_the_trainer_and_keeps_checkpoints(
    shop: Workshop, project: Project, behave: Callable[..., None], fault: str | None
) -> None:
    behave(steps=10_000, fault=fault)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 4))
        assert jobs.request_cancel(shop.database, project.id, job.id).status == "cancelled"
        wait_for(lambda: not trainers_of(shop, job))
    assert shop.run_of(job).newest_checkpoint() is not None
    assert messages_of(shop, job)[-1] == "Fine-tuning job cancelled"


def test_a_failure_after_the_cancel_changes_nothing(shop: Workshop, project: Project) -> None:
    job = add_job(shop, project)
    claimed = job_lease.claim(shop.database, shop.worker_id, 60)
    assert claimed is not None
    with Lease(shop.database, job.id, shop.worker_id, 60, 20) as lease:
        jobs.request_cancel(shop.database, project.id, job.id)
        fail_job(shop, claimed, lease, ValueError("too late"))
    assert status_of(shop, job) == "cancelled"


def test_a_worker_that_lost_its_lease_stops_and_writes_nothing(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(steps=10_000)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: checkpoint_told(shop, job, 2))
        with shop.database.write() as session:
            record = session.get_one(Job, job.id)
            record.worker_id, record.lease_expires_at = "another", time.time() + 100
        told = messages_of(shop, job)
        wait_for(lambda: not trainers_of(shop, job))
        time.sleep(0.3)
        assert messages_of(shop, job) == told
        assert status_of(shop, job) == "running"


def test_a_database_that_is_away_ends_no_worker(
    shop: Workshop, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OperationalError("DELETE", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(worker.webhooks, "sweep", away)
    job = add_job(shop, project)
    with worker_thread(shop) as thread:
        wait_for(lambda: status_of(shop, job) in jobs.FINAL)
        assert thread.is_alive()
    check_succeeded(shop, job)


def test_a_database_that_is_away_for_a_moment_ends_no_job(
    shop: Workshop, project: Project, behave: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, missed = jobs.record_event, ["Fine-tuning job started", "Step 2/", "Uploaded"]

    def away(session: Any, job_id: str, message: str, **more: Any) -> None:
        for start in [*missed]:
            if message.startswith(start):
                missed.remove(start)
                raise OperationalError("INSERT", {}, Exception("database is locked"))
        tell(session, job_id, message, **more)

    monkeypatch.setattr(jobs, "record_event", away)
    monkeypatch.setattr(worker, "AFTER_ERROR_S", 0.1)
    monkeypatch.setattr(job_training, "RETRY_S", 0.1)
    behave(step_s=0.4)
    job = add_job(shop, project)
    with worker_thread(shop):
        wait_for(lambda: status_of(shop, job) in jobs.FINAL)
    assert not missed
    check_succeeded(shop, job)
    assert len((shop.run_of(job).path / "starts").read_text().split()) == 1


def test_a_sigterm_of_all_processes_leaves_the_trainer_its_grace(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(step_s=0.3, fault="slow_stop")
    job = add_job(shop, project)
    with worker_process(shop) as process:
        wait_for(lambda: checkpoint_told(shop, job, 2))
        for each in (psutil.Process(process.pid), *trainers_of(shop, job)):
            each.terminate()
        assert process.wait(10) == 0
    left = jobs.get(shop.database, project.id, job.id)
    assert (left.status, left.worker_id, left.attempts) == ("running", None, 0)
    assert (shop.run_of(job).path / "stopped-in-order").exists()
    assert len((shop.run_of(job).path / "starts").read_text().split()) == 1


def test_sigterm_gives_the_job_back(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(step_s=0.3)
    job = add_job(shop, project)
    with worker_process(shop) as process:
        wait_for(lambda: checkpoint_told(shop, job, 2))
        process.terminate()
        assert process.wait(10) == 0
    left = jobs.get(shop.database, project.id, job.id)
    assert (left.status, left.worker_id, left.attempts) == ("running", None, 0)
    assert not trainers_of(shop, job)
    Worker(shop).run(once=True)
    check_succeeded(shop, job)


@pytest.mark.parametrize("moment", fake_worker.MOMENTS)
def test_kill_9_of_the_worker_at_a_moment(shop: Workshop, project: Project, moment: str) -> None:
    job = add_job(shop, project)
    with worker_process(shop, "--once", die_at=moment) as process:
        assert process.wait(60) == -signal.SIGKILL
    wait_for(lambda: not trainers_of(shop, job), timeout_s=5)
    with shop.database.write() as session:
        record = session.get_one(Job, job.id)
        if record.worker_id is not None:
            record.lease_expires_at = 0.0
    assert finish(shop, job)
    check_succeeded(shop, job)


def finish(shop: Workshop, job: Job) -> bool:
    """Work once; False while the lease of a dead worker still runs."""
    Worker(shop).run(once=True)
    return status_of(shop, job) in jobs.FINAL


@pytest.mark.parametrize(
    "victims",
    [
        ("worker", "trainer", "launcher", "worker and leader"),
        ("leader", "worker and leader and launcher and trainer", "worker"),
    ],
    ids=["one by one", "together"],
)
def test_kill_9_of_any_process_at_random_moments(
    shop: Workshop, project: Project, behave: Callable[..., None], victims: tuple[str, ...]
) -> None:
    behave(step_s=0.4)
    job = add_job(shop, project)
    rng = random.Random(3)
    for victim in victims:
        with worker_process(shop) as process:
            wait_for(lambda: trainers_of(shop, job) or status_of(shop, job) in jobs.FINAL)
            time.sleep(rng.uniform(0, 2))
            kill(victim, process, trainers_of(shop, job))
            time.sleep(0.3)
            process.terminate()
            process.wait(10)
    behave(step_s=0.02)
    wait_for(lambda: finish(shop, job))
    check_succeeded(shop, job)


def kill(victim: str, worker: subprocess.Popen[bytes], trainers: list[psutil.Process]) -> None:
    """Kill at once: the worker, the session's leader, the launcher or the trainer itself."""
    if "worker" in victim:
        worker.kill()
    for process, name in zip(trainers, ("leader", "launcher", "trainer"), strict=False):
        if name in victim:
            process.kill()


def test_two_workers_do_every_job_once(
    shop: Workshop, project: Project, behave: Callable[..., None]
) -> None:
    behave(steps=1, step_s=0)
    made = [add_job(shop, project) for _ in range(6)]
    with worker_process(shop, "--once") as first, worker_process(shop, "--once") as second:
        assert first.wait(60) == 0
        assert second.wait(60) == 0
    assert {status_of(shop, job) for job in made} == {"succeeded"}
    for job in made:
        assert len((shop.run_of(job).path / "starts").read_text().split()) == 1
    versions = registry.list_versions(shop.database, project.id)
    assert len([v for v in versions if "ckpt" not in v.name]) == len(made)

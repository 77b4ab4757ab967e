"""Jobs: what may be asked, which state may follow which, and who gets to work on what."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from data import accounts, job_lease, jobs
from data.db import Database
from data.errors import InvalidInput, NotFound, StateConflict
from data.files import FileStore
from data.job_lease import Standing
from data.job_spec import JobSpec
from data.tables import Job, Project

LINES = b'{"prompt": "p", "completion": "c"}\n' * 12
STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def project(database: Database) -> Project:
    return accounts.create_account(database, "acme")[0]


@pytest.fixture
def file_id(database: Database, project: Project, tmp_path: Path) -> str:
    return upload(database, project, tmp_path)


def upload(database: Database, project: Project, tmp_path: Path, purpose: str = "fine-tune") -> str:
    store = FileStore(database, f"file://{tmp_path}/files")
    return store.create(project.id, [LINES], "train.jsonl", purpose).id


def create(database: Database, project: Project, file_id: str, **spec: Any) -> Job:
    return jobs.create(database, project.id, JobSpec("tiny", file_id, **spec), ["tiny"])


def put(database: Database, job: Job, **values: Any) -> None:
    with database.write() as session:
        record = session.get_one(Job, job.id)
        for name, value in values.items():
            setattr(record, name, value)


def test_a_new_job(database: Database, project: Project, file_id: str) -> None:
    job = create(database, project, file_id, metadata={"a": "b"}, suffix="mail")
    assert job.id.startswith("ftjob-")
    assert job.status == "validating_files"
    assert set(job.hyperparameters.values()) == {"auto"}
    assert 0 <= job.seed < 2**31
    events, more = jobs.list_events(database, project.id, job.id)
    assert [event.message for event in events] == [
        f"Validating training file: {file_id}",
        f"Created fine-tuning job: {job.id}",
    ]
    assert not more
    assert all(event.id.startswith("ftevent-") for event in events)


def test_the_log_tells_what_was_found_in_files_without_their_rows(
    database: Database, project: Project, file_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hone.jobs")
    job = create(database, project, file_id)
    quoted = 'line 3: "role" is "quokka"; expected a role'
    found = {"warnings": [{"code": "duplicate_row", "message": quoted}], "count": 2}
    with database.write() as session:
        held = session.get_one(Job, job.id)
        jobs.record_event(session, job.id, quoted, level="warn", data=found)
        data = {"errors": [{"message": quoted}], "counts": {"invalid_type": 7}}
        jobs.fail(session, held, "invalid_training_file", quoted, "training_file", data)
    assert "quokka" not in caplog.text
    told = [record.getMessage() for record in caplog.records if record.levelname != "INFO"]
    assert [job.id in line for line in told] == [True, True]
    assert "duplicate_row 2" in told[0]
    assert "invalid_training_file {'invalid_type': 7}" in told[1]
    assert f"Created fine-tuning job: {job.id}" in caplog.text
    events, _ = jobs.list_events(database, project.id, job.id)
    assert quoted in events[0].message


def reinforcement(**hyperparameters: Any) -> dict[str, Any]:
    section = {"grader": {"type": "string_check"}, "hyperparameters": hyperparameters}
    return {"type": "reinforcement", "reinforcement": section}


@pytest.mark.parametrize(
    ("spec", "param", "code"),
    [
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters.n_epoch", "unknown_parameter"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size", "invalid_value"),
        ({"hyperparameters": {"batch_size": "big"}}, "hyperparameters.batch_size", "invalid_type"),
        *(
            (
                {"hyperparameters": {"learning_rate_multiplier": value}},
                "hyperparameters.learning_rate_multiplier",
                "invalid_value",
            )
            for value in (0, -1.0, float("nan"), float("inf"))
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
            "method.supervised.hyperparameters.beta",
            "unknown_parameter",
        ),
        ({"method": {"type": "rlaif"}}, "method.type", "invalid_value"),
        ({"method": {"type": "ppo"}}, "method.ppo.grader", "missing_required_parameter"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}}},
            "method.dpo.hyperparameters.beta",
            "invalid_value",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"kl_coef": 0.1}}}},
            "method.dpo.hyperparameters.kl_coef",
            "unknown_parameter",
        ),
        (
            {"method": reinforcement(eval_interval=0)},
            "method.reinforcement.hyperparameters.eval_interval",
            "invalid_value",
        ),
        (
            {"method": reinforcement(eval_samples=0)},
            "method.reinforcement.hyperparameters.eval_samples",
            "invalid_value",
        ),
        (
            {"method": reinforcement(reasoning_effort="high")},
            "method.reinforcement.hyperparameters.reasoning_effort",
            "unsupported_parameter",
        ),
        (
            {"method": {"type": "dpo"}, "options": {"n_checkpoints": 2}},
            "n_checkpoints",
            "unsupported_parameter",
        ),
        (
            {"method": {"type": "supervised", "hyperparameters": {}}},
            "method.hyperparameters",
            "unknown_parameter",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"n_epochs": 1}}},
            "method.supervised.n_epochs",
            "unknown_parameter",
        ),
        ({"suffix": ""}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": {"k" * 65: ""}}, f"metadata.{'k' * 64}", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"options": {"lora": {"r": 0}}}, "lora.r", "invalid_value"),
        ({"options": {"lora": {"rank": 4}}}, "lora.rank", "unknown_parameter"),
        ({"options": {"lora": {"target_modules": []}}}, "lora.target_modules", "invalid_value"),
        ({"options": {"max_seq_len": 4}}, "max_seq_len", "unknown_parameter"),
        ({"options": {"on_long": "cut"}}, "on_long", "invalid_value"),
        ({"options": {"n_evals": 2}}, "n_evals", "invalid_value"),
        ({"options": {"early_stopping": {"patience": 2}}}, "early_stopping", "invalid_value"),
        (
            {"integrations": ({"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}},)},
            "integrations[0].wandb.tags",
            "unsupported_parameter",
        ),
    ],
)
def test_wrong_requests_name_the_field(spec: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        JobSpec("tiny", "file-1", **spec)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert "'" in caught.value.message


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'n_epochs'"):
        JobSpec("tiny", "file-1", hyperparameters={"epochs": 3})


def test_both_places_of_hyperparameters_work() -> None:
    old = JobSpec("tiny", "file-1", hyperparameters={"n_epochs": 3, "batch_size": None})
    section = {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}
    new = JobSpec("tiny", "file-1", method={"type": "supervised", "supervised": section})
    expected = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert old.resolved_hyperparameters() == new.resolved_hyperparameters() == expected


def test_reinforcement_is_evaluated_as_asked() -> None:
    method = reinforcement(eval_interval=7, eval_samples="auto", reasoning_effort="default")
    found = JobSpec("tiny", "file-1", validation_file="file-2", method=method)
    numbers = found.resolved_hyperparameters()
    assert (numbers["eval_interval"], numbers["eval_samples"]) == (7, "auto")
    assert "reasoning_effort" not in numbers


def test_files_must_be_there_and_meant_for_tuning(
    database: Database, project: Project, file_id: str, tmp_path: Path
) -> None:
    other, _ = accounts.create_account(database, "other")
    foreign = upload(database, other, tmp_path)
    for absent in ("file-absent", foreign):
        with pytest.raises(InvalidInput, match=f"No such File object: {absent}") as caught:
            create(database, project, absent)
        assert caught.value.param == "training_file"
        with pytest.raises(InvalidInput) as caught:
            create(database, project, file_id, validation_file=absent)
        assert caught.value.param == "validation_file"
    notes = upload(database, project, tmp_path, "user_data")
    with pytest.raises(InvalidInput, match="purpose 'user_data'"):
        create(database, project, notes)
    with pytest.raises(InvalidInput, match="cannot be fine-tuned here") as caught:
        jobs.create(database, project.id, JobSpec("gpt-x", file_id), ["tiny"])
    assert caught.value.param == "model"


def test_every_step_of_the_state_machine(
    database: Database, project: Project, file_id: str
) -> None:
    allowed = {
        ("validating_files", "queued"),
        ("queued", "running"),
        ("running", "paused"),
        ("paused", "queued"),
        ("running", "queued"),
        ("running", "succeeded"),
        *product(("validating_files", "queued", "running"), ("failed", "cancelled")),
        ("paused", "cancelled"),
        ("validating_files", "paused"),
        ("queued", "paused"),
    }
    job = create(database, project, file_id)
    for before, after in product(STATES, STATES):
        put(database, job, status=before, finished_at=None)
        with database.write() as session:
            record = session.get_one(Job, job.id)
            if (before, after) in allowed:
                jobs.move(session, record, after)
                assert (record.finished_at is not None) == (after in jobs.FINAL)
            else:
                with pytest.raises(StateConflict, match=f"from {before} to {after}"):
                    jobs.move(session, record, after)


def test_another_accounts_job_is_absent(database: Database, project: Project, file_id: str) -> None:
    job = create(database, project, file_id)
    other, _ = accounts.create_account(database, "other")
    for job_id in (job.id, "ftjob-absent"):
        for verb in (jobs.get, jobs.request_cancel, jobs.list_events, jobs.list_checkpoints):
            with pytest.raises(NotFound) as caught:
                verb(database, other.id, job_id)  # type: ignore[operator]
            assert caught.value.message == f"No such FineTuningJob object: {job_id}"
    assert jobs.list_jobs(database, other.id) == ([], False)
    with pytest.raises(InvalidInput):
        jobs.list_jobs(database, other.id, after=job.id)


def test_pages_of_jobs_and_events_are_exact(
    database: Database, project: Project, file_id: str
) -> None:
    made = [create(database, project, file_id, metadata={"n": str(n % 2)}).id for n in range(7)]
    seen: list[str] = []
    more = True
    while more:
        page, more = jobs.list_jobs(database, project.id, 3, seen[-1] if seen else None)
        seen += [job.id for job in page]
    assert sorted(seen) == sorted(made)
    odd, _ = jobs.list_jobs(database, project.id, metadata={"n": "1"})
    assert sorted(job.id for job in odd) == sorted(made[1::2])
    with database.write() as session:
        for number in range(10):
            jobs.record_event(session, made[0], f"event {number}")
    messages: list[str] = []
    after, more = None, True
    while more:
        events, more = jobs.list_events(database, project.id, made[0], 4, after)
        messages += [event.message for event in events]
        after = events[-1].id
    assert messages[:10] == [f"event {number}" for number in range(9, -1, -1)]
    assert len(messages) == 12
    with pytest.raises(InvalidInput, match="no event"):
        jobs.list_events(database, project.id, made[1], after=after)


def test_a_trainers_line_is_told_once(database: Database, project: Project, file_id: str) -> None:
    one, two = (create(database, project, file_id) for _ in range(2))
    for _ in range(3):
        with database.write() as session:
            for job in (one, two):
                jobs.record_event(session, job.id, "Step 1", source="step:1")
    for job in (one, two):
        events, _ = jobs.list_events(database, project.id, job.id)
        assert [event.message for event in events].count("Step 1") == 1


def test_accounts_take_turns(database: Database, tmp_path: Path) -> None:
    many, few, none = (accounts.create_account(database, name)[0] for name in ("m", "f", "n"))
    made = {project.id: project.slug for project in (many, few, none)}
    for number, project in enumerate([many, many, many, few, none, many]):
        job = create(database, project, upload(database, project, tmp_path))
        put(database, job, created_at=1000 + number)
    order = []
    while job_ := job_lease.claim(database, "worker", 60):
        order.append(made[job_.project_id])
    assert order == ["m", "f", "n", "m", "m", "m"]


def test_a_lease_keeps_others_away_until_it_ends(
    database: Database, project: Project, file_id: str
) -> None:
    job = create(database, project, file_id)
    first = job_lease.claim(database, "first", 0.3)
    assert first is not None
    assert first.id == job.id
    assert job_lease.claim(database, "second", 60) is None
    assert job_lease.heartbeat(database, job.id, "first", 0.3) is Standing.KEEP
    assert job_lease.heartbeat(database, job.id, "second", 60) is Standing.LOST
    time.sleep(0.35)
    taken = job_lease.claim(database, "second", 60)
    assert taken is not None
    assert job_lease.standing(database, job.id, "first") is Standing.LOST
    assert job_lease.heartbeat(database, job.id, "first", 60) is Standing.LOST
    with database.write() as session, pytest.raises(StateConflict, match="no longer holds"):
        job_lease.held(session, job.id, "first")
    job_lease.release(database, job.id, "first")
    assert job_lease.claim(database, "third", 60) is None
    job_lease.release(database, job.id, "second")
    assert job_lease.claim(database, "third", 60) is not None


def test_only_the_states_asked_for_are_claimed(
    database: Database, project: Project, file_id: str
) -> None:
    job = create(database, project, file_id)
    assert job_lease.claim(database, "worker", 60, ("queued", "running")) is None
    for status in STATES:
        put(database, job, status=status, worker_id=None)
        claimed = job_lease.claim(database, "worker", 60)
        assert (claimed is not None) == (status in job_lease.CLAIMABLE)


def test_cancelling(database: Database, project: Project, file_id: str) -> None:
    job = create(database, project, file_id)
    assert jobs.request_cancel(database, project.id, job.id).status == "cancelled"
    with pytest.raises(StateConflict, match="has ended"):
        jobs.request_cancel(database, project.id, job.id)
    held = create(database, project, file_id)
    assert job_lease.claim(database, "worker", 60) is not None
    assert jobs.request_cancel(database, project.id, held.id).status == "cancelled"
    assert job_lease.claim(database, "other", 60) is None
    assert job_lease.heartbeat(database, held.id, "worker", 60) is Standing.LOST


def test_queue_positions_count_the_jobs_ahead(
    database: Database, project: Project, file_id: str
) -> None:
    told = []
    for number in range(3):
        job = create(database, project, file_id)
        put(database, job, created_at=1000 + number)
        with database.write() as session:
            jobs.enqueue(session, session.get_one(Job, job.id), {"examples": 12})
        events, _ = jobs.list_events(database, project.id, job.id)
        told.append(events[0])
    assert [event.data for event in told] == [{"queue_position": n} for n in range(3)]
    assert told[2].message == ("Job enqueued. Waiting for jobs ahead to complete. Queue number: 2.")


CLAIM = """
import json, sys, time
from data import job_lease
from data.db import Database
database = Database(sys.argv[1])
sys.stdin.readline()
claimed = []
while job := job_lease.claim(database, sys.argv[2], 60):
    claimed.append(job.id)
print(json.dumps(claimed))
"""


def test_processes_never_claim_the_same_job(
    database: Database, project: Project, file_id: str
) -> None:
    made = [create(database, project, file_id).id for _ in range(60)]
    url = database.url.render_as_string()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, url, f"worker {number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    time.sleep(1)  # all are ready, and start together
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    claimed = [json.loads(worker.communicate()[0]) for worker in workers]
    assert Counter(job_id for ids in claimed for job_id in ids) == Counter(made)

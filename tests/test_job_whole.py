"""One job with everything real: server, worker, trainer, client, on a tiny base. Slow: a minute."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, tiny_settings
from working_server import working

pytestmark = pytest.mark.slow

ROWS = b"".join(
    json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}).encode() + b"\n"
    for i in range(64)
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with working(tiny_settings(tmp_path, threads=1)) as found:
        yield found


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_checkpoints_pause_resume_and_losses(server: Server) -> None:
    client = server.client()
    jobs = client.fine_tuning.jobs
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = jobs.create(
        model=MODEL,
        training_file=file.id,
        validation_file=file.id,
        hyperparameters={"n_epochs": 50, "batch_size": 4},
        suffix="whole",
        extra_body={"n_checkpoints": 100, "n_evals": 10},
    )
    made = wait_for(lambda: jobs.checkpoints.list(job.id).data)[0]
    answer = client.completions.create(
        model=made.fine_tuned_model_checkpoint, prompt="1 + 1 =", max_tokens=4, temperature=0
    )
    assert answer.model == made.fine_tuned_model_checkpoint
    running_job = jobs.retrieve(job.id)
    assert running_job.status == "running"  # the checkpoint answered while the job ran
    wait_for(lambda: jobs.retrieve(job.id).estimated_finish)

    assert jobs.pause(job.id).status == "paused"
    told = wait_for(lambda: settled(server, job.id), timeout_s=10)
    assert told
    step = jobs.checkpoints.list(job.id).data[0].step_number
    jobs.resume(job.id)
    done = wait_for(lambda: ended(client, job.id))
    assert done.status == "succeeded", done.error
    messages = [event.message for event in jobs.list_events(job.id, limit=100)]
    assert f"Training goes on from the checkpoint of step {step}." in messages
    found = jobs.checkpoints.list(job.id).data
    assert [c.fine_tuned_model_checkpoint for c in found] == [
        f"{done.fine_tuned_model}:ckpt-step-{c.step_number}" for c in found
    ]
    assert len(found) == 3
    assert found[0].step_number == 800
    assert found[0].metrics.full_valid_loss == found[0].metrics.valid_loss is not None
    with server.http() as http:
        losses = http.get(f"/v1/fine_tuning/jobs/{job.id}/examples?limit=1000").json()["data"]
        assert sorted(row["line"] for row in losses) == list(range(1, 65))
        assert losses == sorted(losses, key=lambda row: (-row["loss"], row["line"]))
        body = {"model": MODEL, "training_file": file.id, "dry_run": True}
        estimate = http.post("/v1/fine_tuning/jobs", json=body).json()
        assert estimate["speed_from"] == "jobs"

    continued = jobs.create(
        model=found[0].fine_tuned_model_checkpoint,
        training_file=file.id,
        hyperparameters={"n_epochs": 1, "learning_rate_multiplier": 1e-9},
    )
    done_again = wait_for(lambda: ended(client, continued.id))
    assert done_again.status == "succeeded", done_again.error
    same = [
        client.completions.create(model=name, prompt="7 + 1 =", max_tokens=4, temperature=0)
        for name in (done.fine_tuned_model, done_again.fine_tuned_model)
    ]
    assert same[0].choices[0].text == same[1].choices[0].text


def settled(server: Server, job_id: str) -> bool:
    from data.tables import Job

    with server.runtime.database.read() as session:
        return session.get_one(Job, job_id).worker_id is None


def ended(client: openai.OpenAI, job_id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None

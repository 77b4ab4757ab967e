"""litellm, unchanged: it reads our wording into the right exceptions, and our jobs strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api_server import MODEL, Server, tiny_settings
from client_env import SCRIPTS, python_env, run_client
from test_job_whole import ROWS, wait_for
from working_server import bad_keys, working

pytestmark = pytest.mark.slow


def finished_job(server: Server) -> str:
    client = server.client()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        hyperparameters={"n_epochs": 1, "batch_size": 16},
        suffix="whole",
    )
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at)
    return job.id


def test_completions_errors_and_jobs(tmp_path: Path) -> None:
    python = python_env("litellm", "litellm==1.106.2")
    with working(tiny_settings(tmp_path, threads=1)) as server:
        given = {"url": f"{server.url}/v1", "key": server.key, "model": MODEL}
        given |= {"keys": bad_keys(server), "job": finished_job(server)}
        told = run_client([python, SCRIPTS / "litellm_flow.py", json.dumps(given)])
    assert told["errors"] == {
        "key": "AuthenticationError",
        "suspended": "APIError",  # what litellm makes of every 403
        "model": "NotFoundError",
        "too long": "ContextWindowExceededError",
        "text too long": "ContextWindowExceededError",
        "value": "BadRequestError",
        "429 in the words": "ContextWindowExceededError",
        "rate": "RateLimitError",
    }
    assert told["fine_tuning"]["class"] == "LiteLLMFineTuningJob"
    assert told["fine_tuning"]["status"] == "succeeded"
    assert told["fine_tuning"]["model"].startswith(f"ft:{MODEL}:acme:whole:")

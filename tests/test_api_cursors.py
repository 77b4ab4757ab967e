"""A cursor that names nothing is an error on every list, never an empty page."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from fake_trainer import write_adapter

from data import accounts, registry
from data.tables import Job

ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n" for i in range(12)
)
OPERATORS = ("/v1/organization/", "/v1/fine_tuning/checkpoints/")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("cursors"))) as found:
        yield found


@pytest.fixture(scope="module")
def operator(server: Server) -> httpx.Client:
    return server.http(accounts.create_admin_key(server.runtime.database)[1])


def paged(server: Server) -> list[str]:
    """Return the paths of all routes that take `after`, as the server describes itself."""
    paths = server.http().get("/openapi.json").json()["paths"]
    return [
        path
        for path, methods in paths.items()
        if any(field["name"] == "after" for field in methods.get("get", {}).get("parameters", ()))
    ]


@pytest.fixture(scope="module")
def objects(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an object of the account for every name in a path."""
    client, http = server.client(), server.http()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    lines = [json.dumps({"line": 1, "loss": 0.5, "tokens": 3}).encode()]
    losses = server.runtime.files.create(
        server.project.id, lines, "example_losses.jsonl", "fine-tune-results"
    )
    with server.runtime.database.write() as session:
        done = session.get_one(Job, job.id)
        done.status, done.result_files = "succeeded", [file.id, losses.id]
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    write_adapter(folder, fingerprint=server.runtime.models.base_fingerprint)
    version = registry.publish(
        server.runtime.database,
        server.runtime.settings.adapters_dir,
        server.project,
        folder,
        base_model=MODEL,
        base_fingerprint=server.runtime.models.base_fingerprint,
    )
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=1, store=True
    )
    body = {"name": "w", "url": "https://example.com/w", "event_types": ["batch.completed"]}
    hook = http.post("/v1/webhook_endpoints", json=body).json()
    return {
        "project_id": server.project.id,
        "job_id": job.id,
        "model": version.name,
        "completion_id": chat.id,
        "endpoint_id": hook["id"],
    }


def test_every_list_tells_of_a_cursor_that_names_nothing(
    server: Server, operator: httpx.Client, objects: dict[str, str]
) -> None:
    found = paged(server)
    for path in ("files", "fine_tuning/jobs", "fine_tuning/jobs/{job_id}/events", "batches"):
        assert f"/v1/{path}" in found
    assert "/v1/fine_tuning/jobs/{job_id}/checkpoints" in found
    http = server.http()
    for path in found:
        caller = operator if path.startswith(OPERATORS) else http
        filled = path.format(**objects)
        for cursor in ("absent", "", "x" * 300, "file-\u00e9'; --"):
            answer = caller.get(filled, params={"after": cursor})
            assert answer.status_code == 400, (path, cursor, answer.text)
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", "after"), path
            assert error["message"].startswith("Invalid 'after'"), path


def test_a_cursor_of_another_account_names_nothing(server: Server) -> None:
    _, key = server.new_account("curious")
    client = server.client()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    for path, cursor in (("files", file.id), ("fine_tuning/jobs", job.id)):
        assert server.http().get(f"/v1/{path}?after={cursor}").status_code == 200
        answer = server.http(key).get(f"/v1/{path}?after={cursor}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "after"


def test_events_of_a_fine_tune_go_on_after_one(server: Server) -> None:
    client, http = server.client(), server.http()
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = http.post("/v1/fine-tunes", json={"training_file": file.id}).json()
    newest, oldest = client.fine_tuning.jobs.list_events(job["id"]).data
    rest = http.get(f"/v1/fine-tunes/{job['id']}/events?after={oldest.id}").json()["data"]
    assert [event["message"] for event in rest] == [newest.message]


def test_what_has_no_pages_takes_no_cursor(server: Server) -> None:
    answer = server.http().get("/v1/comparisons/next?label_project_id=lproj-x&after=x")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "after"

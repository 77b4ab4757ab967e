"""A cursor that names nothing is an error on every list, never an empty page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from fake_trainer import write_adapter

from data import accounts, permissions, projects, registry
from data.tables import Job, Project

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


def fill(server: Server, project: Project, key: str, folder: Path) -> dict[str, str]:
    """Give an account something for its lists; returns an object for every name in a path."""
    client, http, database = server.client(key), server.http(key), server.runtime.database
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    lines = [json.dumps({"line": 1, "loss": 0.5, "tokens": 3}).encode()]
    losses = server.runtime.files.create(
        project.id, lines, "example_losses.jsonl", "fine-tune-results"
    )
    with database.write() as session:
        done = session.get_one(Job, job.id)
        done.status, done.result_files = "succeeded", [file.id, losses.id]
    write_adapter(folder, fingerprint=server.runtime.models.base_fingerprint)
    version = registry.publish(
        database,
        server.runtime.settings.adapters_dir,
        project,
        folder,
        base_model=MODEL,
        base_fingerprint=server.runtime.models.base_fingerprint,
    )
    permissions.grant(database, project.id, version.name, [server.new_account(folder.name)[0].id])
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=1, store=True
    )
    body = {"name": "w", "url": "https://example.com/w", "event_types": ["batch.completed"]}
    hook = http.post("/v1/webhook_endpoints", json=body).json()
    requests = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    client.batches.create(
        input_file_id=requests.id, endpoint="/v1/completions", completion_window="24h"
    )
    projects.create_service_account(database, project.id, "program", with_key=False)
    return {
        "project_id": project.id,
        "job_id": job.id,
        "model": version.name,
        "completion_id": chat.id,
        "endpoint_id": hook["id"],
    }


@pytest.fixture(scope="module")
def objects(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    return fill(server, server.project, server.key, folder)


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


def test_a_cursor_of_another_account_names_nothing(
    server: Server, operator: httpx.Client, objects: dict[str, str], tmp_path: Path
) -> None:
    """It is answered as one that is nowhere, on every list of an account."""
    project, key = server.new_account("curious")
    own = fill(server, project, key, tmp_path / "theirs")
    tried = set()
    for path in paged(server):
        if path.startswith(OPERATORS[0]) and "{project_id}" not in path:
            continue  # of all accounts together
        asks = (
            (operator, operator)
            if path.startswith(OPERATORS)
            else (server.http(), server.http(key))
        )
        theirs, mine = (
            [entry.get("id") for entry in ask.get(path.format(**names)).json()["data"]]
            for ask, names in zip(asks, (objects, own), strict=True)
        )
        if not theirs or theirs[0] in mine:  # the number of a line, or the name of a limit
            continue
        tried.add(path.removeprefix("/v1/"))
        foreign, absent = (
            asks[1].get(path.format(**own), params={"after": cursor})
            for cursor in (theirs[0], "absent")
        )
        assert foreign.status_code == 400, path
        assert foreign.text.replace(theirs[0], "absent") == absent.text, path
    assert tried >= {
        *("api_keys", "files", "batches", "fine_tuning/jobs", "webhook_endpoints"),
        *("chat/completions", "fine_tuning/jobs/{job_id}/events"),
        *("organization/projects/{project_id}/service_accounts",),
        *("organization/projects/{project_id}/api_keys",),
        *("fine_tuning/checkpoints/{model}/permissions",),
    }


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

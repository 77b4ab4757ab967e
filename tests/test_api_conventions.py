"""What holds on every route: keys, headers, the error envelope, and no hint of others' objects."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy.exc import DataError as DatabaseRefusal
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from data import accounts
from serve.api.middleware import RequestContext


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("conventions"), max_upload_mb=1)) as found:
        yield found


def check_envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"]
    return error


def routes(server: Server) -> list[tuple[str, str]]:
    """Every method and path of the application, ids filled in."""
    schema = server.http().get("/openapi.json").json()
    found = []
    for path, methods in schema["paths"].items():
        for name in ("model", "file_id", "job_id"):
            path = path.replace("{" + name + "}", "absent")
        found += [(method.upper(), path) for method in methods]
    assert len(found) > 12
    return found


def test_no_route_without_a_key(server: Server) -> None:
    for method, path in [*routes(server), ("GET", "/nowhere")]:
        if path == "/health" or (method, path) == ("POST", "/v1/access_requests"):
            continue
        for headers in ({}, {"authorization": "Basic abc"}, {"authorization": "Bearer"}):
            error = check_envelope(httpx.request(method, server.url + path, headers=headers), 401)
            assert error["type"] == "invalid_request_error"
            assert error["code"] is None
            assert "API key" in error["message"]


def test_wrong_key(server: Server) -> None:
    key = "sk-abcdefghijklmnopqrstuvwxyz"
    error = check_envelope(server.http(key).get("/v1/models"), 401)
    assert error == {
        "message": "Incorrect API key provided: sk-ab***yz.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_revoked_key(server: Server) -> None:
    project, key = server.new_account("leaver")
    with server.http(key) as client:
        assert client.get("/v1/models").status_code == 200
        (record,) = accounts.list_keys(server.runtime.database, project.id)
        accounts.revoke_key(server.runtime.database, record.id)
        assert check_envelope(client.get("/v1/models"), 401)["code"] == "invalid_api_key"


def test_admin_key_does_not_run_models_and_alone_reads_metrics(server: Server) -> None:
    _, admin = accounts.create_admin_key(server.runtime.database, "operator")
    error = check_envelope(server.http(admin).get("/v1/models"), 403)
    assert (error["type"], error["code"]) == ("permission_error", "insufficient_permissions")
    check_envelope(server.http().get("/metrics"), 403)
    assert server.http().get("/v1/models").status_code == 200
    text = server.http(admin).get("/metrics").text
    assert 'hone_requests_total{route="/v1/models",status="200"}' in text


def test_organization_and_project_headers(server: Server) -> None:
    with server.http() as client:
        own = {"openai-project": server.project.id, "openai-organization": "org-hone"}
        assert client.get("/v1/models", headers=own).status_code == 200
        for name in own:
            check_envelope(client.get("/v1/models", headers={name: "other"}), 403)


def test_health_is_open_and_means_that_the_model_answers(server: Server) -> None:
    response = httpx.get(f"{server.url}/health")
    assert response.json() == {"status": "ok", "model": MODEL}
    server.runtime.generator.last_answer_s = float("-inf")
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.runtime.generator.last_answer_s > 0


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/nothing", "/v2/models", "/v1/models/../x"]
)
def test_unknown_routes(server: Server, path: str) -> None:
    assert check_envelope(server.http().get(path), 404)["code"] is not None


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_wrong_methods(server: Server, method: str) -> None:
    response = server.http().request(method, "/v1/completions")
    assert check_envelope(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"model": "\xff"}',
        b"\x00\x01",
        b"[" * 100_000,
        b'{"model": 1e999, "prompt": "x"}',
        b'{"model": "tiny-base", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny-base", "prompt": "x", "temperature": ' + b"9" * 400 + b"}",
        b'{"model": "tiny-base", "prompt": "\\ud800"}',
        b'{"model": "tiny-base", "\\ud800": 1}',
        b'{"model": "\\ud800"}',
        b'{"model": "tiny-base", "prompt": [' + b"9" * 400 + b"]}",
        b'{"model": "tiny-base", "stop": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/fine_tuning/jobs"]
)
def test_malformed_bodies(server: Server, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = server.http().post(path, content=body, headers=headers)
    assert response.status_code in (400, 404), response.text
    check_envelope(response, response.status_code)


def test_json_without_its_content_type(server: Server) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    assert server.http().post("/v1/completions", content=body).status_code == 200
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = server.http().post("/v1/completions", content=body, headers=headers)
    assert "Content-Type: application/json" in check_envelope(response, 400)["message"]


def test_a_body_that_is_too_large(server: Server) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'

    def endless() -> Iterator[bytes]:
        yield head
        for _ in range(4):
            yield b"x" * (1 << 20)

    with server.http() as client:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        for content in (head + b"x" * (4 << 20), endless()):
            response = client.post("/v1/files", content=content, headers=kind)
            assert check_envelope(response, 413)["code"] == "file_too_large"


def test_a_bug_is_a_500_that_tells_nothing_but_its_id(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(server.runtime.models, "resolve", fail)
    response = server.http().post("/v1/completions", json={"model": MODEL, "prompt": "x"})
    error = check_envelope(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("select 1", {}, Exception("no connection")), 503),
        (PoolTimeout("all connections are taken"), 503),
        (DatabaseRefusal("insert", {}, Exception("out of range")), 400),
    ],
)
@pytest.mark.parametrize("where", ["a route", "the look at the key"])
def test_errors_of_the_database(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if where == "a route":
        monkeypatch.setattr(server.runtime.files, "list", fail)
    else:
        monkeypatch.setattr(accounts, "authenticate", fail)
    answer = server.http().get("/v1/files")
    told = check_envelope(answer, status)
    assert (told["code"], answer.headers.get("retry-after")) == (
        ("overloaded", "5") if status == 503 else ("invalid_value", None)
    )
    assert "select" not in answer.text


def test_nul_is_refused_in_names_and_taken_in_texts(server: Server) -> None:
    http = server.http()
    asked = {"name": "a", "email": "a@b.c", "organization": "d", "use_case": "e\0"}
    endpoint = {"name": "a", "url": "https://a.example", "event_types": ["x", "y\0"]}
    job = {"model": MODEL, "training_file": "f", "metadata": {"k": "\0"}}
    method = {"type": "dpo", "dpo": {"hyperparameters": {"a\0": 1}}}
    for path, body, param in (
        ("api_keys", {"name": "a\0b"}, "name"),
        ("access_requests", asked, "use_case"),
        ("webhook_endpoints", endpoint, "event_types[1]"),
        ("fine_tuning/jobs", job, "metadata.k"),
        ("fine_tuning/jobs", {**job, "metadata": {"k\0": ""}}, "metadata.k\\0"),
        ("fine_tuning/jobs", {**job, "metadata": {}, "method": method}, "method.dpo.hyperparamet"),
        ("safety/cases/case_1/appeal", {"message": "\0"}, "message"),
    ):
        told = check_envelope(http.post(f"/v1/{path}", json=body), 400)
        assert told["param"] is not None, path
        assert told["param"].startswith(param), path
        assert "NUL" in told["message"]
    body = {"model": MODEL, "prompt": "a\0b", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_numbers_that_no_column_holds(server: Server) -> None:
    _, admin = accounts.create_admin_key(server.runtime.database)
    caps = f"/v1/organization/projects/{server.project.id}/caps"
    policy = f"/v1/organization/projects/{server.project.id}/content_policy"
    http = server.http(admin)
    for number in (2**31, 2**63):
        for path, name in ((caps, "max_concurrent_jobs"), (policy, "case_after")):
            told = check_envelope(http.post(path, json={name: number}), 400)
            assert told["param"] == name


def test_a_request_cut_short_by_the_end_of_the_server() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        await asyncio.sleep(60)

    async def work() -> None:
        app = RequestContext(never, lambda *_: None)
        scope = {"type": "http", "method": "GET", "path": "/v1/files\nforged"}
        task = asyncio.create_task(app(scope, never, send))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert [message.get("status") for message in sent] == [503, None]
    assert json.loads(sent[1]["body"])["error"]["code"] == "server_stopping"


def test_prompts_and_keys_stay_out_of_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="hone")
    body = {"model": MODEL, "prompt": "my-secret-prompt", "max_tokens": 1}
    response = server.http().post("/v1/completions", json=body)
    deadline = time.monotonic() + 10  # the line is written after the response has gone
    while response.headers["x-request-id"] not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert response.headers["x-request-id"] in caplog.text
    assert "my-secret-prompt" not in caplog.text
    assert server.key not in caplog.text

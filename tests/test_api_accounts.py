"""The account side through the official admin client: accounts, keys, suspension, audit, access."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError
from tiny_models import random_adapter, tiny_model

from data import accounts, registry, safety
from data.errors import RateLimited
from serve.throttle import Throttle

ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": f" a {i}"}).encode() + b"\n" for i in range(12)
)
ASKED = {
    "name": "Ann",
    "email": "ann@example.org",
    "organization": "Example Ltd.",
    "use_case": "Sort the mail.",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("accounts"))) as found:
        yield found


@pytest.fixture(scope="module")
def admin_key(server: Server) -> str:
    return accounts.create_admin_key(server.runtime.database, "operator")[1]


@pytest.fixture
def admin(server: Server, admin_key: str) -> Any:
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="", admin_api_key=admin_key, max_retries=0
    )
    return server.clients.enter_context(client).admin.organization


@pytest.fixture
def http(server: Server, admin_key: str) -> httpx.Client:
    return server.http(admin_key)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**({"model": MODEL, "prompt": "x", "max_tokens": 2} | fields))


# ---- accounts and keys ----


def test_an_account_from_first_to_last(server: Server, admin: Any) -> None:
    project = admin.projects.create(name="Blue Sky")
    assert (project.object, project.status) == ("organization.project", "active")
    made = admin.projects.service_accounts.create(project.id, name="backend")
    client = server.client(made.api_key.value)
    assert ask(client).usage.completion_tokens > 0
    [shown] = admin.projects.api_keys.list(project.id)
    assert shown.id == made.api_key.id
    assert made.api_key.value not in shown.model_dump_json()
    assert shown.redacted_value.startswith("sk-")
    assert shown.last_used_at is not None
    assert admin.projects.update(project.id, name="Blue").name == "Blue"
    assert admin.projects.retrieve(project.id).name == "Blue"
    assert project.id in [p.id for p in admin.projects.list(limit=1)]
    assert admin.projects.archive(project.id).status == "archived"
    with pytest.raises(openai.PermissionDeniedError):
        ask(client)
    assert project.id not in [p.id for p in admin.projects.list()]
    assert project.id in [p.id for p in admin.projects.list(include_archived=True)]


def test_a_key_stops_at_once(server: Server, admin: Any) -> None:
    project = admin.projects.create(name="keys")
    one = admin.projects.service_accounts.create(project.id, name="one")
    two = admin.projects.service_accounts.create(project.id, name="two")
    first, second = (server.client(made.api_key.value) for made in (one, two))
    assert admin.projects.api_keys.delete(one.api_key.id, project_id=project.id).deleted
    with pytest.raises(openai.AuthenticationError):
        ask(first)
    ask(second)
    admin.projects.service_accounts.delete(two.id, project_id=project.id)
    with pytest.raises(openai.AuthenticationError):
        ask(second)
    assert list(admin.projects.service_accounts.list(project.id)) == [
        admin.projects.service_accounts.retrieve(one.id, project_id=project.id)
    ]
    short = admin.projects.service_accounts.create(project.id, name="s", expires_in_seconds=1)
    assert short.api_key.expires_at is not None
    time.sleep(2.1)
    with pytest.raises(openai.AuthenticationError):
        ask(server.client(short.api_key.value))


def test_operators_keys(server: Server, admin: Any) -> None:
    made = admin.admin_api_keys.create(name="second")
    other = server.http(made.value)
    assert other.get("/v1/organization/projects").status_code == 200
    assert made.id in [key.id for key in admin.admin_api_keys.list()]
    assert admin.admin_api_keys.retrieve(made.id).name == "second"
    assert admin.admin_api_keys.delete(made.id).deleted
    assert other.get("/v1/organization/projects").status_code == 401


def test_each_kind_of_key_has_its_own_routes(server: Server, http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x"}
    assert http.post("/v1/completions", json=body).status_code == 403
    paths = server.http().get("/openapi.json").json()["paths"]
    tried = 0
    for path, methods in paths.items():
        if path.startswith("/v1/organization"):
            for method in methods:
                answer = server.http().request(method.upper(), path, json={})
                assert answer.status_code in (400, 403), (method, path)
                if answer.status_code == 403:
                    assert answer.json()["error"]["code"] == "insufficient_permissions"
                tried += 1
    assert tried > 20


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "name"), ({"name": ""}, "name"), ({"name": "acme"}, "name"), ({"nam": "x"}, "nam")],
)
def test_refused_accounts(http: httpx.Client, body: dict[str, str], param: str) -> None:
    answer = http.post("/v1/organization/projects", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


# ---- which models ----


def test_a_model_that_is_not_permitted_is_as_absent(server: Server, admin: Any) -> None:
    project, key = server.new_account("limited")
    client = server.client(key)
    permissions = admin.projects.model_permissions
    permissions.update(project.id, mode="deny_list", model_ids=[MODEL])
    assert permissions.retrieve(project.id).mode == "deny_list"
    told = []
    for name in (MODEL, "absent"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, model=name)
        told.append(caught.value.message.replace(name, "X"))
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    assert told[0] == told[1]
    assert list(client.models.list()) == []
    file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    with pytest.raises(openai.APIStatusError):
        client.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    permissions.update(project.id, mode="allow_list", model_ids=[MODEL])
    ask(client)
    assert permissions.delete(project.id).deleted
    ask(client)


# ---- suspension ----


def publish(server: Server, folder: Path, project: Any) -> str:
    random_adapter(tiny_model("llama"), folder, seed=len(project.name))
    fingerprint = server.runtime.models.base_fingerprint
    (folder / "hone.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    place = server.runtime.settings.adapters_dir
    version = registry.publish(server.runtime.database, place, project, folder, MODEL, fingerprint)
    return version.name


@pytest.mark.parametrize("by", ["api", "command line"])
def test_a_suspended_account_is_cut_off_and_comes_back(
    server: Server, http: httpx.Client, tmp_path: Path, by: str
) -> None:
    project, key = server.new_account(f"harmful {by}")
    client = server.client(key)
    model = publish(server, tmp_path / "a", project)
    ask(client, model=model)
    file_id = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    stream = client.completions.create(
        model=model,
        prompt="x",
        max_tokens=400,
        n=100,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    began = time.monotonic()
    if by == "api":
        path = f"/v1/organization/projects/{project.id}/suspend"
        case = http.post(path, json={"reason": "Spam."}).json()["id"]
    else:
        case = safety.suspend(server.runtime.database, project.id, "Spam.").id
    with pytest.raises(openai.APIError) as cut:
        for _ in stream:
            pass
    assert time.monotonic() - began < 5
    assert case in str(cut.value)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(client)
    assert caught.value.code == "account_suspended"
    assert case in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    deadline = began + 5
    while states_of(server, project.id) != {"disk"} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states_of(server, project.id) == {"disk"}
    own = server.http(key).get(f"/v1/safety/cases/{case}").json()
    assert (own["object"], own["reason"]) == ("safety.case", "Spam.")
    assert own["notice"] == {"type": "deactivation"}
    assert own["paused_jobs"] == [job.id]
    assert server.http().get(f"/v1/safety/cases/{case}").status_code == 404
    answer = http.post(f"/v1/organization/projects/{project.id}/reinstate")
    assert answer.json()["status"] == "active"
    assert ask(client, model=model).choices
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"


def states_of(server: Server, project_id: str) -> set[str]:
    return {s.tier for s in server.runtime.engine.adapters() if s.owner == project_id}


def test_others_go_on(server: Server, http: httpx.Client) -> None:
    project, _ = server.new_account("loud")
    failures: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        client = server.client()
        while not done.is_set():
            try:
                ask(client)
            except openai.OpenAIError as error:
                failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    path = f"/v1/organization/projects/{project.id}"
    for _ in range(3):
        assert http.post(f"{path}/suspend", json={"reason": "x"}).status_code == 200
        assert http.post(f"{path}/reinstate").status_code == 200
    done.set()
    thread.join()
    assert not failures


def test_a_warning_changes_nothing(server: Server, http: httpx.Client) -> None:
    project, key = server.new_account("careless")
    path = f"/v1/organization/projects/{project.id}"
    case = http.post(f"{path}/warn", json={"reason": "Mind the rules."}).json()
    assert case["notice"] == {"type": "warning"}
    ask(server.client(key))
    again = http.post(f"{path}/reinstate")
    assert again.json()["error"]["code"] == "invalid_state"
    assert http.post(f"{path}/suspend", json={"reason": " "}).json()["error"]["param"] == "reason"


# ---- the audit log ----


def test_what_was_changed_by_whom(server: Server, admin: Any, admin_key: str) -> None:
    project = admin.projects.create(name="audited")
    admin.projects.update(project.id, name="audited twice")
    admin.projects.service_accounts.create(project.id, name="p")
    entries = list(admin.audit_logs.list(project_ids=[project.id], limit=2))
    assert [entry.type for entry in entries] == [
        "api_key.created",
        "service_account.created",
        "project.updated",
        "project.created",
    ]
    keys = accounts.list_keys(server.runtime.database, None)
    [mine] = [key for key in keys if key.redacted == accounts.redact(admin_key)]
    for entry in entries:
        assert entry.actor.api_key.id == mine.id
        assert entry.project.id == project.id
        assert entry.actor.address == "127.0.0.1"
        assert entry.actor.request_id.startswith("req_")
    only = admin.audit_logs.list(project_ids=[project.id], event_types=["project.updated"])
    assert [entry.type for entry in only] == ["project.updated"]
    later = admin.audit_logs.list(effective_at={"gt": entries[0].effective_at + 60})
    assert list(later) == []


def test_what_an_account_does_is_told_too(server: Server, admin: Any) -> None:
    project, key = server.new_account("busy")
    client = server.client(key)
    rows = b'{"prompt": "a", "completion": "b"}\n' * 12
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    client.files.delete(file.id)
    kinds = ["file.created", "job.created", "job.paused", "job.resumed", "job.cancelled"]
    kinds.append("file.deleted")
    entries = admin.audit_logs.list(project_ids=[project.id], event_types=kinds, limit=50)
    assert [entry.type for entry in entries][::-1] == kinds


def test_the_audit_log_cannot_be_changed(server: Server) -> None:
    database = server.runtime.database
    for statement in (
        "update audit_log set type = 'x'",
        "delete from audit_log",
        "insert or replace into audit_log select * from audit_log limit 1",
    ):
        with (
            pytest.raises(DatabaseError, match="append-only"),
            database.write() as session,
        ):
            session.execute(text(statement))


def test_wrong_filters(http: httpx.Client) -> None:
    for query in ("event_typ=x", "effective_at[gt]=soon", "after=audit_log-x"):
        assert http.get(f"/v1/organization/audit_logs?{query}").status_code == 400


# ---- asking for access ----


def test_from_a_request_to_an_account(server: Server, http: httpx.Client) -> None:
    made = httpx.post(f"{server.url}/v1/access_requests", json=ASKED).json()
    assert made["status"] == "pending"
    listed = http.get("/v1/organization/access_requests?status=pending").json()["data"]
    assert [request["email"] for request in listed] == ["ann@example.org"]
    path = f"/v1/organization/access_requests/{made['id']}"
    assert http.post(f"{path}/waitlist", json={"note": "later"}).json()["status"] == "waitlisted"
    base = server.runtime.models.base_model
    spend = {"threshold_amount": 500, "currency": "USD", "interval": "month"}
    wrong = {"rate_limits": {"max_requests_per_1_minute": -1}}
    assert http.post(f"{path}/approve", json=wrong).status_code == 400
    terms = {
        "rate_limits": {"max_requests_per_1_minute": 2},
        "spend_limit": spend,
        "models": [base],
    }
    approved = http.post(f"{path}/approve", json=terms).json()
    assert (approved["status"], approved["account"]) == ("approved", "example-ltd")
    account = f"/v1/organization/projects/{approved['project_id']}"
    rate = http.get(f"{account}/rate_limits").json()["data"][0]
    assert (rate["model"], rate["max_requests_per_1_minute"]) == (base, 2)
    assert http.get(f"{account}/spend_limit").json()["threshold_amount"] == 500
    permitted = http.get(f"{account}/model_permissions").json()
    assert (permitted["mode"], permitted["model_ids"]) == ("allow_list", [base])
    client = server.client(approved["api_key"])
    for _ in range(2):
        ask(client)
    with pytest.raises(openai.RateLimitError):  # the limit holds from the first request on
        ask(client)
    assert http.post(f"{path}/deny").json()["error"]["code"] == "invalid_state"
    assert http.post(f"{quote(path)}x/deny").status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"email": "nobody"}, "email"),
        ({"use_case": " "}, "use_case"),
        ({"name": 101 * "x"}, "name"),
    ],
)
def test_refused_requests(
    server: Server, change: dict[str, str], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.runtime, "access_throttle", Throttle())
    answer = httpx.post(f"{server.url}/v1/access_requests", json=ASKED | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_strangers_may_ask_so_often(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.runtime, "access_throttle", Throttle(per_address=2))
    answers = [httpx.post(f"{server.url}/v1/access_requests", json=ASKED) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 3600
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")


def test_the_throttle_counts_the_last_hour() -> None:
    throttle = Throttle(per_address=2, in_all=3)
    throttle.admit("a", 0)
    throttle.admit("a", 10)
    with pytest.raises(RateLimited) as caught:
        throttle.admit("a", 100)
    assert caught.value.retry_after_s == 3500
    throttle.admit("b", 100)
    with pytest.raises(RateLimited):
        throttle.admit("c", 101)
    throttle.admit("a", 3600.5)


def test_a_suspended_account_appeals_and_reads_the_answer(server: Server) -> None:
    project, key = server.new_account("appealing")
    database = server.runtime.database
    case = safety.suspend(database, project.id, "Spam.").id
    path, http = f"/v1/safety/cases/{case}", server.http(key)
    assert http.get(path).json()["appeal"] is None
    for message in ("", "x" * 4001):
        refused = http.post(f"{path}/appeal", json={"message": message})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "message"
    made = http.post(f"{path}/appeal", json={"message": " It was a test. "}).json()
    assert made["appeal"]["message"] == "It was a test."
    assert made["appeal"]["answer"] is None
    again = http.post(f"{path}/appeal", json={"message": "Hello?"})
    assert again.status_code == 400
    assert "waits for its answer" in again.json()["error"]["message"]
    assert server.http().post(f"{path}/appeal", json={"message": "x"}).status_code == 404
    _, admin_key = accounts.create_admin_key(database)
    admin = server.http(admin_key)
    waiting = admin.get("/v1/organization/safety_cases", params={"waiting": "true"}).json()
    assert case in [entry["id"] for entry in waiting["data"]]
    cases = "/v1/organization/safety_cases"
    every = [entry["id"] for entry in admin.get(cases, params={"limit": 100}).json()["data"]]
    assert len(every) > 1
    page = admin.get(cases, params={"limit": 1}).json()
    assert ([entry["id"] for entry in page["data"]], page["has_more"]) == (every[:1], True)
    rest = admin.get(cases, params={"after": every[0]}).json()
    assert [entry["id"] for entry in rest["data"]] == every[1:]
    answer = f"/v1/organization/safety_cases/{case}/answer"
    assert http.post(answer, json={"message": "x"}).status_code == 403
    told = admin.post(answer, json={"message": "You may go on."}).json()
    assert told["appeal"]["answer"] == "You may go on."
    assert admin.post(answer, json={"message": "x"}).status_code == 400
    waiting = admin.get(cases, params={"waiting": "true"}).json()
    assert case not in [entry["id"] for entry in waiting["data"]]
    assert http.get(path).json()["appeal"]["answered_at"] is not None
    log = admin.get("/v1/organization/audit_logs", params={"resource_ids": case}).json()["data"]
    assert [entry["type"] for entry in log] == ["case.answered", "case.appealed"]
    safety.reinstate(database, project.id)
    closed = http.post(f"{path}/appeal", json={"message": "x"})
    assert closed.status_code == 400
    assert "is closed" in closed.json()["error"]["message"]


def test_the_audit_log_pages_backwards(server: Server) -> None:
    database = server.runtime.database
    _, admin_key = accounts.create_admin_key(database)
    project, _ = server.new_account("paged")
    for number in range(5):
        safety.warn(database, project.id, f"Reason {number}.")
    admin, path = server.http(admin_key), "/v1/organization/audit_logs"
    wanted = {"project_ids": project.id, "event_types": "account.warned"}

    def ids(**more: object) -> list[str]:
        page = admin.get(path, params={**wanted, **more}).json()
        return [entry["id"] for entry in page["data"]]

    every = ids()
    assert len(every) == 5
    assert ids(after=every[1], limit=2) == every[2:4]
    assert ids(before=every[4], limit=2) == every[2:4]
    assert ids(before=every[1]) == every[:1]
    assert ids(before=every[4], after=every[0]) == every[1:4]
    assert ids(actor_emails="somebody@example.com") == []
    refused = admin.get(path, params={"before": "audit_log-none"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "before"

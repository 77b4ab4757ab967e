"""Webhooks: endpoints by the official client, deliveries that it verifies, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai import InvalidWebhookSignatureError

from data import accounts, jobs, webhooks
from data.db import Database
from data.tables import Job
from data.tables_jobs import WebhookDelivery, WebhookEndpoint
from data.web_address import is_public, resolve_public
from serve import webhook_sender
from serve.webhook_sender import WebhookSender

EVENTS = [
    *("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"),
    *("batch.completed", "batch.failed", "batch.expired", "batch.cancelled"),
    *("safety.warning_issued", "safety.deactivation_issued", "safety_identifier.blocked"),
    *("spend_alert.reached", "label_project.completed", "label_round.promoted"),
    *("label_round.rejected", "label_round.failed", "label_round.cancelled"),
]
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 10


@dataclass
class Receiver:
    """A web server that keeps what it gets; `answers` are its next statuses, then 200."""

    url: str = ""
    got: list[tuple[dict[str, str], str]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    delay_s: float = 0.0

    def wait(self, count: int) -> list[tuple[dict[str, str], str]]:
        deadline = time.monotonic() + 15
        while len(self.got) < count:
            assert time.monotonic() < deadline, f"{len(self.got)} deliveries of {count}"
            time.sleep(0.02)
        return self.got


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            time.sleep(found.delay_s)
            status = found.answers.pop(0) if found.answers else 200
            self.send_response(status)
            if status in (301, 307):
                self.send_header("location", f"{found.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.got.append((headers | {"path": self.path}, body))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("webhooks")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    values = {
        "webhooks_allow_private": True,
        "webhook_retry_s": 0.05,
        "webhook_timeout_s": 1.0,
    }
    with running(tiny_settings(home, **values)) as found:
        yield found


@pytest.fixture
def account(server: Server, request: pytest.FixtureRequest) -> tuple[str, Any]:
    project, key = server.new_account(request.node.name[:60])
    return project.id, server.client(key)


def end_job(server: Server, client: openai.OpenAI, status: str) -> str:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    if status == "cancelled":
        client.fine_tuning.jobs.cancel(job.id)
        return job.id
    with server.runtime.database.write() as session:
        record = session.get_one(Job, job.id)
        if status == "failed":
            jobs.fail(session, record, "training_failed", "It broke.")
        else:
            jobs.enqueue(session, record, {})
            jobs.move(session, record, "running")
            jobs.move(session, record, "succeeded")
    return job.id


def test_the_end_of_a_batch_is_told(account: tuple[str, openai.OpenAI], receiver: Receiver) -> None:
    _, client = account
    made = client.webhooks.create(name="batches", url=receiver.url, event_types=["batch.completed"])
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
    line |= {"body": {"model": MODEL, "prompt": "The", "max_tokens": 2}}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    ((headers, body),) = receiver.wait(1)
    event = client.webhooks.unwrap(body, headers, secret=made.signing_secret)
    assert (event.type, event.data.id) == ("batch.completed", batch.id)
    assert client.batches.retrieve(batch.id).status == "completed"


def test_endpoints(account: tuple[str, openai.OpenAI], server: Server) -> None:
    _, client = account
    assert client.webhooks.event_types.list().data == EVENTS
    made = client.webhooks.create(name="mine", url="https://example.com/hook", event_types=EVENTS)
    assert made.signing_secret.startswith("whsec_")
    found = client.webhooks.retrieve(made.id)
    assert found.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    assert made.signing_secret not in found.model_dump_json()
    changed = client.webhooks.update(made.id, name="yours", event_types=EVENTS[:1])
    assert (changed.name, changed.event_types, changed.url) == ("yours", EVENTS[:1], made.url)
    others = [
        client.webhooks.create(name=str(n), url=made.url, event_types=EVENTS).id for n in range(3)
    ]
    assert sorted(e.id for e in client.webhooks.list(limit=2)) == sorted([made.id, *others])
    rotated = client.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret != made.signing_secret
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)
    _, key = server.new_account("a stranger")
    with server.http(key) as http:
        for method, path in [
            ("GET", ""),
            ("POST", ""),
            ("DELETE", ""),
            ("POST", "/rotate_secret"),
            ("GET", "/deliveries"),
        ]:
            texts = {
                http.request(method, f"/v1/webhook_endpoints/{i}{path}", json={}).text.replace(
                    i, "X"
                )
                for i in (others[0], "whe_0")
            }
            assert len(texts) == 1
            assert "No such WebhookEndpoint object: X" in texts.pop()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "ftp://example.com"}, "url"),
        ({"url": "https://user:word@example.com"}, "url"),
        ({"url": "https://"}, "url"),
        ({"url": "https://example.com:99999"}, "url"),
        ({"url": "https://a..b.com/"}, "url"),
        ({"url": f"https://{'a' * 64}.com/"}, "url"),
        ({"name": " "}, "name"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["fine_tuning.job.succeeded", "batch.done"]}, "event_types[1]"),
    ],
)
def test_refusals(account: tuple[str, openai.OpenAI], fields: Any, param: str) -> None:
    good = {"name": "n", "url": "https://example.com", "event_types": EVENTS}
    with pytest.raises(openai.BadRequestError) as caught:
        account[1].webhooks.create(**(good | fields))
    assert caught.value.param == param


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_the_official_client_verifies_deliveries(
    server: Server, account: tuple[str, openai.OpenAI], receiver: Receiver, status: str
) -> None:
    _, client = account
    event_type = f"fine_tuning.job.{status}"
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=[event_type])
    client.webhooks.create(
        name="other", url=receiver.url, event_types=[t for t in EVENTS if t != event_type]
    )
    job_id = end_job(server, client, status)
    [(headers, body)] = receiver.wait(1)
    event = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
    assert event.type == event_type
    assert event.data.id == job_id
    assert event.id == headers["webhook-id"]
    assert headers["host"] == receiver.url.removeprefix("http://")
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + " ", headers, secret=endpoint.signing_secret)
    wait_for(lambda: deliveries(server, account, endpoint.id)[0]["status"] == "delivered")
    [shown] = deliveries(server, account, endpoint.id)
    assert (shown["attempts"], shown["status_code"], shown["error"]) == (1, 200, None)
    assert len(receiver.got) == 1


def deliveries(server: Server, account: tuple[str, openai.OpenAI], endpoint_id: str) -> Any:
    path = f"/v1/webhook_endpoints/{endpoint_id}/deliveries"
    return server.http(account[1].api_key).get(path).json()["data"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_receiver_that_fails_is_tried_again(
    server: Server, account: tuple[str, openai.OpenAI], receiver: Receiver
) -> None:
    _, client = account
    receiver.answers = [500, 307]
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=EVENTS)
    end_job(server, client, "cancelled")
    got = receiver.wait(3)
    assert len({headers["webhook-id"] for headers, _ in got}) == 1
    assert {headers["path"] for headers, _ in got} == {"/"}  # the redirect was not followed
    wait_for(lambda: deliveries(server, account, endpoint.id)[0]["attempts"] == 3)
    assert deliveries(server, account, endpoint.id)[0]["status"] == "delivered"


def test_a_receiver_that_hangs_or_is_gone(
    server: Server,
    account: tuple[str, openai.OpenAI],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, client = account
    monkeypatch.setattr(webhook_sender, "MAX_ATTEMPTS", 2)
    receiver.delay_s = 1.5
    slow = client.webhooks.create(name="slow", url=receiver.url, event_types=EVENTS)
    gone = client.webhooks.create(name="gone", url="http://localhost:1/x", event_types=EVENTS)
    end_job(server, client, "failed")
    for endpoint, said in ((slow, "no answer within 1 s"), (gone, "ConnectError")):
        wait_for(lambda e=endpoint: deliveries(server, account, e.id)[0]["status"] == "failed")
        [shown] = deliveries(server, account, endpoint.id)
        assert said in shown["error"]
        assert (shown["attempts"], shown["next_attempt_at"]) == (2, None)
    receiver.wait(2)


def test_whatever_goes_wrong_is_settled(
    server: Server,
    account: tuple[str, openai.OpenAI],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, client = account
    monkeypatch.setattr(webhook_sender, "MAX_ATTEMPTS", 1)
    made = client.webhooks.create(name="n", url="http://localhost/", event_types=EVENTS)
    with server.runtime.database.write() as session:
        session.get_one(WebhookEndpoint, made.id).url = "http://a..b.com/"
    with pytest.raises(openai.BadRequestError, match="could not be reached"):
        client.webhooks.test(made.id, event_type=EVENTS[0])
    end_job(server, client, "failed")
    wait_for(lambda: deliveries(server, account, made.id)[0]["status"] == "failed")


def test_accounts_take_turns_and_old_deliveries_go(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    busy, other = (accounts.create_account(database, name)[0].id for name in ("busy", "other"))
    for owner in (busy, other):
        webhooks.create(database, owner, "n", "https://example.com", EVENTS)
    with database.write() as session:
        for owner in (*[busy] * 9, other):
            webhooks.enqueue(session, owner, EVENTS[0], 1, {"id": "x"})

    def claim(**under_way: int) -> list[str]:
        given = {busy: under_way.get("busy", 0)}
        return [e.project_id for _, e in webhooks.claim_due(database, 4, 60, 2, given)]

    assert sorted(claim()) == sorted([busy, busy, other])
    assert claim(busy=2) == []
    assert claim(busy=1) == [busy]
    with database.write() as session:
        kept = session.query(WebhookDelivery).all()
        for delivery in kept[:2]:
            delivery.created_at = 1
        kept[0].status = "delivered"
    webhooks.sweep(database)
    with database.read() as session:
        assert session.query(WebhookDelivery).count() == len(kept) - 1
    database.close()


def test_rotation_keeps_the_old_secret_for_a_day(
    server: Server, account: tuple[str, openai.OpenAI], receiver: Receiver
) -> None:
    _, client = account
    endpoint = client.webhooks.create(name="n", url=receiver.url, event_types=EVENTS)
    rotated = client.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    result = client.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
    assert (result.status_code, result.success, result.event_type) == (200, True, EVENTS[0])
    [(headers, body)] = receiver.wait(1)
    for secret in (endpoint.signing_secret, rotated.signing_secret):
        client.webhooks.unwrap(body, headers, secret=secret)
    client.webhooks.rotate_secret(endpoint.id)
    receiver.answers = [418]
    result = client.webhooks.test(endpoint.id, event_type="fine_tuning.job.failed")
    assert result.status_code == 418
    headers, body = receiver.wait(2)[1]
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=rotated.signing_secret)


def test_what_waits_is_sent_after_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    values = {"webhooks_allow_private": True, "webhook_retry_s": 1000.0}
    receiver.answers = [503]
    with running(tiny_settings(tmp_path, **values)) as first:
        client = first.client()
        made = client.webhooks.create(name="n", url=receiver.url, event_types=EVENTS)
        job_id = end_job(first, client, "cancelled")
        receiver.wait(1)
        wait_for(lambda: deliveries(first, ("", client), made.id)[0]["attempts"] == 1)
    settings = tiny_settings(tmp_path, **values)
    database = Database(settings.effective_database_url)
    with database.write() as session:
        for delivery in session.query(WebhookDelivery):
            delivery.due_at = 0.0

    async def send_the_rest() -> None:
        sender = WebhookSender(database, settings)
        sender.start()
        while len(receiver.got) < 2:
            await asyncio.sleep(0.02)
        await sender.stop()

    asyncio.run(asyncio.wait_for(send_the_rest(), 15))
    database.close()
    ids = {json.loads(body)["data"]["id"] for _, body in receiver.got}
    assert ids == {job_id}
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "localhost",
            "localhost.",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "0.0.0.0",
        ),
        *("169.254.169.254", "100.64.0.1", "[::1]", "[::ffff:10.0.0.1]", "[fd00::1]", "[fe80::1]"),
        *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "127.1", "printer", "db.internal"),
    ],
)
def test_private_addresses_are_refused(tmp_path: Path, server: Server, host: str) -> None:
    with pytest.raises(ValueError, match="not on the open internet"):
        webhooks.create(
            server.runtime.database, server.project.id, "n", f"https://{host}/x", EVENTS
        )


def test_names_are_checked_when_they_are_called(
    server: Server, account: tuple[str, openai.OpenAI], receiver: Receiver, home: Path
) -> None:
    """A name that resolves to a private address gets nothing, however public it looks."""
    project_id, _ = account
    endpoint = webhooks.create(
        server.runtime.database, project_id, "n", receiver.url, EVENTS, allow_private=True
    )
    strict = tiny_settings(home)
    outcome = asyncio.run(webhook_sender.send(endpoint, "evt_1", "{}", strict))
    assert outcome.status_code is None
    assert "not on the open internet" in str(outcome.error)
    assert receiver.got == []
    with pytest.raises(ValueError, match="not on the open internet"):
        resolve_public("localhost", 443)
    assert resolve_public("localhost", 443, allow_private=True) in ("127.0.0.1", "::1")
    assert is_public("8.8.8.8")
    assert is_public("::ffff:8.8.8.8")
    assert is_public("2606:4700::1111")

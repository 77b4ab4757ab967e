"""Repeated POSTs: the same answer, never the same work twice, and never another account's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai import OpenAI
from sqlalchemy import func, select, update

from data import kept_answers
from data.db import Database
from data.errors import Forbidden, IdempotencyMismatch
from data.tables import Job, now
from data.tables_metering import KeptAnswer
from serve.api import idempotency

LINES = b'{"prompt": "a", "completion": "b"}\n' * 20
BODY = {"model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("idempotency"))) as server:
        yield server


@pytest.fixture
def database(tmp_path: Any) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/hone.db")
    database.migrate()
    yield database
    database.close()


def post(http: httpx.Client, key: str, body: Any = None, path: str = "completions") -> Any:
    headers = {"idempotency-key": key}
    return http.post(f"/v1/{path}", json=body or BODY, headers=headers)


def jobs(server: Server, project_id: str) -> int:
    with server.runtime.database.read() as session:
        query = select(func.count()).select_from(Job).where(Job.project_id == project_id)
        return session.scalar(query) or 0


def test_same_key_and_body_get_the_same_answer(server: Server) -> None:
    http = server.http()
    first, again = post(http, "k1"), post(http, "k1")
    assert first.status_code == 200
    assert again.content == first.content  # the id and the sampled text too
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert post(http, "k2").json()["id"] != first.json()["id"]
    assert http.post("/v1/completions", json=BODY).json()["id"] != first.json()["id"]


def test_streams_and_errors_of_the_request_are_kept_too(server: Server) -> None:
    http = server.http()
    streams = [post(http, "s1", BODY | {"stream": True}) for _ in range(2)]
    assert streams[0].content == streams[1].content
    assert streams[1].headers["content-type"] == streams[0].headers["content-type"]
    wrong = [post(http, "s2", BODY | {"temperature": 9}) for _ in range(2)]
    assert [answer.status_code for answer in wrong] == [400, 400]
    assert wrong[1].headers["idempotent-replayed"] == "true"


def test_another_body_or_path_with_the_same_key_is_an_error(server: Server) -> None:
    http = server.http()
    post(http, "m1")
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
    for answer in (post(http, "m1", BODY | {"n": 2}), post(http, "m1", chat, "chat/completions")):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "idempotency_error"
        assert error["code"] is None
    assert post(http, "x" * 256).status_code == 400


def test_a_body_that_is_too_large_is_told_so(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield from (b"x" * (1 << 20) for _ in range(33))

    headers = {"idempotency-key": "large", "content-type": "application/json"}
    answer = server.http().post("/v1/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "file_too_large"


def test_a_key_is_the_accounts_own(server: Server) -> None:
    _, other = server.new_account("other")
    mine, theirs = post(server.http(), "o1"), post(server.http(other), "o1", BODY | {"n": 2})
    assert theirs.status_code == 200
    assert theirs.json()["id"] != mine.json()["id"]


def test_at_the_same_time_one_is_done_and_the_others_wait(server: Server) -> None:
    project, key = server.new_account("together")
    client = server.client(key)
    file = client.files.create(file=("x.jsonl", LINES), purpose="fine-tune")
    body = {"model": MODEL, "training_file": file.id}
    start = threading.Barrier(6)

    def work(_: int) -> str:
        http = server.http(key)
        start.wait()
        return str(post(http, "j1", body, "fine_tuning/jobs").json()["id"])

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(work, range(6)))) == 1
    assert jobs(server, project.id) == 1


def test_an_upload_is_recognised_though_its_boundary_differs(server: Server) -> None:
    http = server.http(server.new_account("uploads")[1])
    headers = {"idempotency-key": "u1"}
    ids = set()
    for _ in range(2):
        files = {"file": ("x.jsonl", LINES)}
        answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files=files, headers=headers)
        ids.add(answer.json()["id"])
    assert len(ids) == 1
    changed = http.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files={"file": ("x.jsonl", LINES * 2)},
        headers=headers,
    )
    assert changed.json()["error"]["type"] == "idempotency_error"
    assert len(http.get("/v1/files").json()["data"]) == 1


def test_uploads_in_parts_are_done_once_a_key(server: Server) -> None:
    http = server.http(server.new_account("parts")[1])
    half = len(LINES) // 4
    asked = {"filename": "x.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    begun = [post(http, "p1", {"bytes": len(LINES), **asked}, "uploads") for _ in range(2)]
    assert begun[0].status_code == 200
    assert begun[1].content == begun[0].content
    upload = f"uploads/{begun[0].json()['id']}"

    def send(key: str, data: bytes) -> httpx.Response:
        headers = {"idempotency-key": key}
        return http.post(f"/v1/{upload}/parts", files={"data": ("part", data)}, headers=headers)

    first, again, second = send("a", LINES[:half]), send("a", LINES[:half]), send("b", LINES[half:])
    assert again.json()["id"] == first.json()["id"] != second.json()["id"]
    assert send("a", LINES[half:]).json()["error"]["type"] == "idempotency_error"

    ids = [first.json()["id"], second.json()["id"]]
    done = [post(http, "c1", {"part_ids": ids}, f"{upload}/complete") for _ in range(2)]
    assert done[0].json()["file"]["bytes"] == len(LINES)
    assert done[1].content == done[0].content  # and no refusal
    reversed_ = post(http, "c1", {"part_ids": ids[::-1]}, f"{upload}/complete")
    assert reversed_.json()["error"]["type"] == "idempotency_error"
    anew = post(http, "c2", {"part_ids": ids}, f"{upload}/complete")
    assert "is completed" in anew.json()["error"]["message"]
    assert len(http.get("/v1/files").json()["data"]) == 1


def batch_of(server: Server, key: str) -> dict[str, str]:
    call = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": BODY}
    content = json.dumps(call).encode()
    file = server.client(key).files.create(file=("in.jsonl", content), purpose="batch")
    return {
        "input_file_id": file.id,
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }


def test_a_batch_is_made_once_a_key(server: Server) -> None:
    _, key = server.new_account("batch-keys")
    http, body = server.http(key), batch_of(server, key)
    made = [post(http, "b1", body, "batches") for _ in range(2)]
    assert made[0].json()["object"] == "batch"
    assert made[1].content == made[0].content
    assert made[1].headers["idempotent-replayed"] == "true"
    other = post(http, "b1", {**body, "metadata": {"a": "b"}}, "batches")
    assert other.json()["error"]["type"] == "idempotency_error"
    assert post(http, "b2", body, "batches").json()["id"] != made[0].json()["id"]
    assert len(http.get("/v1/batches").json()["data"]) == 2


def test_a_retried_batch_or_completion_of_an_upload_is_the_first_one(server: Server) -> None:
    """What the official clients send: no key, but how often they have tried."""
    _, key = server.new_account("tries")
    http, body = server.http(key), batch_of(server, key)

    def try_(path: str, body: Any, times: int) -> Any:
        headers = {"x-stainless-retry-count": str(times)}
        return http.post(f"/v1/{path}", json=body, headers=headers).json()

    ids = [try_("batches", body, times)["id"] for times in (0, 1, 2)]
    assert len(set(ids)) == 1
    assert try_("batches", body, 0)["id"] != ids[0]  # asked for once more, on purpose
    assert try_("batches", {**body, "metadata": {"a": "b"}}, 1)["id"] not in ids

    asked = {"filename": "x.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    upload = http.post("/v1/uploads", json={"bytes": len(LINES), **asked}).json()["id"]
    part = http.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", LINES)}).json()["id"]
    path = f"uploads/{upload}/complete"
    files = [try_(path, {"part_ids": [part]}, times)["file"]["id"] for times in (0, 1)]
    assert files[0] == files[1]


class LosesTheFirstAnswer(httpx.HTTPTransport):
    """Sends everything, but pretends that the first answer to a new job never came."""

    lost = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.url.path.endswith("/jobs") and request.method == "POST" and not self.lost:
            self.lost += 1
            response.close()
            raise httpx.ReadTimeout("lost", request=request)
        return response


def test_official_client_that_tries_again_makes_one_job(server: Server) -> None:
    project, key = server.new_account("retries")
    transport = LosesTheFirstAnswer()
    with OpenAI(
        base_url=f"{server.url}/v1", api_key=key, http_client=httpx.Client(transport=transport)
    ) as client:
        file = client.files.create(file=("x.jsonl", LINES), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        assert transport.lost == 1
        assert jobs(server, project.id) == 1
        assert client.fine_tuning.jobs.list().data[0].id == job.id
        # Asking for the same once more, on purpose, makes another.
        assert client.fine_tuning.jobs.create(model=MODEL, training_file=file.id).id != job.id
    with server.runtime.database.write() as session:
        session.execute(
            update(KeptAnswer).where(KeptAnswer.scope == project.id).values(created_at=now() - 601)
        )
    late = server.http(key).post(
        "/v1/fine_tuning/jobs",
        json={"model": MODEL, "training_file": file.id},
        headers={"x-stainless-retry-count": "1"},
    )
    assert late.status_code == 200
    assert jobs(server, project.id) == 3


def unfinished(server: Server, project_id: str) -> int:
    """Make all kept calls of an account look begun, and not finished; returns how many."""
    with server.runtime.database.write() as session:
        query = update(KeptAnswer).where(KeptAnswer.scope == project_id)
        return session.execute(query.values(status=None, created_at=now())).rowcount  # type: ignore[attr-defined, no-any-return]


def test_no_answer_with_a_secret_is_kept(server: Server) -> None:
    project, key = server.new_account("secrets")
    http = server.http(key)
    endpoint = {"name": "a", "url": "https://example.com", "event_types": ["batch.completed"]}
    made = http.post("/v1/webhook_endpoints", json=endpoint).json()["id"]
    for path, body in (
        ("api_keys", {"name": "a"}),
        ("webhook_endpoints", endpoint),
        (f"webhook_endpoints/{made}/rotate_secret", {}),
    ):
        answer = post(http, "secret", body, path)
        assert answer.status_code == 400, path
        assert "Idempotency-Key" in answer.json()["error"]["message"]
    with server.runtime.database.read() as session:
        query = select(func.count()).select_from(KeptAnswer).where(KeptAnswer.scope == project.id)
        assert session.scalar(query) == 0


def test_a_refusal_that_may_be_lifted_is_not_kept(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = server.http()

    def refuse(_account: str) -> None:
        raise Forbidden("closed", code="account_suspended")

    with monkeypatch.context() as suspended:
        suspended.setattr(server.runtime.generator, "check", refuse)
        assert post(http, "f1").status_code == 403
    assert post(http, "f1").status_code == 200


def test_a_call_whose_server_died_is_waited_for_but_not_forever(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, key = server.new_account("died")
    http = server.http(key)
    post(http, "d1")
    assert unfinished(server, project.id) == 1
    monkeypatch.setattr(idempotency, "WAIT_S", 0.3)
    answer = post(http, "d1")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "overloaded"

    monkeypatch.setattr(idempotency, "WAIT_S", 60)
    looks: list[None] = []
    look = kept_answers.is_being_made
    monkeypatch.setattr(
        kept_answers, "is_being_made", lambda *asked: looks.append(None) or look(*asked)
    )
    with pytest.raises(httpx.ReadTimeout):  # a client that leaves is not waited for
        http.post("/v1/completions", json=BODY, headers={"idempotency-key": "d1"}, timeout=0.3)
    time.sleep(0.3)
    seen = len(looks)
    assert seen > 0
    time.sleep(0.4)
    assert len(looks) == seen

    monkeypatch.setattr(kept_answers, "ABANDONED_S", 1)
    answer = post(http, "d1")
    assert answer.status_code == 200
    assert "idempotent-replayed" not in answer.headers


def test_who_makes_a_call_renews_it(database: Database) -> None:
    kept_answers.begin(database, "p", "k", "h")
    early = now() - kept_answers.ABANDONED_S
    with database.write() as session:
        session.execute(update(KeptAnswer).values(created_at=early))
    assert not kept_answers.is_being_made(database, "p", "k")
    kept_answers.renew(database, "p", "k")
    assert kept_answers.is_being_made(database, "p", "k")
    assert kept_answers.begin(database, "p", "k", "h") is not None


@pytest.mark.parametrize("tries", [b"x", b"-1", b"\xb2", b"9" * 5000])
def test_a_number_of_tries_that_is_none(server: Server, tries: bytes) -> None:
    key = b"tries " + tries[:4].hex().encode()
    headers = {b"idempotency-key": key, b"x-stainless-retry-count": tries}
    answer = server.http().post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == 200


def test_what_says_later_is_not_kept(server: Server, database: Database) -> None:
    assert kept_answers.begin(database, "p", "k", "h") is None
    assert kept_answers.begin(database, "p", "k", "h").status is None  # type: ignore[union-attr]
    with pytest.raises(IdempotencyMismatch):
        kept_answers.begin(database, "p", "k", "other")
    kept_answers.release(database, "p", "k")
    assert kept_answers.begin(database, "p", "k", "other") is None
    kept_answers.finish(database, "p", "k", 200, "text/plain", b"x")
    kept_answers.release(database, "p", "k")  # too late
    kept = kept_answers.begin(database, "p", "k", "other")
    assert kept is not None
    assert (kept.status, kept.body) == (200, b"x")
    with database.write() as session:
        session.execute(update(KeptAnswer).values(created_at=now() - kept_answers.KEEP_S))
    assert kept_answers.begin(database, "p", "k", "h") is None

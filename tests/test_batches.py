"""Batches through the official client: answered as live calls are, resumed, cancelled, refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai.types import Batch
from sqlalchemy import select

from data import accounts, batches, caps, limits, safety
from data.db import Database
from data.tables import new_id, now
from data.tables_metering import UsageRecord
from data.tables_surface import Batch as Record
from serve import batch_runner

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("batches"))) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def row(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    defaults = {"model": MODEL, "prompt": "The cat", "max_tokens": 8, "temperature": 0}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": (defaults if url == COMPLETIONS else {"model": MODEL}) | body,
    }


def start(client: openai.OpenAI, rows: list[Any], url: str = COMPLETIONS, **fields: Any) -> Batch:
    content = "\n".join(json.dumps(r) for r in rows).encode()
    file_id = client.files.create(file=("in.jsonl", content), purpose="batch").id
    return client.batches.create(
        input_file_id=file_id,
        endpoint=url,  # type: ignore[arg-type]
        completion_window="24h",
        **fields,
    )


def wait(client: openai.OpenAI, batch: Batch, limit_s: float = 60) -> Batch:
    deadline = time.monotonic() + limit_s
    while True:
        found = client.batches.retrieve(batch.id)
        if found.status in ("completed", "failed", "cancelled", "expired"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def lines(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    rows = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {row["custom_id"]: row["response"] for row in rows}


def test_answers_are_those_of_live_calls(client: openai.OpenAI) -> None:
    rows = [row(f"r{n}", prompt=f"prompt {n}") for n in range(9)]
    rows += [row("bad", temperature=9), row("streamed", stream=True), row("gone", model="absent")]
    batch = start(client, rows, metadata={"run": "1"})
    done = wait(client, batch)
    Batch.model_validate(done.model_dump(), strict=True)
    assert done.status == "completed"
    assert done.metadata == {"run": "1"}
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 12, "completed": 9, "failed": 3}
    found = lines(client, done.output_file_id)
    assert set(found) == {f"r{n}" for n in range(9)}
    for n in range(9):
        live = client.completions.create(
            model=MODEL, prompt=f"prompt {n}", max_tokens=8, temperature=0
        )
        assert found[f"r{n}"]["status_code"] == 200
        assert found[f"r{n}"]["body"]["choices"][0]["text"] == live.choices[0].text
    wrong = lines(client, done.error_file_id)
    told = {name: (r["status_code"], r["body"]["error"]["param"]) for name, r in wrong.items()}
    assert told == {
        "bad": (400, "temperature"),
        "streamed": (400, "stream"),
        "gone": (404, "model"),
    }
    assert done.in_progress_at is not None
    assert done.completed_at is not None
    assert batch.id in [listed.id for listed in client.batches.list(limit=1)]


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_other_endpoints(client: openai.OpenAI, url: str, body: dict[str, Any]) -> None:
    done = wait(client, start(client, [row("one", url, **body)], url))
    [answer] = lines(client, done.output_file_id).values()
    assert answer["status_code"] == 200
    assert answer["body"]["usage"]["total_tokens"] > 0


def test_every_wrong_line_is_told(client: openai.OpenAI) -> None:
    wrong: list[Any] = [
        row("a"),
        row("a"),
        row("b", "/v1/embeddings"),
        {**row("c"), "method": "GET"},
        {**row("d"), "body": []},
        {k: v for k, v in row("e").items() if k != "custom_id"},
    ]
    done = wait(client, start(client, wrong))
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert [(error.line, error.param) for error in done.errors.data] == [
        (2, "custom_id"),
        (3, "url"),
        (4, "method"),
        (5, "body"),
        (6, "custom_id"),
    ]
    assert done.failed_at is not None


def test_cancelling_keeps_what_was_answered(client: openai.OpenAI) -> None:
    rows = [row(f"r{n}", max_tokens=400, ignore_eos=True) for n in range(400)]
    batch = start(client, rows)
    deadline = time.monotonic() + 60
    while client.batches.retrieve(batch.id).status != "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = wait(client, batch)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert done.request_counts.completed < 400
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.cancel(batch.id)
    assert caught.value.code == "invalid_state"


def test_a_restarted_server_repeats_nothing(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    with running(settings) as first:
        client = first.client()
        rows = [row(f"r{n}", max_tokens=60, ignore_eos=True) for n in range(150)]
        batch = start(client, rows)
        spool = settings.home / "batches" / f"{batch.id}.jsonl"
        deadline = time.monotonic() + 60
        while not spool.exists() or len(spool.read_bytes().splitlines()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        project, key = first.project, first.key
    kept = [json.loads(line) for line in spool.read_bytes().splitlines()]
    assert 5 <= len(kept) < 150
    with spool.open("ab") as torn:
        torn.write(b'{"custom_id": "r1')  # what a crash may leave
    with running_again(settings) as second:
        client = second.client(key)
        done = wait(client, batch, 120)
        content = client.files.content(str(done.output_file_id)).text
    found = [json.loads(line) for line in content.splitlines()]
    assert sorted(line["custom_id"] for line in found) == sorted(r["custom_id"] for r in rows)
    by_id = {line["custom_id"]: line["id"] for line in found}
    assert all(by_id[line["custom_id"]] == line["id"] for line in kept)
    assert project.id


def running_again(settings: Any) -> Any:
    """Serve on the same home; the account of `running` is named anew, as its name is taken."""
    import contextlib
    import threading

    import uvicorn
    from api_server import Server as Found

    from serve.app import create_app
    from serve.runtime import open_runtime

    @contextlib.contextmanager
    def serve() -> Iterator[Server]:
        runtime = open_runtime(settings)
        app = create_app(settings, runtime)
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            with contextlib.ExitStack() as clients:
                project: Any = None
                yield Found(f"http://127.0.0.1:{port}", runtime, project, "", clients)
        finally:
            server.should_exit = True
            thread.join(timeout=30)

    return serve()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": "OTHER"}, "input_file_id"),
    ],
)
def test_refused_batches(client: openai.OpenAI, fields: dict[str, str], param: str) -> None:
    rows = b'{"prompt": "a", "completion": "b"}'
    other = client.files.create(file=("x.jsonl", rows), purpose="fine-tune").id
    mine = client.files.create(file=("x.jsonl", rows), purpose="batch").id
    defaults = {"input_file_id": mine, "endpoint": COMPLETIONS, "completion_window": "24h"}
    named = defaults | {k: other if v == "OTHER" else v for k, v in fields.items()}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**named)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_file_too_large_is_refused(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BYTES", 100)
    with pytest.raises(openai.BadRequestError, match="at most 100") as caught:
        start(client, [row("a"), row("b")])
    assert caught.value.param == "input_file_id"


def test_lines_are_read_whatever_they_hold() -> None:
    deep = b"[" * 100_000 + b"\n"
    content = [b"not json\n", deep, b"\n", json.dumps(row("ok")).encode()]
    requests, errors = batches.read_requests(iter(content), COMPLETIONS)  # type: ignore[arg-type]
    assert [custom_id for custom_id, _ in requests] == ["ok"]
    assert [error["line"] for error in errors] == [1, 2]
    assert batches.read_requests(iter([]), COMPLETIONS)[1][0]["code"] == "empty_file"  # type: ignore[arg-type]


def test_one_account_does_not_hold_up_another(server: Server, client: openai.OpenAI) -> None:
    limited, key = server.new_account("slow")
    told = server.runtime
    base = told.models.base_model
    given = (base, told.settings.limits, {"requests_per_day": 1})
    limits.update_rate(told.database, limited.id, f"rl-{base}", *given)
    told.gate.refresh()
    slow = server.client(key)
    stuck = start(slow, [row(f"r{n}") for n in range(6)])
    deadline = time.monotonic() + 30
    while not (slow.batches.retrieve(stuck.id).request_counts or stuck).completed:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert wait(client, start(client, [row("one")])).status == "completed"
    slow.batches.cancel(stuck.id)
    done = wait(slow, stuck)
    assert done.status == "cancelled"
    assert len(lines(slow, done.output_file_id)) == 1


def test_accounts_take_turns(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    projects = [accounts.create_account(database, name)[0].id for name in ("ant", "bee")]
    with database.write() as session:
        session.add_all(
            Record(
                id=new_id("batch_"),
                project_id=project,
                key_id="key_x",
                endpoint=COMPLETIONS,
                input_file_id="file-x",
                completion_window="24h",
                errors=[],
                times={},
                created_at=place,
                expires_at=now() + 1000,
            )
            for place, project in enumerate((projects[0], projects[0], projects[1]))
        )
    first = batches.claim(database, "a", 60)
    second = batches.claim(database, "a", 60)
    assert first is not None
    assert second is not None
    assert [first.project_id, second.project_id] == projects
    assert batches.claim(database, "b", 60) is None  # one batch an account
    batches.release(database, first.id, "a")
    third = batches.claim(database, "b", 60)
    assert third is not None
    assert third.id == first.id  # the oldest of the account
    batches.release(database, second.id, "a")
    assert batches.is_waiting(database)
    database.close()


def test_output_is_kept_whatever_the_account_may_store(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, key = server.new_account("full")
    client, runtime = server.client(key), server.runtime
    kept, go_on = batch_runner.ENDPOINTS[COMPLETIONS], threading.Event()

    async def answer(body: Any, *given: Any) -> Any:
        if body.prompt == "a bug":
            await asyncio.to_thread(go_on.wait, 30)
            raise ValueError("not foreseen")
        return await kept[1](body, *given)

    monkeypatch.setitem(batch_runner.ENDPOINTS, COMPLETIONS, (kept[0], answer))
    batch = start(client, [row("right"), row("wrong", prompt="a bug")])
    with pytest.raises(openai.BadRequestError, match="used by the batch") as caught:
        client.files.delete(batch.input_file_id)
    assert caught.value.code == "invalid_state"
    nothing = {"stored_bytes": 1}
    caps.set_caps(runtime.database, project.id, runtime.settings.limits, nothing)
    go_on.set()
    done = wait(client, batch)
    assert done.status == "completed"
    assert list(lines(client, done.output_file_id)) == ["right"]
    [fault] = lines(client, done.error_file_id).values()
    assert (fault["status_code"], fault["body"]["error"]["code"]) == (500, "internal_error")
    runtime.meter.flush()
    with runtime.database.read() as session:
        of_account = select(UsageRecord.batch).where(UsageRecord.project_id == project.id)
        assert session.scalars(of_account).all() == [True]
    client.files.delete(batch.input_file_id)


def test_a_suspended_accounts_batch_rests(server: Server) -> None:
    project, key = server.new_account("bad")
    client, database = server.client(key), server.runtime.database
    rows = [row(f"r{n}", "/v1/moderations", input="text " * 2000) for n in range(200)]
    batch = start(client, rows, "/v1/moderations")
    deadline = time.monotonic() + 30
    while client.batches.retrieve(batch.id).status != "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    safety.suspend(database, project.id, "For the test.")
    while batches.get(database, project.id, batch.id).worker_id is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rests = batches.get(database, project.id, batch.id)
    assert (rests.status, rests.completed < 200) == ("in_progress", True)


def test_a_batch_that_fails_keeps_its_answers(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its file went while another server had begun with it."""
    with monkeypatch.context() as patch:
        patch.setattr(batches, "claim", lambda *_: None)
        time.sleep(2 * batch_runner.POLL_S)
        batch = start(client, [{"no": "request"}])
        spool = server.runtime.settings.home / "batches" / f"{batch.id}.jsonl"
        spool.parent.mkdir(exist_ok=True)
        answered = {"custom_id": "a", "response": {"status_code": 200, "body": {}}}
        spool.write_text(json.dumps(answered) + "\n")
    done = wait(client, batch)
    assert done.status == "failed"
    assert list(lines(client, done.output_file_id)) == ["a"]

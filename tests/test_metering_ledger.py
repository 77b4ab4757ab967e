"""The ledger equals the sum of what clients were told, and its buckets a naive recount."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai import BadRequestError, OpenAI, PermissionDeniedError
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError

from data import accounts, metering, usage
from data.db import Database
from data.metering import Meter, Usage
from data.settings import Prices
from data.tables import Job
from data.tables_metering import MonthlySpend, UsageRecord

PRICES = Prices(prompt=0.5, cached=0.125, completion=2.0, training=3.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("ledger"), prices=PRICES)) as server:
        yield server


@pytest.fixture
def database(tmp_path: Any) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/hone.db")
    database.migrate()
    yield database
    database.close()


def admin(server: Server, key: str | None = None) -> OpenAI:
    key = key or accounts.create_admin_key(server.runtime.database)[1]
    client = OpenAI(base_url=f"{server.url}/v1", api_key=key, admin_api_key=key, max_retries=0)
    return server.clients.enter_context(client)


def rows(server: Server, project_id: str, count: int) -> list[UsageRecord]:
    """Return an account's rows once there are `count`."""
    deadline = time.monotonic() + 10
    while True:
        with server.runtime.database.read() as session:
            query = select(UsageRecord).where(UsageRecord.project_id == project_id)
            found = list(session.scalars(query.order_by(UsageRecord.seq)))
        if len(found) >= count or time.monotonic() > deadline:
            assert len(found) == count
            return found
        time.sleep(0.05)


def one_call(client: OpenAI, dice: random.Random) -> tuple[int, int, int]:
    """Make a random call; return prompt, cached and completion tokens as the answer tells."""
    n = dice.choice([1, 1, 2, 3])
    common: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": dice.randint(1, 12),
        "seed": dice.randint(0, 9),
        "user": dice.choice(["ann", "bob"]),
        "n": n,
    }
    stream = dice.random() < 0.5
    if stream:
        common |= {"stream": True, "stream_options": {"include_usage": True}}
    if dice.random() < 0.4:
        message = {"role": "user", "content": dice.choice(["hello", "a b c"])}
        answer = client.chat.completions.create(messages=[message], **common)  # type: ignore
    else:
        common["prompt"] = dice.choice(["abc", ["abc", "de f"], "x" * 40])
        if not stream and dice.random() < 0.5:
            common["best_of"] = n + 2
        answer = client.completions.create(**common)
    told = list(answer)[-1].usage if stream else answer.usage
    return told.prompt_tokens, told.prompt_tokens_details.cached_tokens, told.completion_tokens


def test_ledger_is_the_sum_of_all_usage_told(server: Server) -> None:
    project, key = server.new_account("sums")
    told: list[tuple[int, int, int]] = []

    def work(seed: int) -> None:
        client, dice = server.client(key), random.Random(seed)
        told.extend(one_call(client, dice) for _ in range(8))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = rows(server, project.id, 32)
    of_rows = [(r.prompt_tokens, r.cached_tokens, r.completion_tokens) for r in found]
    assert Counter(of_rows) == Counter(told)
    assert {r.status for r in found} == {"complete"}
    assert {r.end_user for r in found} == {"ann", "bob"}
    assert len({r.request_id for r in found}) == 32
    with server.runtime.database.read() as session:
        cost = session.scalar(
            select(MonthlySpend.cost).where(MonthlySpend.project_id == project.id)
        )
    assert cost == sum((p - c) * 500 + c * 125 + o * 2000 for p, c, o in told)


def test_an_aborted_stream_costs_what_was_made_and_no_more(server: Server) -> None:
    project, key = server.new_account("aborts")
    client = server.client(key)
    seen = 0
    extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    with client.completions.create(
        model=MODEL, prompt="abc", max_tokens=200, n=2, stream=True, extra_body=extra
    ) as stream:
        for chunk in stream:
            seen += len(chunk.choices[0].token_ids)  # type: ignore[attr-defined]
            if seen >= 10:
                break
    (row,) = rows(server, project.id, 1)
    prompt = client.completions.create(model=MODEL, prompt="abc", max_tokens=1).usage
    assert prompt is not None
    assert row.status == "aborted"
    assert row.prompt_tokens == prompt.prompt_tokens  # once, though two sequences ran
    assert seen <= row.completion_tokens < 400


def test_refused_requests_are_no_usage(server: Server) -> None:
    project, key = server.new_account("refused")
    with pytest.raises(BadRequestError):
        server.client(key).completions.create(model=MODEL, prompt="a", max_tokens=10**6)
    server.client(key).completions.create(model=MODEL, prompt="a", max_tokens=1)
    (row,) = rows(server, project.id, 1)
    assert row.requests == 1


def test_official_client_reads_usage_and_costs(server: Server) -> None:
    project, key = server.new_account("official")
    told = [one_call(server.client(key), random.Random(seed)) for seed in range(6)]
    client = admin(server)
    start = int(time.time()) - 3600
    page = client.admin.organization.usage.completions(
        start_time=start, bucket_width="1d", group_by=["project_id"], project_ids=[project.id]
    )
    results = [result for bucket in page.data for result in bucket.results]
    assert type(results[0]).__name__ == "DataResultOrganizationUsageCompletionsResult"
    totals = [
        sum(getattr(result, name) for result in results)
        for name in ("input_tokens", "input_cached_tokens", "output_tokens")
    ]
    assert totals == [sum(column) for column in zip(*told, strict=True)]
    assert sum(result.num_model_requests for result in results) == 6  # type: ignore[union-attr]
    assert {result.project_id for result in results} == {project.id}  # type: ignore[union-attr]
    paid = client.admin.organization.usage.costs(
        start_time=start, group_by=["line_item"], project_ids=[project.id]
    )
    items = [result for bucket in paid.data for result in bucket.results]
    amount = sum(item.amount.value for item in items)  # type: ignore[union-attr,misc]
    expected = sum((p - c) * 500 + c * 125 + o * 2000 for p, c, o in told) / 1e9
    assert amount == pytest.approx(expected, rel=1e-12)
    assert {item.line_item.split(", ")[0] for item in items} == {MODEL}  # type: ignore[union-attr]


def test_only_operators_and_only_sense(server: Server) -> None:
    with pytest.raises(PermissionDeniedError):
        admin(server, server.key).admin.organization.usage.costs(start_time=1)
    _, key = accounts.create_admin_key(server.runtime.database)
    http = server.http(key)
    for query, param in [
        ("", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=5&end_time=5", "end_time"),
        ("start_time=5&colour=red", "colour"),
        ("start_time=5&group_by[]=shoe", "group_by[0]"),
        ("start_time=5&bucket_width=1h&limit=169", "limit"),
        ("start_time=5&page=page_x", "page"),
    ]:
        answer = http.get(f"/v1/organization/usage/completions?{query}")
        assert answer.status_code == 400, query
        assert answer.json()["error"]["param"] == param


def test_buckets_equal_a_naive_recount(database: Database) -> None:
    dice = random.Random(5)
    meter = Meter(database, PRICES)
    base = 1_700_000_000
    made = [
        Usage(
            project_id=dice.choice(["p", "q"]),
            key_id=dice.choice(["k1", "k2", "k3"]),
            model=dice.choice(["m", "ft:m:a:b:c"]),
            end_user=dice.choice([None, "ann"]),
            request_id=f"req_{i}",
            prompt_tokens=dice.randint(5, 50),
            cached_tokens=dice.randint(0, 5),
            completion_tokens=dice.randint(0, 50),
            created_at=base + dice.randint(0, 4 * 86400),
        )
        for i in range(400)
    ]
    for one in made:
        meter.record(one)
    meter.flush()
    for width, seconds in usage.WIDTHS_S.items():
        for group_by in ([], ["model"], ["project_id", "api_key_id", "user_id"]):
            start, end = base + 1234, base + (3 if width != "1m" else 1) * 86400 + 77
            limit = dice.randint(5, 900)
            expected: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0])
            names = {"api_key_id": "key_id", "user_id": "end_user"}
            for one in made:
                if start <= one.created_at < end and one.project_id == "p":
                    at = max(start, one.created_at // seconds * seconds)
                    group = tuple(getattr(one, names.get(name, name)) for name in group_by)
                    total = expected[(at, *group)]
                    total[0] += one.prompt_tokens
                    total[1] += one.completion_tokens
                    total[2] += 1
            found, page, last = {}, None, start
            while True:
                answer = usage.completions(
                    database,
                    usage.Range(start, end, width, limit, page),
                    group_by,
                    {"project_id": ["p"]},
                )
                for bucket in answer["data"]:
                    assert bucket["start_time"] == last  # no gap, no overlap
                    last = bucket["end_time"]
                    for result in bucket["results"]:
                        key = (last, *(result[name] for name in group_by))
                        key = (bucket["start_time"], *key[1:])
                        found[key] = [
                            result[name]
                            for name in ("input_tokens", "output_tokens", "num_model_requests")
                        ]
                page = answer["next_page"]
                if page is None:
                    break
            assert last == end
            assert found == expected


def test_a_database_that_fails_delays_rows_and_loses_none(database: Database) -> None:
    meter = Meter(database, PRICES)
    meter.record(Usage(project_id="p", model="m", request_id="req_1", prompt_tokens=3))
    with database.write() as session:
        session.execute(text("ALTER TABLE monthly_spend RENAME TO elsewhere"))
    with pytest.raises(OperationalError):
        meter.flush()
    with database.write() as session:
        assert session.scalars(select(UsageRecord)).all() == []
        session.execute(text("ALTER TABLE elsewhere RENAME TO monthly_spend"))
    meter.start().close()
    with database.read() as session:
        assert [row.prompt_tokens for row in session.scalars(select(UsageRecord))] == [3]


def test_training_is_billed_once(database: Database) -> None:
    project, _ = accounts.create_account(database, "trainer")
    with database.write() as session:
        session.add(
            Job(
                id="ftjob-1",
                project_id=project.id,
                status="succeeded",
                model="m",
                method={},
                hyperparameters={},
                options={},
                training_file="file-1",
                seed=1,
                integrations=[],
                result_files=[],
                trained_tokens=1000,
                finished_at=1_700_000_000,
            )
        )
    for _ in range(2):
        meter = Meter(database, PRICES)
        meter.flush()
        meter.flush()
    paid = usage.costs(database, usage.Range(1_699_990_000, 1_700_010_000, "1d", 7), ["line_item"])
    results = [result for bucket in paid["data"] for result in bucket["results"]]
    assert [(r["line_item"], r["quantity"]) for r in results] == [("m, training_tokens", 1000)]
    assert results[0]["amount"]["value"] == pytest.approx(0.003)


def test_the_thread_outlives_any_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "FLUSH_S", 0.01)
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 1:
            raise ValueError("not of the database")

    meter = Meter(database, PRICES).start(tick)
    deadline = time.monotonic() + 10
    while len(ticks) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    meter.close()
    assert len(ticks) >= 2

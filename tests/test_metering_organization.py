"""The spend limit of all accounts together, and the usage of embeddings and moderations."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from sqlalchemy import select
from tiny_models import tiny_tokenizer

from data import accounts, limits, organization_limits
from data.db import Database
from data.errors import QuotaExceeded
from data.metering import Meter, Usage
from data.settings import Limits, Prices
from data.tables_metering import MonthlySpend, UsageRecord
from serve.gate import Gate

PRICES = Prices(prompt=1000.0, cached=1000.0, completion=1000.0)  # ten tokens a cent
SUMS: Any = {"currency": "USD", "interval": "month"}
HELLO: Any = [{"role": "user", "content": "a"}]
HOUR_S = 3600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("organization")
    with running(tiny_settings(folder, prices=PRICES, min_examples=1)) as found:
        yield found


@pytest.fixture(scope="module")
def organization(server: Server) -> Any:
    _, key = accounts.create_admin_key(server.runtime.database)
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="", admin_api_key=key, max_retries=0
    )
    return server.clients.enter_context(client).admin.organization


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/hone.db")
    database.migrate()
    yield database
    database.close()


# ---- the gate ----


def test_money_of_all_accounts_counts_at_once_and_once(database: Database) -> None:
    """Two accounts spend 30 tenths of a cent together, however flushes and readings fall."""
    projects = [accounts.create_account(database, name)[0].id for name in ("one", "two")]
    with database.write() as session:  # of another month: no part of it
        session.add(MonthlySpend(project_id=projects[0], month="2020-01", cost=10**15))
    organization_limits.replace(database, 3)
    meter = Meter(database, PRICES)
    gate = Gate(database, meter, Limits(), "base", clock=lambda: 0.0)
    dice = random.Random(5)
    for i in range(30):
        project = dice.choice(projects)
        gate.admit(project, "base", 1, 1)
        gate.record(Usage(project, "base", f"req_{i}", completion_tokens=1))
        for act in dice.sample([meter.flush, gate.refresh], dice.randint(0, 2)):
            act()
    for project in [*projects, accounts.create_account(database, "idle")[0].id]:
        with pytest.raises(QuotaExceeded, match="all accounts together"):
            gate.admit(project, "base", 1, 1)
    meter.flush()
    assert organization_limits.get(database) == (3, 3)
    organization_limits.clear(database)
    gate.refresh()
    gate.admit(projects[0], "base", 1, 1)


def test_the_smaller_of_two_limits_holds(database: Database) -> None:
    one, two = (accounts.create_account(database, name)[0].id for name in ("one", "two"))
    limits.set_spend_limit(database, one, 1)
    organization_limits.replace(database, 100)
    meter = Meter(database, PRICES)
    gate = Gate(database, meter, Limits(), "base", clock=lambda: 0.0)
    gate.record(Usage(one, "base", "req_1", completion_tokens=10))
    with pytest.raises(QuotaExceeded, match=r"spend limit of 0\.01 USD"):
        gate.admit(one, "base", 1, 1)
    gate.admit(two, "base", 1, 1)


# ---- over HTTP ----


def codes(server: Server, client: openai.OpenAI, file_id: str) -> set[str | None]:
    """Return the error codes of one call of each kind that costs."""
    found: set[str | None] = set()
    for call in (
        lambda: client.completions.create(model=MODEL, prompt="a", max_tokens=1),
        lambda: client.completions.create(model=MODEL, prompt="a", max_tokens=1, stream=True),
        lambda: client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1),
        lambda: client.embeddings.create(model=MODEL, input="a"),
        lambda: client.fine_tuning.jobs.create(model=MODEL, training_file=file_id),
    ):
        try:
            call()  # type: ignore[no-untyped-call]
            found.add(None)
        except openai.RateLimitError as error:
            found.add(error.code)
    return found


def test_a_limit_for_everybody(server: Server, organization: Any) -> None:
    clients = [server.client(server.new_account(name)[1]) for name in ("first", "second")]
    content = b'{"prompt": "a", "completion": "b"}\n'
    files = [c.files.create(file=("a.jsonl", content), purpose="fine-tune").id for c in clients]
    limit = organization.spend_limit
    with pytest.raises(openai.NotFoundError):
        limit.retrieve()
    made = limit.update(**SUMS, threshold_amount=10**6)
    assert (made.threshold_amount, made.enforcement.status) == (10**6, "inactive")
    for client, file_id in zip(clients, files, strict=True):
        assert codes(server, client, file_id) == {None}
    assert limit.update(**SUMS, threshold_amount=0).enforcement.status == "enforcing"
    for client, file_id in zip(clients, files, strict=True):
        assert codes(server, client, file_id) == {"insufficient_quota"}
    assert limit.retrieve().enforcement.status == "enforcing"
    with pytest.raises(openai.RateLimitError, match="all accounts together") as caught:
        clients[0].completions.create(model=MODEL, prompt="a")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert clients[0].files.retrieve(files[0]).id == files[0]  # what costs nothing is answered
    assert limit.delete().deleted
    assert codes(server, clients[1], files[1]) == {None}
    with pytest.raises(openai.NotFoundError):
        limit.delete()
    kinds = ["spend_limit.updated", "spend_limit.deleted"]
    entries = organization.audit_logs.list(event_types=kinds).data
    assert [entry.type for entry in entries] == [kinds[1], kinds[0], kinds[0]]
    assert all(entry.actor.type == "api_key" for entry in entries)


def test_a_limit_set_by_another_process_holds_within_a_second(server: Server) -> None:
    client = server.client(server.new_account("elsewhere")[1])
    other = Database(server.runtime.settings.effective_database_url)
    try:
        organization_limits.replace(other, 0)
        time.sleep(1.0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
        organization_limits.clear(other)
        time.sleep(1.0)
        client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    finally:
        other.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"threshold_amount": -1}, "threshold_amount"),
        ({"threshold_amount": 1.5}, "threshold_amount"),
        ({"currency": "EUR"}, "currency"),
        ({"interval": "day"}, "interval"),
    ],
)
def test_wrong_limits_are_refused(organization: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        organization.spend_limit.update(**(SUMS | {"threshold_amount": 1} | fields))
    assert caught.value.param == param


def test_keys_of_accounts_may_not(server: Server) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = server.http().request(method, "/v1/organization/spend_limit", json={})
        assert answer.status_code == 403


# ---- usage of embeddings and moderations ----


def results(page: Any) -> list[Any]:
    return [result for bucket in page.data for result in bucket.results]


def test_usage_of_embeddings_and_moderations(server: Server, organization: Any) -> None:
    start, encode = int(time.time()) - HOUR_S, tiny_tokenizer().encode
    told: dict[tuple[str, str], list[int]] = {}
    projects = []
    for name in ("wordy", "terse"):
        project, key = server.new_account(name)
        projects.append(project.id)
        client = server.client(key)
        for text in ("grün", f"{name} and more", "grün"):  # the last is in the prefix cache
            usage = client.embeddings.create(model=MODEL, input=[text, "b"]).usage
            sums = told.setdefault(("embeddings", project.id), [0, 0])
            sums[0], sums[1] = sums[0] + usage.prompt_tokens, sums[1] + 1
            client.moderations.create(input=[text, "c"])
            sums = told.setdefault(("moderations", project.id), [0, 0])
            sums[0], sums[1] = sums[0] + len(encode(text)) + len(encode("c")), sums[1] + 1
    usage = organization.usage
    ask = {"start_time": start, "project_ids": projects, "group_by": ["project_id", "model"]}
    for kind, read in (("embeddings", usage.embeddings), ("moderations", usage.moderations)):
        found = results(read(**ask))
        assert {r.object for r in found} == {f"organization.usage.{kind}.result"}
        assert {(kind, r.project_id): [r.input_tokens, r.num_model_requests] for r in found} == {
            group: sums for group, sums in told.items() if group[0] == kind
        }
        whole = results(read(start_time=start, project_ids=projects))
        assert [r.input_tokens for r in whole] == [sum(r.input_tokens for r in found)]
        assert (whole[0].project_id, whole[0].model) == (None, None)
        assert results(read(start_time=start, project_ids=projects, models=["absent"])) == []
    assert results(usage.completions(start_time=start, project_ids=projects)) == []
    check_costs(server, organization, projects, told)


def check_costs(
    server: Server, organization: Any, projects: list[str], told: dict[tuple[str, str], list[int]]
) -> None:
    """Embeddings cost their tokens, moderation nothing."""
    start = int(time.time()) - HOUR_S
    page = organization.usage.costs(start_time=start, project_ids=projects, group_by=["project_id"])
    spent: dict[str, float] = {}
    for result in results(page):
        spent[result.project_id] = spent.get(result.project_id, 0.0) + result.amount.value
    expected = {p: told["embeddings", p][0] * PRICES.prompt / 1e6 for p in projects}
    assert spent == pytest.approx(expected)
    with server.runtime.database.read() as session:
        query = select(UsageRecord).where(UsageRecord.kind == "moderations")
        records = session.scalars(query.where(UsageRecord.project_id.in_(projects))).all()
    assert len(records) == 6
    assert {(r.prompt_cost, r.cached_cost, r.completion_cost) for r in records} == {(0, 0, 0)}


@pytest.mark.parametrize("kind", ["embeddings", "moderations"])
def test_what_cannot_be_asked_of_them(organization: Any, kind: str) -> None:
    read = getattr(organization.usage, kind)
    for wrong in ({"group_by": ["batch"]}, {"bucket_width": "1y"}, {"limit": 32}):
        with pytest.raises(openai.BadRequestError) as caught:
            read(start_time=1, **wrong)
        assert str(caught.value.param).startswith(next(iter(wrong)))

"""Who may begin: limits of base and adapter together, money before the ledger has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data import accounts, limits
from data.db import Database
from data.errors import QuotaExceeded, RateLimited
from data.metering import Meter, Usage
from data.settings import Limits, Prices
from data.tables_metering import RateLimit
from serve.gate import Gate

BASE, ALIAS = "base", "ft:base:acme:tone"
VERSION = f"{ALIAS}:abcd1234"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/hone.db")
    database.migrate()
    yield database
    database.close()


def gate(database: Database, meter: Meter | None = None, **defaults: int) -> Gate:
    meter = meter or Meter(database, Prices())
    return Gate(database, meter, Limits(**defaults), BASE, clock=lambda: 0.0)


def admitted(gate: Gate, project_id: str, model: str, tries: int = 20) -> int:
    count = 0
    for _ in range(tries):
        try:
            gate.admit(project_id, model, 1, 1)
        except RateLimited:
            break
        count += 1
    return count


def test_an_adapter_has_its_own_limit_and_counts_for_the_base(database: Database) -> None:
    project, _ = accounts.create_account(database, "acme")
    with database.write() as session:
        session.add(RateLimit(project_id=project.id, model=ALIAS, requests_per_minute=3))
    both = gate(database, requests_per_minute=10)
    assert admitted(both, project.id, VERSION) == 3
    assert admitted(both, project.id, f"{VERSION}:ckpt-step-20") == 0  # of the same alias
    assert admitted(both, project.id, BASE) == 7
    assert admitted(both, "proj_other", VERSION) == 10  # the limit is one account's


def test_a_limit_changed_elsewhere_holds_after_a_refresh(database: Database) -> None:
    project, _ = accounts.create_account(database, "acme")
    seen = gate(database)
    assert admitted(seen, project.id, BASE) == 20
    changes = {"requests_per_minute": 2, "requests_per_day": None}
    limits.update_rate(database, project.id, f"rl-{BASE}", BASE, Limits(), changes)
    seen.refresh()
    assert admitted(seen, project.id, BASE) == 2


def test_money_counts_at_once_and_once(database: Database) -> None:
    project, _ = accounts.create_account(database, "acme")
    limits.set_spend_limit(database, project.id, 1)  # a cent
    meter = Meter(database, Prices(completion=1000.0))  # ten tokens a cent
    seen = gate(database, meter)
    for i in range(10):
        seen.admit(project.id, BASE, 1, 1)
        if i % 3 == 1:
            meter.flush()
        if i % 3 == 2:
            seen.refresh()
        usage = Usage(project.id, BASE, f"req_{i}", completion_tokens=1, end_user="a\0b")
        seen.record(usage)
    for _ in range(2):
        with pytest.raises(QuotaExceeded):
            seen.admit(project.id, BASE, 1, 1)
        meter.flush()
        seen.refresh()
    assert limits.get_spend_limit(database, project.id) == (1, 1)

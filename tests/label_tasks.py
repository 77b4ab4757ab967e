"""An account with a labeling project of pairs, straight in the database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data import accounts
from data.db import Database
from data.feedback import leases, projects, tasks
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.tables_feedback import Assignment


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(f"sqlite:///{tmp_path / 'hone.db'}")
    made.migrate()
    return made


@pytest.fixture
def account(database: Database) -> str:
    return accounts.create_account(database, "acme")[0].id


def pair(index: int, **values: Any) -> TaskSpec:
    candidates = [CandidateSpec(f"good {index}", "m1"), CandidateSpec(f"bad {index} longer", "m2")]
    return TaskSpec(f"question {index}", candidates, **values)


def gold(index: int, **values: Any) -> TaskSpec:
    return pair(index, gold={"choice": "A"}, **values)


def make(database: Database, account: str, count: int, specs: Any = (), **values: Any) -> str:
    spec = ProjectSpec(**({"name": "p", "kind": "pairwise"} | values))
    made = projects.create(database, account, spec)
    tasks.add(database, account, made.id, [*(pair(i) for i in range(count)), *specs])
    return made.id


def expire(database: Database, assignment_id: str) -> None:
    with database.write() as session:
        session.get_one(Assignment, assignment_id).expires_at = 1


def letter(shown: leases.Shown, word: str) -> str:
    return next(option.key for option in shown.options if option.text.startswith(word))

"""A round's sampling is held to the account's limits, and waits where time helps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from api_server import MODEL, running, tiny_settings
from sqlalchemy import func, select

from data import limits, safety
from data.feedback import projects, rounds
from data.feedback.projects import ProjectSpec
from data.tables import new_id
from data.tables_feedback import LabelRound
from data.tables_metering import UsageRecord
from serve import round_runner


def test_what_refuses_for_a_time_fails_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_runner, "POLL_S", 0.05)
    with running(tiny_settings(tmp_path)) as server:
        runtime, owner = server.runtime, server.project.id
        database, base = runtime.database, runtime.models.base_model

        def limit(requests: int) -> None:
            changes = {"requests_per_day": requests}
            given = (base, runtime.settings.limits, changes)
            limits.update_rate(database, owner, f"rl-{base}", *given)
            runtime.gate.refresh()

        def used() -> int:
            runtime.meter.flush()
            with database.read() as session:
                query = select(func.sum(UsageRecord.requests))
                return session.scalar(query.where(UsageRecord.project_id == owner)) or 0

        limit(1)
        labeling = projects.create(database, owner, ProjectSpec("p", "pairwise"))
        one = LabelRound(
            id=new_id("lround-"),
            project_id=owner,
            label_project_id=labeling.id,
            file_id="file-x",
            training_file="file-x",
            method="dpo",
            status="sampling",
            model=MODEL,
            candidate=MODEL,
            suffix="s",
            rule={},
            prompts=["one", "two", "three"],
            options={"seed": 1, "base": MODEL},
        )
        with database.write() as session:
            session.add(one)
        deadline = time.monotonic() + 30
        while not used():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        assert rounds.get(database, owner, one.id).status == "sampling"
        assert used() == 1
        safety.suspend(database, owner, "For the test.")
        assert rounds.under_way(database) == []
        safety.reinstate(database, owner)
        limit(100)
        while rounds.get(database, owner, one.id).status == "sampling":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert rounds.get(database, owner, one.id).status == "rejected"  # the same answers
        assert 3 <= used() <= 4  # those that were kept are not asked again

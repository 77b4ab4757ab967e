"""Labelers over HTTP while their server is killed: what was acknowledged is there, once. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

PROGRAM = Path(__file__).parents[1] / "benchmarks/label_crowd.py"
TASKS, OVERLAP = 120, 3

pytestmark = pytest.mark.slow


def test_nothing_is_lost_or_repeated_through_kill_9(tmp_path: Path) -> None:
    home = tmp_path / "home"
    words = ["--labelers", "20", "--tasks", str(TASKS), "--kills", "2", "--home", str(home)]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["acknowledged"] == TASKS * OVERLAP
    assert told["sent_again"] > 0  # the server was away while they worked
    engine = create_engine(f"sqlite:///{home / 'hone.db'}")
    with engine.connect() as connection:
        query = "SELECT task_id, labeler FROM label_judgements WHERE kind = 'answer' AND counts"
        kept = connection.execute(text(query)).all()
        held = connection.execute(
            text("SELECT count(*) FROM label_assignments WHERE state = 'leased'")
        ).scalar_one()
    engine.dispose()
    assert max(Counter(map(tuple, kept)).values()) == 1
    by_task = Counter(row.task_id for row in kept)
    assert (len(by_task), set(by_task.values())) == (TASKS, {OVERLAP})
    assert held == 0

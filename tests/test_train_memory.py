"""What is said of memory: the limit that holds, and advice that a run can follow."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from train import exit_cause
from train.exit_cause import cause_of_exit, memory_limit
from train.run import RunFolder

UNLIMITED = str((1 << 63) - 4096)  # as version 1 says it


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"memory.max": "max", "a/memory.max": "3000", "a/b/memory.max": "max"}, "0::/a/b", 3000),
        ({"a/memory.max": "3000", "a/b/memory.max": "2000"}, "0::/a/b", 2000),
        ({"memory.max": "1000"}, "0::/", 1000),
        ({"memory/memory.limit_in_bytes": "5000"}, "5:cpu:/x\n4:memory:/gone\n0::/", 5000),
        ({"memory/a/memory.limit_in_bytes": UNLIMITED}, "4:memory:/a", int(UNLIMITED)),
        ({"memory.max": "max"}, "0::/", None),
        ({}, "1:name=systemd:/", None),
    ],
)
def test_the_least_limit_around_the_process(
    tmp_path: Path, files: dict[str, str], own: str, limit: int | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "own") == limit


@pytest.mark.parametrize(
    ("length", "advice"),
    [
        (4096, "max_seq_length is 4096, and a row goes through the model whole"),
        (60, "a step goes through the model 1024 tokens at a time, whatever its batch_size"),
    ],
)
def test_the_advice_fits_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, advice: str
) -> None:
    monkeypatch.setattr(exit_cause, "memory_limit", lambda: 1_000_000)
    run = RunFolder(tmp_path)
    run.log.write_text("")
    plan = {"max_length": length, "micro_batch_tokens": 1024}
    run.resolved.write_text(json.dumps({"plan": plan}))
    cause = cause_of_exit(run, 128 + signal.SIGKILL, 0)
    assert cause.killed
    assert "its cgroup may use 0.0 GB" in cause.message
    assert advice in cause.message

"""The embedded worker is restarted when it dies and never outlives the server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data.settings import Settings, load_settings
from serve import worker_process
from serve.worker_process import WorkerProcess, as_words

# A worker that notes its pid, and notes that it was asked to stop.
STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / f"stopped-{os.getpid()}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / f"started-{os.getpid()}").write_text(repr(sys.argv[2:]))
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stand_in_worker.py").write_text(STAND_IN)
    return tmp_path


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "serve.child", "stand_in_worker", str(folder)]


def test_the_settings_are_on_no_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    settings = Settings(database_url="postgresql+psycopg://hone:quokka@db/hone")

    async def work() -> None:
        worker = WorkerProcess(settings)
        assert worker._command[-2:] == ["-", "train.worker"]
        worker._command = [*worker._command[:-1], "stand_in_worker", str(folder)]
        worker.start()
        await eventually(lambda: any(p.read_text() for p in folder.glob("started-*")))
        (pid,) = pids(folder, "started")
        assert "quokka" not in " ".join(psutil.Process(pid).cmdline())
        assert (folder / f"started-{pid}").read_text() == repr(as_words(settings))
        await worker.stop()
        assert pids(folder, "stopped") == {pid}

    asyncio.run(work())


def pids(folder: Path, what: str) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in folder.glob(f"{what}-*")}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def eventually(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, condition)


def test_restarted_when_killed_and_stopped_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(worker_process, "FIRST_DELAY_S", 0.01)

    async def work() -> None:
        worker = WorkerProcess(Settings())
        worker._command = command(folder)
        worker.start()
        await eventually(lambda: len(pids(folder, "started")) == 1)
        (first,) = pids(folder, "started")
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: len(pids(folder, "started")) == 2)
        await worker.stop()
        assert pids(folder, "stopped") == pids(folder, "started") - {first}

    asyncio.run(work())


def test_stops_when_the_server_is_killed(folder: Path) -> None:
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, time\n"
            f"child = subprocess.Popen({command(folder)!r}, stdin=subprocess.PIPE)\n"
            "time.sleep(60)",
        ],
        env={**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}"},
    )
    try:
        wait_for(lambda: len(pids(folder, "started")) == 1)
    finally:
        server.kill()
        server.wait()
    wait_for(lambda: pids(folder, "stopped") == pids(folder, "started"))


def test_settings_survive_the_trip_to_the_worker(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "a b", model="x/y", lease_s=1.5, port=0, max_context=64)
    assert load_settings(overrides=as_words(settings), environ={}) == settings

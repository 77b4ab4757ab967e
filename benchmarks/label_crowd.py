"""Labelers at work in parallel over HTTP while their server is killed, again and again.

Each labeler has a key and a thread, takes tasks, answers or skips them, and sends again what got
no answer. Now and then the server is ended as kill -9 does and started anew. Afterwards the
database is held against what the server had acknowledged: a task above its overlap, a labeler with
one task twice, or a judgement that is not there ends the program with an error.

    python benchmarks/label_crowd.py
    python benchmarks/label_crowd.py --labelers 5 --tasks 60 --kills 1

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import select

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_models import save_tiny_base

from data import accounts
from data.db import Database
from data.feedback import projects, tasks
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.settings import Settings
from data.tables_feedback import Judgement, LabelTask
from serve.background import free_port

START_LIMIT_S = 120
AGAIN_S = 0.1  # until a labeler asks again
SKIPS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labelers", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--overlap", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--home", type=Path, help="HONE_HOME to keep; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(arguments, arguments.home or Path(scratch) / "home"), indent=2))


@dataclass
class Crowd:
    """What the labelers know of each other."""

    url: str
    label_project: str
    acknowledged: list[tuple[str, str, str]] = field(default_factory=list)  # who, task, judgement
    sent_again: int = 0
    faults: list[str] = field(default_factory=list)


class Server:
    """A `hone serve` on one port, which can be killed and started anew."""

    def __init__(self, home: Path, model: Path):
        self.port = free_port()
        self.log = home / "server.log"
        words = [f"home={home}", f"port={self.port}", f"model={model}", "dtype=float32"]
        self._words = [*words, "embedded_worker=false", "kv_cache_mb=64"]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve.child", "serve.cli", "serve", *self._words],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(AGAIN_S)
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The server did not get ready; see {self.log}")

    def kill(self) -> None:
        """End it as kill -9 does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Let the labelers work, and hold the database against what they were told."""
    home.mkdir(parents=True, exist_ok=True)
    database = Database(Settings(home=home).effective_database_url)
    database.migrate()
    account = accounts.create_account(database, "crowd")[0].id
    made = projects.create(
        database, account, ProjectSpec("crowd", "pairwise", overlap=arguments.overlap)
    )
    pairs = [
        TaskSpec(f"question {i}", [CandidateSpec(f"good {i}"), CandidateSpec(f"bad {i}")])
        for i in range(arguments.tasks)
    ]
    tasks.add(database, account, made.id, pairs)
    keys = [
        accounts.create_key(database, account, f"labeler-{i}", role="labeler")[1]
        for i in range(arguments.labelers)
    ]
    server = Server(home, save_tiny_base(home / "tiny", "llama"))
    crowd = Crowd(f"http://127.0.0.1:{server.port}/v1", made.id)
    threads = [threading.Thread(target=work, args=(crowd, key)) for key in keys]
    began, down_s = time.monotonic(), 0.0
    try:
        for thread in threads:
            thread.start()
        total = arguments.tasks * arguments.overlap
        for number in range(1, arguments.kills + 1):
            while len(crowd.acknowledged) < total * number / (arguments.kills + 1):
                if crowd.faults or not any(thread.is_alive() for thread in threads):
                    raise SystemExit(f"The labelers stopped early: {crowd.faults}")
                time.sleep(0.01)
            killed = time.monotonic()
            server.kill()
            server.start()
            down_s += time.monotonic() - killed
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    finally:
        server.kill()
    wrong = [*crowd.faults, *audit(database, crowd, arguments.tasks, arguments.overlap)]
    database.close()
    if wrong:
        raise SystemExit("\n".join(wrong))
    return {
        "labelers": arguments.labelers,
        "tasks": arguments.tasks,
        "overlap": arguments.overlap,
        "kills": arguments.kills,
        "judgements": total,
        "acknowledged": len(crowd.acknowledged),
        "sent_again": crowd.sent_again,
        "seconds": round(seconds, 1),
        "seconds_without_server": round(down_s, 1),
        "judgements_a_second": round(total / (seconds - down_s), 1),
        "above_overlap": 0,
        "repeats": 0,
        "lost": 0,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
        },
    }


def work(crowd: Crowd, key: str) -> None:
    """Label until nothing is wanted any more."""
    draw = random.Random(key)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=crowd.url, headers=headers, timeout=60) as http:
        query = {"label_project_id": crowd.label_project}
        try:
            while True:
                shown = send(crowd, http, "GET", "/comparisons/next", params=query)["comparison"]
                if shown is None:
                    left = send(crowd, http, "GET", "/comparisons/progress", params=query)
                    if not left["wanted"]:
                        return
                    time.sleep(AGAIN_S)  # somebody may skip what they have in hand
                    continue
                path = f"/comparisons/{shown['id']}"
                if draw.random() < SKIPS:
                    send(crowd, http, "POST", f"{path}/skip", json={"reason": "hard"})
                    continue
                good = next(o["key"] for o in shown["options"] if o["text"].startswith("good"))
                told = send(crowd, http, "POST", path, json={"choice": good})
                crowd.acknowledged.append((key, shown["task_id"], told["id"]))
        except Exception as error:  # noqa: BLE001 - told by the main thread
            crowd.faults.append(f"{type(error).__name__}: {error}")


def send(crowd: Crowd, http: httpx.Client, method: str, path: str, **given: Any) -> Any:
    """Send a request until it is answered; raises ValueError at an error that the server tells."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            answer = http.request(method, path, **given)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            crowd.sent_again += 1
            time.sleep(AGAIN_S)
            continue
        if answer.status_code != 200:
            raise ValueError(f"{method} {path} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()


def audit(database: Database, crowd: Crowd, count: int, overlap: int) -> list[str]:
    """Return what the database has wrong, by the labelers' own record."""
    with database.read() as session:
        kept = session.scalars(select(Judgement).where(Judgement.kind == "answer")).all()
        found = session.scalars(select(LabelTask)).all()
    wrong = []
    by_task = Counter(judgement.task_id for judgement in kept if judgement.counts)
    repeats = [pair for pair, n in Counter((j.labeler, j.task_id) for j in kept).items() if n > 1]
    ids = {judgement.id for judgement in kept}
    lost = [entry for entry in crowd.acknowledged if entry[2] not in ids]
    above = [task for task, judged in by_task.items() if judged > overlap]
    below = [task.id for task in found if by_task[task.id] < overlap]
    if above or below:
        wrong.append(f"{len(above)} tasks above their overlap, {len(below)} below")
    if repeats:
        wrong.append(f"{len(repeats)} tasks were judged twice by the same labeler")
    if lost:
        wrong.append(f"{len(lost)} judgements that were acknowledged are not there")
    if len(kept) != count * overlap or len(crowd.acknowledged) != len(kept):
        wrong.append(
            f"{len(kept)} answers of {count * overlap}; {len(crowd.acknowledged)} acknowledged"
        )
    if any((task.judged, task.leased, task.status) != (overlap, 0, "done") for task in found):
        wrong.append("tasks whose counters are not those of their judgements")
    return wrong


if __name__ == "__main__":
    main()

"""How long the pages of labeling take to come from a real server, one person at a time.

A labeler and an admin sign in to a server over a tiny base model. The project has many tasks, of
which others have judged a good part, and the labeler works through the rest by form: the answer is
sent, and the redirect followed to the next task, as a browser does. Times are those of an HTTP
client on the same machine; what a browser needs to draw the page comes on top.

    python benchmarks/web_pages.py
    python benchmarks/web_pages.py --tasks 2000 --turns 400 --kind edit

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import html
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny_models import save_tiny_base

from data import accounts, people
from data.db import Database
from data.feedback import judgements, leases, projects, tasks
from data.feedback.judgements import Answer
from data.feedback.projects import ProjectSpec
from data.feedback.tasks import CandidateSpec, TaskSpec
from data.settings import Settings
from serve.background import running_server

PASSWORD = "a long enough password"
TEXT = "An answer of the usual length, which says what was asked and a little more. " * 6
GUIDELINES = "# What to look for\n\n1. Is it **true**?\n2. Is it *kind*?\n" * 5
OTHERS = 3
WARM = 10  # turns that are not counted

Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--judged", type=int, default=900, help="by others, before")
    parser.add_argument("--turns", type=int, default=200, help="answers that are timed")
    parser.add_argument("--kind", choices=("pairwise", "edit"), default="pairwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(arguments, Path(scratch)), indent=2))


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Fill a project, serve it, and visit its pages."""
    home, model = scratch / "home", save_tiny_base(scratch / "tiny", "llama")
    database = Database(Settings(home=home).effective_database_url)
    database.migrate()
    account = accounts.create_account(database, "pages")[0].id
    for role in ("labeler", "admin"):
        people.create(database, account, role, role, role, PASSWORD)
    project = fill(database, account, arguments)
    database.close()
    words = [f"model={model}", "dtype=float32", "embedded_worker=false", "kv_cache_mb=64"]
    with running_server(home, words) as url:
        times = visit(url.removesuffix("/v1"), project, arguments)
    return {
        "project": {"kind": arguments.kind, "tasks": arguments.tasks, "judged": arguments.judged},
        "pages_ms": {
            name: {
                "median": round(1000 * statistics.median(found), 1),
                "p95": round(1000 * sorted(found)[int(0.95 * len(found))], 1),
                "count": len(found),
            }
            for name, found in times.items()
        },
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
        },
    }


def fill(database: Database, account: str, arguments: argparse.Namespace) -> str:
    """Make the project, and have others judge a part of it."""
    kind = arguments.kind
    spec = ProjectSpec("Pages", kind, overlap=OTHERS + 1, guidelines=GUIDELINES)
    made = projects.create(database, account, spec)
    count = 2 if kind == "pairwise" else 1
    given = [
        TaskSpec(f"question {i}", [CandidateSpec(f"{TEXT}{i} {n}") for n in range(count)])
        for i in range(arguments.tasks)
    ]
    tasks.add(database, account, made.id, given)
    for number in range(arguments.judged):
        name = f"other-{number % OTHERS}"
        shown = leases.next_task(database, account, made.id, name)
        if shown is None:
            break
        answer = Answer(choice="AB"[number % 2]) if count == 2 else Answer(text=f"better {number}")
        judgements.submit(database, account, shown.assignment_id, name, answer)
    return made.id


def visit(url: str, project: str, arguments: argparse.Namespace) -> Times:
    """Time the pages of a labeler and of an admin."""
    times: Times = defaultdict(list)

    def timed(name: str, http: httpx.Client, path: str, form: Any = None) -> httpx.Response:
        began = time.perf_counter()
        if form is None:
            answer = http.get(path)
        else:
            answer = http.post(path, data=form, headers={"origin": url})
        times[name].append(time.perf_counter() - began)
        if answer.status_code not in (200, 303):
            raise SystemExit(f"{path} answered {answer.status_code}: {answer.text[:500]}")
        return answer

    label = f"/web/label/{project}"
    for role in ("labeler", "admin"):
        with httpx.Client(base_url=url, timeout=60) as http:
            timed("sign in", http, "/web/login", {"login": role, "password": PASSWORD})
            if role == "labeler":
                text = timed("next task", http, label).text
                for turn in range(WARM + arguments.turns):
                    began = time.perf_counter()
                    path, form = read_form(text, turn)
                    there = timed("answer (redirect)", http, path, form).headers["location"]
                    text = timed("next task", http, there).text
                    times["answer and next task"].append(time.perf_counter() - began)
                for name in ("next task", "answer (redirect)", "answer and next task"):
                    del times[name][:WARM]
            for _ in range(20):
                timed("list of projects", http, "/web/")
                timed("own progress", http, f"{label}/progress")
                timed("guidelines", http, f"{label}/guidelines")
            for _ in range(5 if role == "admin" else 0):
                timed("report", http, f"/web/projects/{project}")
                timed("disagreements", http, f"/web/projects/{project}/disagreements")
    return times


def read_form(text: str, turn: int) -> tuple[str, dict[str, str]]:
    """Return where the task's form goes, and an answer."""
    action = re.search(r'id="task"[^>]*action="([^"]*)"', text)
    if action is None:
        raise SystemExit("There are no more tasks; ask for fewer --turns or more --tasks.")
    timings = {"first_input_ms": "900", "active_ms": "1500", "total_ms": "2000"}
    if 'data-kind="edit"' in text:
        return html.unescape(action[1]), {"text": f"a better answer {turn}", **timings}
    return html.unescape(action[1]), {"choice": "AB"[turn % 2], **timings}


if __name__ == "__main__":
    main()

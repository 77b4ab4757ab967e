"""A round of feedback on the real model: judgements in, a model in use out, all over HTTP.

Starts a server with its worker, samples two answers to each message of a customer, has a simulated
labeler judge them (it likes the shorter answer), starts a round, has the same labeler judge the
blind comparison, and tells what became of it. Whether the round learned what was liked shows in a
number that it never saw: the length of the answers to the prompts held out.

    python benchmarks/feedback_round.py
    python benchmarks/feedback_round.py --method ppo --comparisons 200
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from data.accounts import create_account
from data.db import Database
from data.settings import load_settings
from serve.background import running_server

MESSAGES = Path(__file__).parent.parent / "examples/support_intents/train.jsonl"
CLIENTS = 16
POLL_S = 2.0
ENDED = ("promoted", "rejected", "failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("dpo", "ppo"), default="dpo")
    parser.add_argument("--comparisons", type=int, default=200, help="judged before the round")
    parser.add_argument("--held-out", type=int, default=40, help="prompts of the blind comparison")
    parser.add_argument("--epochs", type=int, default=2, help="of the policy's job")
    parser.add_argument("--learning-rate-multiplier", type=float, default=4.0)
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answers judged")
    parser.add_argument("--home", type=Path, help="HONE_HOME to use; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(arguments, arguments.home or Path(scratch)), indent=2))


def run(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Do the whole turn."""
    settings = load_settings(overrides=[f"home={home}"])
    database = Database(settings.effective_database_url)
    database.migrate()
    _, key = create_account(database, f"round-{int(time.time())}")
    database.close()
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        seconds[name] = round(time.monotonic() - began - sum(seconds.values()), 1)
        print(f"{name}: {seconds[name]} s", file=sys.stderr)

    headers = {"authorization": f"Bearer {key}"}
    with (
        running_server(home) as base_url,
        httpx.Client(base_url=base_url, headers=headers, timeout=600) as http,
    ):
        lap("start")
        base = get(http, "/models")["data"][0]["id"]
        rows = [json.loads(line) for line in MESSAGES.read_text("utf-8").splitlines()]
        messages = list({row["prompt"].removesuffix("\n\nIntent:"): None for row in rows})
        tasks = candidates(http, base, messages[: arguments.comparisons], arguments.max_tokens)
        lap("sampling of what is judged")
        labeling = post(http, "/label_projects", name="short", kind="pairwise")["id"]
        post(http, f"/label_projects/{labeling}/tasks", tasks=tasks)
        judged = judge(http, labeling)
        lap("judging")
        learning = {
            "n_epochs": arguments.epochs,
            "learning_rate_multiplier": arguments.learning_rate_multiplier,
        }
        hyperparameters: dict[str, Any] = {arguments.method: learning}
        started = post(
            http,
            "/label_rounds",
            label_project_id=labeling,
            model=base,
            method=arguments.method,
            suffix="short",
            comparisons=arguments.held_out,
            hyperparameters=hyperparameters,
        )
        found, status = started, started["status"]
        while found["status"] not in ("comparing", *ENDED):
            time.sleep(POLL_S)
            found = get(http, f"/label_rounds/{started['id']}")
            if found["status"] != status:
                lap(status)
                status = found["status"]
        lengths: dict[str, list[int]] = {"old": [], "new": []}
        if status == "comparing":
            judge(http, found["comparison_id"])
            raw = post(http, f"/label_projects/{found['comparison_id']}/export", kind="raw")
            lengths = answer_lengths(http, raw["id"], found["candidate"])
            while found["status"] not in ENDED:
                time.sleep(POLL_S)
                found = get(http, f"/label_rounds/{started['id']}")
            lap("comparing")
        served = None
        if found["status"] == "promoted":
            alias = found["candidate"].rpartition(":")[0]
            served = ask(http, alias, messages[0], arguments.max_tokens, temperature=0)
    return {
        "method": arguments.method,
        "judgements": judged,
        "status": found["status"],
        "decision": found["decision"],
        "error": found["error"],
        "mean_characters": {
            name: round(statistics.mean(values), 1) for name, values in lengths.items() if values
        },
        "answer_of_the_alias": served,
        "seconds": seconds,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
        },
    }


def candidates(
    http: httpx.Client, model: str, messages: list[str], max_tokens: int
) -> list[dict[str, Any]]:
    """Return tasks: each message with two different answers of the model."""

    def two(message: str) -> dict[str, Any] | None:
        body = {"temperature": 1.0, "n": 2, "seed": 1}
        texts = ask(http, model, message, max_tokens, **body)
        if len(set(texts)) < 2 or not all(text.strip() for text in texts):
            return None
        return {"prompt": [{"role": "user", "content": message}], "candidates": texts}

    with ThreadPoolExecutor(CLIENTS // 2) as pool:
        return [task for task in pool.map(two, messages) if task is not None]


def ask(http: httpx.Client, model: str, message: str, max_tokens: int, **fields: Any) -> list[str]:
    """Return the model's answers."""
    asked = [{"role": "user", "content": message}]
    body = {"model": model, "messages": asked, "max_tokens": max_tokens, **fields}
    choices = post(http, "/chat/completions", **body)["choices"]
    return [choice["message"]["content"] for choice in choices]


def judge(http: httpx.Client, label_project: str) -> int:
    """Be the labeler: choose the shorter answer of every task; returns how many there were."""
    count = 0
    while True:
        found = get(http, f"/comparisons/next?label_project_id={label_project}")
        shown = found["comparison"]
        if shown is None:
            return count
        lengths = {option["key"]: len(option["text"]) for option in shown["options"]}
        choice = min(lengths, key=lambda letter: lengths[letter])
        if len(set(lengths.values())) == 1:
            choice = "tie"
        post(http, f"/comparisons/{shown['id']}", choice=choice)
        count += 1


def answer_lengths(http: httpx.Client, file_id: str, new: str) -> dict[str, list[int]]:
    """Return the characters of the answers compared, of the old and the new model."""
    lengths: dict[str, list[int]] = {"old": [], "new": []}
    answer = http.get(f"/files/{file_id}/content")
    answer.raise_for_status()
    for line in answer.text.splitlines():
        for candidate in json.loads(line)["candidates"]:
            lengths["new" if candidate["model"] == new else "old"].append(len(candidate["text"]))
    return lengths


def get(http: httpx.Client, path: str) -> Any:
    """Return what a GET answers; raises SystemExit with the error's text."""
    answer = http.get(path)
    if answer.status_code != 200:
        raise SystemExit(f"{path} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    """Return what a POST answers; raises SystemExit with the error's text."""
    answer = http.post(path, json=body)
    if answer.status_code != 200:
        raise SystemExit(f"{path} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


if __name__ == "__main__":
    main()

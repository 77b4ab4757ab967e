"""64 clients at once over files, jobs and completions, against a real `hone serve`.

Each client draws what to do next: a completion, the life of a file (upload, read, list, delete),
or the life of a job (create, read, list, cancel; no worker runs), a third each, without pauses.
The clients join over the first half minute.
Afterwards the engine alone, without a server, is given the completions' work.

    python benchmarks/load.py --minutes 10
    python benchmarks/load.py --minutes 1 --model tiny
    python benchmarks/load.py --minutes 2 --only completions

With `--only completions` the server does nothing else, so that the ratio of its output tokens a
second to the engine's is what HTTP costs; both are counted while all clients are there.

Prints one JSON object last. An error that says when to try again (429 or 503 with `retry-after`)
is announced and does not count as one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "peers"), str(HERE.parent / "tests")]

from http_load import free_port, server  # noqa: E402

from data import accounts  # noqa: E402
from data.db import Database  # noqa: E402
from data.settings import Settings, load_settings  # noqa: E402

CLIENTS = 64
ACCOUNTS = 4
JOIN_S = 30.0  # over which the clients come, one after another
OUTPUT_TOKENS = 32
ENGINE_REQUESTS = 256
PROMPT_TOKENS = 75
TOKEN_IDS = {"tiny": (3, 250)}  # that prompts are drawn from
COMMON_TOKEN_IDS = (100, 40_000)
LATER = (429, 503)
MIB = 2**20
ROWS = b"".join(
    json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}).encode() + b"\n"
    for i in range(20)
)


KINDS = ("completions", "files", "jobs")


@dataclass
class Seen:
    """What all clients met."""

    answers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    announced: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # when, how many


class Client:
    """One of the clients."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        key: str,
        model: str,
        seed: int,
        seen: Seen,
        kinds: tuple[str, ...] = KINDS,
    ):
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"}
        self._model = model
        self._draw = random.Random(seed)
        self._seen = seen
        lives = {"completions": self._complete, "files": self._file, "jobs": self._job}
        self._lives = [lives[kind] for kind in kinds]

    async def run(self, wait_s: float, until: float) -> None:
        """Wait, then do one thing after another until this time."""
        await asyncio.sleep(wait_s)
        while time.monotonic() < until:
            await self._draw.choice(self._lives)()

    async def _complete(self) -> None:
        fields = {"model": self._model, "prompt": prompt(self._draw, self._model)}
        fields |= {"max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = await self._ask("completion", "POST", "/completions", json=fields)
        if answer is not None:
            self._seen.tokens.append((time.monotonic(), answer["usage"]["completion_tokens"]))

    async def _file(self) -> None:
        file = await self._upload()
        if file is not None:
            path = f"/files/{file['id']}"
            await self._ask("file.retrieve", "GET", path)
            await self._ask("file.list", "GET", "/files?limit=20")
            await self._ask("file.content", "GET", f"{path}/content")
            await self._ask("file.delete", "DELETE", path)

    async def _job(self) -> None:
        file = await self._upload()
        if file is None:
            return
        fields = {"model": self._model, "training_file": file["id"]}
        job = await self._ask("job.create", "POST", "/fine_tuning/jobs", json=fields)
        if job is not None:
            path = f"/fine_tuning/jobs/{job['id']}"
            await self._ask("job.retrieve", "GET", path)
            await self._ask("job.list", "GET", "/fine_tuning/jobs")
            await self._ask("job.cancel", "POST", f"{path}/cancel")
            await self._ask("job.events", "GET", f"{path}/events")
        await self._ask("file.delete", "DELETE", f"/files/{file['id']}")

    async def _upload(self) -> Any:
        parts = {"file": ("rows.jsonl", ROWS)}
        return await self._ask(
            "file.create", "POST", "/files", files=parts, data={"purpose": "fine-tune"}
        )

    async def _ask(self, name: str, method: str, path: str, **body: Any) -> Any:
        """Send a request until it is answered; returns the answer, None after an error."""
        while True:
            started = time.monotonic()
            try:
                answer = await self._http.request(method, path, headers=self._headers, **body)
            except httpx.HTTPError as error:
                self._seen.errors[f"{name}: {type(error).__name__}"] += 1
                return None
            self._seen.seconds.setdefault(name, []).append(time.monotonic() - started)
            if answer.status_code == 200:
                self._seen.answers[name] += 1
                return answer.json() if name != "file.content" else None
            kind = f"{name}: {answer.status_code} {answer.json()['error']['code']}"
            if answer.status_code not in LATER or "retry-after" not in answer.headers:
                self._seen.errors[kind] += 1
                return None
            self._seen.announced[kind] += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))


def prompt(draw: random.Random, model: str) -> list[int]:
    """Return token ids that nobody sent before, so that no prefix is known."""
    ids = TOKEN_IDS.get(model, COMMON_TOKEN_IDS)
    return [draw.randrange(*ids) for _ in range(PROMPT_TOKENS)]


async def load(
    url: str, keys: list[str], model: str, seconds: float, pid: int, kinds: tuple[str, ...] = KINDS
) -> Any:
    """Run all clients for this long.

    Returns:
        What they saw; memory (MiB) by second; output tokens a second while all clients ran.
    """
    seen, memory, started = Seen(), {}, time.monotonic()
    process = psutil.Process(pid)
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=600, limits=limits) as http:
        clients = [
            Client(http, keys[number % ACCOUNTS], model, number, seen, kinds)
            for number in range(CLIENTS)
        ]
        tasks = [
            asyncio.create_task(client.run(JOIN_S * number / CLIENTS, started + seconds))
            for number, client in enumerate(clients)
        ]
        for second in (60.0, seconds):
            await asyncio.sleep(max(0.0, started + second - time.monotonic()))
            memory[second] = round(process.memory_info().rss / MIB, 1)
        await asyncio.gather(*tasks)
    first, last = started + 1.5 * JOIN_S, started + seconds
    served = sum(count for when, count in seen.tokens if first <= when <= last)
    return seen, memory, served / (last - first)


def engine_alone(folder: Path, dtype: str) -> float:
    """Return the output tokens a second of the engine without server, files and jobs."""
    import torch
    from engine import Load

    from serve.engine.local import EngineConfig, LocalEngine

    settings = load_settings()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config = EngineConfig(kv_budget_bytes=settings.kv_cache_mb * MIB)
    draw = random.Random(CLIENTS)
    asked = [tuple(prompt(draw, folder.name)) for _ in range(CLIENTS + ENGINE_REQUESTS)]
    with LocalEngine.open(folder, dtype, "cpu", config) as engine:
        run = Load(engine, seed=0).run
        run([None] * CLIENTS, CLIENTS, asked[:CLIENTS], num_tokens=4)
        started = time.monotonic()
        run([None] * ENGINE_REQUESTS, CLIENTS, asked[CLIENTS:], num_tokens=OUTPUT_TOKENS)
        return round(ENGINE_REQUESTS * OUTPUT_TOKENS / (time.monotonic() - started), 1)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and maximum in milliseconds."""
    ordered = sorted(seconds)
    found = {
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "max_ms": ordered[-1],
    }
    return {name: round(value * 1000, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", help="`tiny`, or as in the settings; default: the settings'")
    parser.add_argument("--models", type=Path, help="folder of fetched bases; default: HOME/models")
    parser.add_argument("--only", choices=KINDS, help="let the clients do this alone")
    arguments = parser.parse_args()
    if arguments.minutes < 1:
        parser.error(f"--minutes must be 1 or more, but is {arguments.minutes}")
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(measure(arguments, Path(home))))


def find_model(arguments: argparse.Namespace, home: Path) -> tuple[Path, str]:
    """Return the base model's folder, fetched or made, and its precision."""
    if arguments.model == "tiny":
        from tiny_models import save_tiny_base

        return save_tiny_base(home / "tiny", "llama"), "float32"
    from serve.engine import base_model

    settings = load_settings()
    spec = base_model.find_spec(arguments.model or settings.model)
    return base_model.fetch(spec, arguments.models or settings.models_dir).resolve(), spec.dtype


def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    folder, dtype = find_model(arguments, home)
    settings = Settings(home=home)
    database = Database(settings.effective_database_url)
    database.migrate()
    keys = [accounts.create_account(database, f"load {i}")[1] for i in range(ACCOUNTS)]
    database.close()
    port = free_port()
    url, seconds = f"http://127.0.0.1:{port}", arguments.minutes * 60
    environment = {**os.environ, "HONE_HOME": str(home), "HONE_PORT": str(port)}
    environment |= {"HONE_MODEL": str(folder), "HONE_DTYPE": dtype}
    environment |= {"HONE_EMBEDDED_WORKER": "false", "HONE_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "serve.cli", "serve"]
    log = Path(tempfile.gettempdir()) / "hone-load.log"
    with server(command, f"{url}/health", log, environment) as ready_s:
        [process] = psutil.Process().children()
        kinds = (arguments.only,) if arguments.only else KINDS
        seen, memory, rate = asyncio.run(load(url, keys, folder.name, seconds, process.pid, kinds))
    others = [s for name, found in seen.seconds.items() if name != "completion" for s in found]
    served = round(rate, 1)
    alone = engine_alone(folder, dtype)
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "model": folder.name,
        "ready_s": round(ready_s, 1),
        "answers": dict(sorted(seen.answers.items())),
        "errors": dict(seen.errors),
        "announced": dict(seen.announced),
        "memory_mib": {"minute_1": memory[60.0], "end": memory[seconds]},
        "not_generating": quantiles(others) if others else None,
        "by_route": {name: quantiles(found) for name, found in sorted(seen.seconds.items())},
        "tokens_per_s": {"http": served, "engine": alone, "ratio": round(served / alone, 2)},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
        },
    }


if __name__ == "__main__":
    main()

"""The work of the serving benchmark over HTTP, and servers as child processes."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 75
START_LIMIT_S = 400


def prompts(count: int) -> list[list[int]]:
    """Return random token ids, the same for every server."""
    draw = random.Random(0)
    return [[draw.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def rate(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    clients: int,
    tokens_of: Callable[[Any], int],
    headers: Mapping[str, str] | None = None,
) -> float:
    """Send the bodies, `clients` at a time; return output tokens a second.

    Raises:
        SystemExit: An answer has another number of tokens than was asked for.
    """
    with (
        httpx.Client(headers=dict(headers or {}), timeout=600) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        started = time.monotonic()
        answers = list(pool.map(lambda body: client.post(url, json=body), bodies))
        seconds = time.monotonic() - started
    for answer in answers:
        if answer.status_code != 200 or tokens_of(answer.json()) != OUTPUT_TOKENS:
            raise SystemExit(f"{url} answered {answer.status_code}: {answer.text[:300]}")
    return round(len(answers) * OUTPUT_TOKENS / seconds, 1)


def openai_tokens(answer: Any) -> int:
    """Return the output tokens that an OpenAI-compatible server tells."""
    return int(answer["usage"]["completion_tokens"])


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(
    command: Sequence[str | Path],
    health: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[float]:
    """Run a server until the block ends; yields the seconds until it was ready."""
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*map(str, command)], stdout=sink, stderr=sink, env=environment, start_new_session=True
        )
        try:
            while not _answers(health):
                if process.poll() is not None or time.monotonic() - started > START_LIMIT_S:
                    raise SystemExit(f"{command[0]} did not start; see {log}")
                time.sleep(0.2)
            yield time.monotonic() - started
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False

"""A server of one's own for the length of a block: what the demo, benchmarks and tests talk to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from data.errors import ToolkitError

READY_TIMEOUT_S = 300  # the first start fetches the base model
STOP_TIMEOUT_S = 30


@contextmanager
def running_server(home: Path, words: Sequence[str] = ()) -> Iterator[str]:
    """Run `hone serve` on a free loopback port; yields the base URL of its API.

    Args:
        home: HONE_HOME; the log is written to `HOME/server.log`.
        words: Further settings as `key=value`.

    Raises:
        ToolkitError: The server ended or did not get ready; the message has the end of its log.
    """
    home.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), home / "server.log"
    words = ["serve", f"home={home}", f"port={port}", *words]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.child", "serve.cli", *words],
            stdin=subprocess.PIPE,  # held open: the server ends when this process does
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def free_port() -> int:
    """Return a loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
            raise ToolkitError(f"The server did not get ready; the end of {log}:\n{tail}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()

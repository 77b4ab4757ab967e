"""The embedded training worker: a child process, watched and restarted, never outliving the server.

The worker is `python -m train.worker` with this server's settings, run by `serve.child` so that it
stops when the server dies, even by kill -9. The settings go through a pipe: the database's URL may
hold a password, and a command line is seen by all. When the worker dies, it is started again, more
slowly each time it dies at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process

from data.settings import Settings

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_AFTER_S = 60.0
STOP_MARGIN_S = 4.0

log = logging.getLogger("hone.worker")


class WorkerProcess:
    """Keeps one worker running."""

    def __init__(self, settings: Settings):
        self._command = [sys.executable, "-m", "serve.child", "-", "train.worker"]
        self._words = json.dumps(as_words(settings)).encode() + b"\n"
        self._stop_s = settings.cancel_grace_s + STOP_MARGIN_S
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker and keep it running."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ask the worker to stop (its jobs are resumed later), then insist."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(self._stop_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("the worker did not stop within %.0f s; killing it", self._stop_s)
            self._process.kill()
            await self._process.wait()

    async def _keep(self) -> None:
        delay_s = FIRST_DELAY_S
        while True:
            started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is for the server alone
            )
            if self._process.stdin is not None:  # a worker that dies at once is told of below
                self._process.stdin.write(self._words)
            status = await self._process.wait()
            if time.monotonic() - started > HEALTHY_AFTER_S:
                delay_s = FIRST_DELAY_S
            log.error(
                "the worker ended with status %d; starting it again in %.1f s", status, delay_s
            )
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def as_words(settings: Settings) -> list[str]:
    """Write settings as `key=value` words (JSON is YAML) that give the same settings when read."""
    return [
        f"{name}={json.dumps(value)}" for name, value in settings.model_dump(mode="json").items()
    ]

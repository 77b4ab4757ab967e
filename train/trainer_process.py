"""A trainer that cannot outlive its worker, and whose end is certain.

`TrainerProcess` runs `python -m train.trainer_process COMMAND ...`, which leads a session of its
own and runs the command in it. Its standard input is a pipe that the worker holds: when the worker
ends, however it ends, the pipe closes and the leader kills the whole group. Every process of a
trainer also carries its run folder in the environment, so `end_trainers` finds and ends what is
left of a run even where the leader was killed too, or a process made a session of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

RUN_MARK = "TRAINER_RUN_FOLDER"
START_MARK = "TRAINER_START"
POLL_S = 0.05
END_TIMEOUT_S = 20.0  # a process in an uninterruptible call dies when the call returns


class TrainerProcess:
    """A running trainer, with all the processes that it started.

    Args:
        command: What to run; its output is appended to `log`.
        run_folder: The run that it works on.
    """

    def __init__(self, command: Sequence[str], run_folder: Path, log: Path):
        self._marks = {RUN_MARK: str(run_folder.resolve()), START_MARK: secrets.token_hex(8)}
        with log.open("ab") as stream:
            self._leader = subprocess.Popen(
                [sys.executable, "-m", "train.trainer_process", *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **self._marks},
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit status (128 + N for signal N), or None while it runs."""
        status = self._leader.poll()
        return 128 - status if status is not None and status < 0 else status

    def stop(self, grace_s: float) -> None:
        """Ask all processes to end, and end them after the grace."""
        if _marked(self._marks):  # else the group's number may be another's by now
            with suppress(ProcessLookupError):  # all of the group have ended
                os.killpg(self._leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and _marked(self._marks):
            time.sleep(POLL_S)
        self.end()

    def end(self) -> None:
        """End all processes now; returns when none is left."""
        _end(self._marks)
        self._leader.wait()
        if self._leader.stdin is not None:
            self._leader.stdin.close()


def end_trainers(run_folder: Path) -> int:
    """End whatever still works on a run, by whichever worker it was started.

    Returns:
        The number of processes ended.

    Raises:
        TimeoutError: One of them cannot be ended.
    """
    return _end({RUN_MARK: str(run_folder.resolve())})


def _end(marks: dict[str, str]) -> int:
    deadline = time.monotonic() + END_TIMEOUT_S
    ended: set[int] = set()
    while found := _marked(marks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {found[0].pid} does not end, even by SIGKILL")
        for process in found:
            ended.add(process.pid)
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                process.kill()
        time.sleep(POLL_S)
    return len(ended)


def _marked(marks: dict[str, str]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue  # ended, or another user's
        if all(environment.get(name) == value for name, value in marks.items()):
            found.append(process)
    return found


def main() -> int:
    """Lead the session: run the command, and kill the group when the worker is gone."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the command decides how to stop
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_follow_worker, daemon=True).start()
    status = command.wait()
    return status if status >= 0 else 128 - status


def _follow_worker() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

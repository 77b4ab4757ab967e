"""Which workers are alive on this machine: each holds a lock on a file of its own while it lives.

The system lets go of a lock when its process ends, however it ends, so nothing here can be stale.
Whoever looks tries to lock the file too, which writes nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data.tables import now

SUFFIX = ".lock"


@dataclass(frozen=True, slots=True)
class Presence:
    """A worker that lives: its id, its process, and when it began (unix seconds)."""

    id: str
    pid: int
    since: int


@contextmanager
def announced(folder: Path, worker_id: str) -> Iterator[None]:
    """Be found by `alive` until the block, or the process, ends; removes what dead ones left."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"*{SUFFIX}"):
        if not _is_held(path):
            path.unlink(missing_ok=True)
    shown = Presence(worker_id, os.getpid(), now())
    name = f"{shown.pid}-{worker_id.rpartition(':')[2]}"
    path = folder / f"{name}{SUFFIX}"
    with (folder / f".{name}").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(asdict(shown)))
        file.flush()
        Path(file.name).replace(path)  # only now, locked, can others see it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def alive(folder: Path) -> list[Presence]:
    """Return the workers that live, the oldest first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            if _is_held(path):
                found.append(Presence(**json.loads(path.read_text("utf-8"))))
        except FileNotFoundError:
            continue  # it has just ended
    return sorted(found, key=lambda worker: worker.since)


def _is_held(path: Path) -> bool:
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False

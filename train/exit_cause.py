"""Why a trainer ended without a result, said plainly, and whether starting it again can help."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from train.job_log import read_object
from train.run import RunFolder

TAIL_BYTES = 64 << 10
TAIL_LINES = 15
FULL_BELOW_BYTES = 4 << 20
MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# How `accelerate launch` tells of a signal: for one process, and for several; and of a trainer that
# a signal had stop in order (`train.callbacks.STOPPED`).
SIGNALS = re.compile(
    r"died with <Signals\.(SIG\w+): \d+>|Signal \d+ \((SIG\w+)\) received by PID"
    r"|returned non-zero exit status 143\."
)


@dataclass(frozen=True, slots=True)
class Cause:
    """What ended a trainer; one that was `killed` may be started again."""

    code: str
    message: str
    killed: bool = False


def cause_of_exit(run: RunFolder, status: int, log_start: int) -> Cause:
    """Find out why a trainer ended.

    Args:
        status: Exit status of the launcher; 128 + N for signal N.
        log_start: Where this start of the trainer begins in its log, bytes.
    """
    told = read_object(run.error)
    if told is not None:
        return Cause(
            str(told.get("code") or "training_failed"),
            str(told.get("message") or f"The trainer gave no reason; see {run.log}"),
        )
    log = _end_of(run.log, log_start)
    if "No space left on device" in log or shutil.disk_usage(run.path).free < FULL_BELOW_BYTES:
        return Cause(
            "disk_full",
            f"The disk of {run.path} is full, so the trainer could not go on; free some space and "
            "create the job again",
        )
    name = _signal(status, log)
    if name is not None:
        hint = _memory_hint(run) if name == "SIGKILL" else ""
        return Cause("trainer_killed", f"The trainer was killed by {name}{hint}", killed=True)
    last = "\n".join(log.splitlines()[-TAIL_LINES:])
    return Cause(
        "training_failed",
        f"The trainer exited with status {status} and left no result. Its last words:\n{last}",
    )


def _memory_hint(run: RunFolder) -> str:
    """Return the advice for a process that the system killed, with the run's numbers."""
    plan = (read_object(run.resolved) or {}).get("plan") or {}
    length, at_once = plan.get("max_length"), plan.get("micro_batch_tokens")
    if length is None or at_once is None:
        advice = "shorter rows or a smaller base help"
    elif length > at_once:
        advice = (
            f"max_seq_length is {length}, and a row goes through the model whole, so a smaller one "
            "helps, or a smaller base"
        )
    else:
        advice = (
            f"a step goes through the model {at_once} tokens at a time, whatever its batch_size, "
            "so what helps is a smaller base, or less beside the trainer"
        )
    return (
        f": most often the system does that when memory runs out ({describe_machine()}); {advice}"
    )


def describe_machine() -> str:
    """Return how much memory there is for this process, in words."""
    limit = memory_limit()
    if limit is not None and limit < MEMORY_BYTES:
        return f"its cgroup may use {limit / 1e9:.1f} GB"
    return f"the machine has {MEMORY_BYTES / 1e9:.1f} GB"


def memory_limit(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """Return the least that this process's cgroup, or one around it, may use, bytes; None where
    there is no limit.

    Args:
        root: Where cgroups are mounted: version 2, or version 1 with `memory` in it.
        own: Names the cgroups of the process, as /proc does.
    """
    found = []
    for line in own.read_text("utf-8").splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            text = _text_of(folder / name)
            if text.isdecimal():  # else it is "max", or absent
                found.append(int(text))
            if folder == top:
                break
    return min(found, default=None)


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def _signal(status: int, log: str) -> str | None:
    told = [one or several or "SIGTERM" for one, several in SIGNALS.findall(log)]
    if told and status != 0:
        return str(told[-1])
    try:
        return signal.Signals(status - 128).name if status > 128 else None
    except ValueError:
        return None


def _end_of(log: Path, start: int) -> str:
    with log.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(start, size - TAIL_BYTES))
        return stream.read().decode("utf-8", "replace")

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
# How `accelerate launch` tells of a signal: for one process, and for several.
SIGNALS = re.compile(r"died with <Signals\.(SIG\w+): \d+>|Signal \d+ \((SIG\w+)\) received by PID")


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
    names = {"batch_size": "batch_size", "max_length": "max_seq_length"}
    now = [f"{ours} is {plan[name]}" for name, ours in names.items() if name in plan]
    facts = [*now, f"the machine has {MEMORY_BYTES / 1e9:.1f} GB"]
    return (
        ": most often the system does that when memory runs out, so a smaller batch_size or "
        f"max_seq_length may help ({', '.join(facts)})"
    )


def _signal(status: int, log: str) -> str | None:
    told = [one or several for one, several in SIGNALS.findall(log)]
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

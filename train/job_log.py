"""What a trainer writes while it runs, turned into the events that the API shows.

Every line becomes at most one event: its `source` names the line by what it says, so that reading a
file again, or training some steps again after a crash, repeats nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CSV_COLUMNS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
)
TOLD = {
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "accuracy": "accuracy",
    "eval_accuracy": "validation accuracy",
    "classification/accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "reward": "reward",
    "kl": "KL",
    "objective/scores": "score",
    "objective/kl": "KL",
    "eval/reward": "evaluation",
}
LEARNING = {"train_loss", "objective/scores"}  # what tells of a step, rather than an evaluation
REWARDS = {"reward", "reward_std", "kl", "entropy"}  # columns of methods that sample
LEVELS = ("info", "warn", "error")

log = logging.getLogger("hone.worker")


@dataclass(frozen=True, slots=True)
class EventLine:
    """One event to record; `time` is when the trainer wrote it, unix seconds."""

    time: float
    message: str
    level: str
    type: str
    data: dict[str, Any] | None
    source: str


class LineTail:
    """Reads the JSON lines that were added to a file since the last look.

    A file that was replaced or cut short, as a resumed trainer does, is read from its start again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self._inode = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the new whole lines; one that is still being written waits for its end."""
        try:
            with self._path.open("rb") as stream:
                return [record for line in self._new_lines(stream) if (record := _parse(line))]
        except FileNotFoundError:
            return []

    def _new_lines(self, stream: io.BufferedReader) -> list[bytes]:
        state = os.fstat(stream.fileno())
        if state.st_ino != self._inode or state.st_size < self._offset:
            self._inode, self._offset = state.st_ino, 0
        stream.seek(self._offset)
        whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else []


def metrics_event(record: Mapping[str, Any]) -> EventLine | None:
    """Describe one record of metrics.jsonl; None for one without a loss."""
    numbers = [
        f"{label}={record[name]:.4g}"
        for name, label in TOLD.items()
        if isinstance(record.get(name), int | float)
    ]
    if not numbers:
        return None
    step, kind = record.get("step"), "train" if record.keys() & LEARNING else "valid"
    return EventLine(
        time=_time(record),
        message=f"Step {step}/{record.get('total_steps')}: {', '.join(numbers)}",
        level="info",
        type="metrics",
        data={name: value for name, value in record.items() if name != "time"},
        source=f"step:{step}:{kind}",
    )


def trainer_event(record: Mapping[str, Any]) -> EventLine | None:
    """Describe one record of events.jsonl."""
    message, level = record.get("message"), record.get("level", "info")
    if not isinstance(message, str) or level not in LEVELS:
        return None
    named = hashlib.sha256(f"{level}\0{message}".encode()).hexdigest()[:32]
    return EventLine(_time(record), message, level, "message", record.get("data"), f"told:{named}")


def checkpoint_of(record: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Return step and metrics of the checkpoint that a record of events.jsonl tells of."""
    data = record.get("data")
    step = data.get("checkpoint") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(step, int):
        return None
    metrics = data.get("metrics")
    return step, metrics if isinstance(metrics, dict) else {}


def step_metrics_csv(metrics: Path) -> bytes:
    """Return metrics.jsonl as the table that clients download: one row a step."""
    steps: dict[int, dict[str, Any]] = {}
    for record in LineTail(metrics).read():
        if isinstance(record.get("step"), int):
            steps.setdefault(record["step"], {}).update(record)
    text = io.StringIO()
    more = sorted({name for record in steps.values() for name in record if _is_column(name)})
    table = csv.DictWriter(text, (*CSV_COLUMNS, *more), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(steps[step] for step in sorted(steps))
    return text.getvalue().encode()


def _is_column(name: str) -> bool:
    return "/" in name or name in REWARDS


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none, or it is damaged."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def _time(record: Mapping[str, Any]) -> float:
    value = record.get("time")
    return float(value) if isinstance(value, int | float) else 0.0


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        log.warning("a trainer wrote a line that is not JSON: %r", line[:200])
        return None
    return value if isinstance(value, dict) else None

"""A run's folder: the one interface between a trainer and whoever started it.

Files that mean something by being there (`result.json`, `error.json`, `adapter/`) are written aside
and renamed. Checkpoints get a mark when they are whole, so that a crash while one is written leaves
nothing that a resumed run could mistake for a state.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.durable import sync, sync_files

COMPLETE = "complete"  # the mark of a whole checkpoint
ORIGIN = "hone.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunFolder:
    """Paths and writes of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self.checkpoints = path / "checkpoints"
        self.models = path / "models"
        self.tokens = path / "tokens"
        self.result = path / "result.json"
        self.error = path / "error.json"
        self.resolved = path / "resolved_config.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.losses = path / "example_losses.jsonl"
        self.completions = path / "completions.jsonl"
        self.report = path / "report.html"
        self.log = path / "trainer.log"
        self.card = path / "report_card.json"
        self.hyperparameters = path / "hyperparameters.json"
        self._began: float | None = None

    def prepare(self) -> None:
        """Make the folder and clear what an earlier, unfinished attempt left half-done."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.error.unlink(missing_ok=True)
        for path in self.checkpoints.glob("checkpoint-*"):
            if not (path / COMPLETE).exists():
                shutil.rmtree(path)

    def model_of(self, step: int) -> Path:
        """Return the folder in which the adapter of a checkpoint is laid out."""
        return self.models / f"step-{step}"

    def lay_out_model(self, step: int, origin: Mapping[str, str], keep: int) -> None:
        """Put the adapter of a checkpoint into a folder of its own, as serving reads it.

        Args:
            origin: `base_model` and `base_fingerprint`.
            keep: How many of the newest such folders stay.
        """
        config, weights = (self.checkpoints / f"checkpoint-{step}" / name for name in ADAPTER_FILES)
        folder, partial = self.model_of(step), self.models / ".partial"
        for path in (folder, partial):
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        values = json.loads(config.read_text("utf-8"))
        values["base_model_name_or_path"] = origin["base_model"]  # no path of this machine
        write_json(partial / config.name, values)
        try:
            os.link(weights, partial / weights.name)
        except OSError:  # a file system without links
            shutil.copyfile(weights, partial / weights.name)
        write_json(partial / ORIGIN, dict(origin))
        partial.rename(folder)
        for old in sorted(self.models.glob("step-*"), key=step_of)[:-keep]:
            shutil.rmtree(old)

    def begin(self, checkpoint: Path | None) -> None:
        """Start the clock of an attempt, which goes on from what the checkpoint had taken."""
        earlier = 0.0
        if checkpoint is not None and (mark := (checkpoint / COMPLETE).read_text("utf-8")):
            earlier = json.loads(mark)["seconds"]
        self._began = time.monotonic() - earlier

    @property
    def seconds(self) -> float:
        """What all attempts together have taken, up to the checkpoints that they went on from."""
        return 0.0 if self._began is None else round(time.monotonic() - self._began, 1)

    def mark_complete(self, step: int) -> None:
        """Declare a checkpoint whole, once its files are on disk."""
        folder = self.checkpoints / f"checkpoint-{step}"
        sync_files(folder)
        write_json(folder / COMPLETE, {"seconds": self.seconds})
        sync(folder)

    def newest_checkpoint(self) -> Path | None:
        """Return the whole checkpoint with the highest step."""
        whole = [path.parent for path in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        return max(whole, key=step_of, default=None)

    def trim_logs(self, step: int) -> None:
        """Forget what was logged beyond a step, and the answers of a run's end, as a resumed run
        will log them again."""
        for path in (self.metrics, self.events, self.completions):
            if path.exists():
                lines = path.read_text("utf-8").splitlines(keepends=True)
                kept = [line for line in lines if _is_of(line, step)]
                replace_text(path, "".join(kept))

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics`, `events` or `completions`."""
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Return the lines of one of `metrics`, `events` or `completions`; none if it is absent."""
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def tell(self, message: str, *, level: str = "info", step: int = 0, **data: Any) -> None:
        """Append an event."""
        record = {"level": level, "message": message, "step": step, "data": data or None}
        self.append(self.events, record)

    def has_told(self, message: str) -> bool:
        """Tell whether an event with that message is there, of an earlier attempt, say."""
        lines = self.events.read_text("utf-8").splitlines() if self.events.exists() else []
        return any(json.loads(line)["message"] == message for line in lines)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint or of its model."""
    return int(folder.name.rpartition("-")[2])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is either absent, old or whole."""
    replace_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write `completions`, say, as a whole."""
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


def replace_text(path: Path, text: str) -> None:
    """Write a text file aside and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Tell whether an error came from a full disk; libraries hide that in several ways."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return True
    text = str(error)
    if any(os.strerror(code) in text for code in DISK_ERRORS):
        return True
    return "PytorchStreamWriter" in text or shutil.disk_usage(folder).free < 1 << 20


def _is_of(line: str, step: int) -> bool:
    """Tell whether a line was logged on the way to a step."""
    try:
        record = json.loads(line)
        return int(record["step"]) <= step and record.get("kind") != "final"
    except (ValueError, KeyError):
        return False  # a line that a crash cut off

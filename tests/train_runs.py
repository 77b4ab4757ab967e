"""Small runs of `train.sft` for tests: a tiny base, a dataset, and its command line in process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_models import save_tiny_base

from train import sft

ROOT = Path(__file__).resolve().parent.parent
LABELS = ("refund", "parcel", "login")


def write_rows(path: Path, count: int = 24) -> Path:
    """Write prompt/completion rows of several lengths."""
    rows = [
        {
            "prompt": f"{'x' * (index * 7 % 23)}{LABELS[index % 3][0]}{index}:",
            "completion": f" {LABELS[index % 3]}",
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


class Workplace:
    """A folder with a tiny base and a dataset."""

    def __init__(self, folder: Path, arch: str = "llama"):
        self.folder = folder
        self.base = save_tiny_base(folder / "tiny-base", arch)
        self.rows = write_rows(folder / "train.jsonl")

    def words(self, name: str, **settings: Any) -> list[str]:
        """Return the `key=value` words of a run in the folder `name`; `a__b` stands for `a.b`."""
        values = {
            "base_model": self.base,
            "models_dir": self.folder / "models",
            "train_file": self.rows,
            "output_dir": self.folder / name,
            "threads": 1,
            "dtype": "float32",  # what tests compare with
            "batch_size": 8,
            "num_epochs": 2,
            **settings,
        }
        return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]

    def run(self, name: str, *flags: str, **settings: Any) -> tuple[int, Path]:
        """Train in this process; returns the exit status and the run's folder."""
        with signals_restored():
            return sft.main([*flags, *self.words(name, **settings)]), self.folder / name


@contextmanager
def signals_restored() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def launch(module: str, words: Sequence[str], processes: int, folders: Sequence[Path] = ()) -> int:
    """Run a trainer by `accelerate launch` on that many CPU processes; returns the exit status."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file"),
        *(str(ROOT / "configs/accelerate/two_cpu_processes.yaml"), "--num_processes"),
        *(str(processes), "--main_process_port", str(free_port()), "-m", module, *words),
    ]
    path = ":".join(map(str, (ROOT, *folders)))
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        print(done.stderr[-4000:])
    return done.returncode


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])

"""A dataset larger than memory: the start of a run on it, its peak memory and render rate.

Writes a file of prompt/completion rows that differ (removed at the end), and starts `train.sft` on
it, stopped after some steps. Memory is what the process cannot give back (anonymous pages); the
page cache, which the system takes away when it needs room, is told beside it.

    python benchmarks/large_file.py --json
    python benchmarks/large_file.py --gigabytes 5 --steps 8 --folder /tmp/large --keep
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
TEXT = """order parcel refund invoice account password login charge card delivery late broken
missing please help why where when my the a is was has not been twice again today yesterday week
since website app update address change cancel return exchange colour size price"""
WORDS = TEXT.split()
LABELS = ("refund", "delivery", "login", "payment", "returns", "other")
STOP = """
import sys, time
from transformers import TrainerCallback
from train import sft, trainer
made = trainer._make_trainer
def make(job, *given):
    found = made(job, *given)
    found.args.max_steps = int(sys.argv[1])
    print("PREPARED", len(job.train.examples), job.train.num_tokens, flush=True)
    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            print("STEP", time.monotonic(), flush=True)
            if found.state.global_step >= int(sys.argv[1]):
                import os; os._exit(0)
    found.add_callback(Clock())
    return found
trainer._make_trainer = make
sys.exit(sft.main(sys.argv[2:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/hone-large-file"))
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--keep", action="store_true", help="leave the file and the run")
    parser.add_argument("--json", action="store_true", help="print the result only")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(given)
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Write the file, start a run on it, and return what that took."""
    path = given.folder / "rows.jsonl"
    if not path.exists():
        write_file(path, int(given.gigabytes * 1e9))
    words = {
        "base_model": given.base_model,
        "models_dir": given.models_dir,
        "train_file": path,
        "output_dir": given.folder / "run",
        "num_epochs": 1,
        "device": "cpu",
    }
    command = [sys.executable, "-c", STOP, str(given.steps)]
    command += [f"{name}={value}" for name, value in words.items()]
    started = time.monotonic()
    log = (given.folder / "log.txt").open("w")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    peaks = {"anonymous_bytes": 0, "resident_bytes": 0, "before_the_first_step_bytes": 0}
    marks: dict[str, float] = {}
    watcher = threading.Thread(target=watch, args=(process.pid, peaks, marks), daemon=True)
    watcher.start()
    steps, rows, tokens = [], 0, 0
    for line in process.stdout or ():
        if line.startswith("PREPARED"):
            marks["prepared"] = time.monotonic()
            rows, tokens = map(int, line.split()[1:])
        elif line.startswith("STEP"):
            steps.append(float(line.split()[1]))
    if process.wait() or len(steps) < given.steps:
        raise SystemExit((given.folder / "log.txt").read_text()[-4000:])
    seconds = marks["prepared"] - started
    return {
        "work": {
            "file_bytes": path.stat().st_size,
            "rows": rows,
            "tokens": tokens,
            "steps": given.steps,
            "base": given.base_model,
        },
        "prepare_s": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        "file_mb_per_s": round(path.stat().st_size / 1e6 / seconds, 1),
        "step_s": round((steps[-1] - steps[0]) / max(len(steps) - 1, 1), 2),
        "peak": peaks,
        "store_bytes": sum(f.stat().st_size for f in (given.folder / "run/tokens").rglob("*")),
        "machine": {"cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
    }


def write_file(path: Path, size: int) -> None:
    """Write rows that all differ until the file has `size` bytes."""
    draw = random.Random(0)
    with path.open("w") as stream:
        written = number = 0
        while written < size:
            lines = []
            for _ in range(1000):
                number += 1
                text = " ".join(draw.choices(WORDS, k=draw.randint(20, 70)))
                row = {"prompt": f"Ticket {number}: {text}\n\nTopic:"}
                row["completion"] = f" {draw.choice(LABELS)}"
                lines.append(json.dumps(row) + "\n")
            written += stream.write("".join(lines))


def watch(pid: int, peaks: dict[str, int], marks: dict[str, float]) -> None:
    """Note a process's most anonymous and most resident memory until it ends."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" not in found:
            return
        anonymous, resident = (int(found[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS"))
        peaks["anonymous_bytes"] = max(peaks["anonymous_bytes"], anonymous)
        peaks["resident_bytes"] = max(peaks["resident_bytes"], resident)
        if "prepared" not in marks:
            before = max(peaks["before_the_first_step_bytes"], anonymous)
            peaks["before_the_first_step_bytes"] = before
        time.sleep(0.2)


if __name__ == "__main__":
    main()

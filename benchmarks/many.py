"""Several adapters at once on one base, against as many runs of `train.sft` one after the other.

The same rows, settings and steps on both sides; each adapter has a seed of its own. What is timed
is the whole: from the command to the last adapter's folder, start, checks and all. `training` is
the part from the first step to the last but one: runs at once end one after the other, and after
the last step of the first its checks and files would count. Rounds alternate.

    python benchmarks/many.py --json
    python benchmarks/many.py --rows train.jsonl --adapters 4 --steps 40 --batch 8 --rounds 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "examples/support_intents/train.jsonl"
CONTENDERS = ("at_once", "at_once_no_joint_products", "one_after_the_other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="prompt/completion or chat rows")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of each adapter")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    given = parser.parse_args()
    if given.steps < 3:
        parser.error(
            f"--steps is {given.steps}; the first and the last are not timed, give 3 or more"
        )
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    for _ in range(given.rounds):
        for name in given.only:
            rounds[name].append(measure(name, given))
            print(name, rounds[name][-1], file=sys.stderr)
    found: dict[str, Any] = {name: summary(runs) for name, runs in rounds.items()}
    result = {
        "work": {
            **{name: getattr(given, name) for name in ("adapters", "batch", "steps", "rounds")},
            **{"rows": given.rows.name, "dtype": given.dtype},
        },
        **found,
        "machine": {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
    }
    if {"at_once", "one_after_the_other"} <= found.keys():
        fast, slow = found["at_once"], found["one_after_the_other"]
        result["times_as_fast"] = {
            "whole": round(slow["seconds"] / fast["seconds"], 3),
            "training": round(slow["training_s"] / fast["training_s"], 3),
        }
        result["largest_loss_difference"] = max(
            abs(a - b) for a, b in zip(fast["losses"], slow["losses"], strict=True)
        )
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the rounds; losses are the same in each."""
    medians = {
        name: round(statistics.median(run[name] for run in runs), 1)
        for name in ("seconds", "training_s", "tokens_per_s")
    }
    peak = max(run["peak_bytes"] for run in runs)
    return {**medians, "peak_bytes": peak, "losses": runs[0]["losses"]}


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train all adapters one way; returns seconds, real tokens a second, and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = folder / "rows.jsonl"
        lines = [line for line in given.rows.read_text("utf-8").splitlines() if line.strip()]
        random.Random(0).shuffle(lines)
        wanted = given.steps * given.batch
        chosen = list(itertools.islice(itertools.cycle(lines), wanted))
        rows.write_text("\n".join(chosen) + "\n", "utf-8")
        files = [write_config(folder, rows, seed, given) for seed in range(given.adapters)]
        if name == "one_after_the_other":
            commands = [["train.sft", "--config", str(file)] for file in files]
        else:
            commands = [["train.many", "--config", *map(str, files)]]
            if name == "at_once_no_joint_products":
                commands[0] += ["--max-tokens", "0"]
        started = time.monotonic()
        peak = max(run(command) for command in commands)
        seconds = time.monotonic() - started
        runs = [folder / f"run-{seed}" for seed in range(given.adapters)]
        return {"seconds": seconds, "peak_bytes": peak, **_told(name, runs)}


def write_config(folder: Path, rows: Path, seed: int, given: argparse.Namespace) -> Path:
    path = folder / f"{seed}.yaml"
    values = {
        "base_model": "smollm2-135m-instruct",
        "models_dir": str(given.models_dir.resolve()),
        "train_file": str(rows),
        "output_dir": str(folder / f"run-{seed}"),
        "seed": seed,
        "num_epochs": 1,
        "batch_size": given.batch,
        "dtype": given.dtype,
        "threads": given.threads,
        "device": "cpu",
        "n_checkpoints": 1,
        "lora": {"r": 16},
    }
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


def run(words: Sequence[str]) -> int:
    """Run a trainer; returns the most memory that it had resident, bytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
    watcher.start()
    _, told = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{told[-3000:]}")
    return max(peaks)


def _watch(pid: int, peaks: list[int]) -> None:
    try:
        while True:
            peaks.append(psutil.Process(pid).memory_info().rss)
            time.sleep(0.05)
    except psutil.Error:
        return


def _told(name: str, runs: Sequence[Path]) -> dict[str, Any]:
    tokens, losses, spans = 0, [], []
    for folder in runs:
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "train_loss" in line]
        tokens += steps[-2]["trained_tokens"] - steps[0]["trained_tokens"]
        losses.append(round(statistics.mean(line["train_loss"] for line in steps[-5:]), 5))
        spans.append((steps[0]["time"], steps[-2]["time"]))
    if name == "one_after_the_other":
        training = sum(end - start for start, end in spans)
    else:
        training = max(end for _, end in spans) - min(start for start, _ in spans)
    return {"training_s": training, "tokens_per_s": tokens / training, "losses": losses}


if __name__ == "__main__":
    main()

"""Supervised fine-tuning beside TRL's SFTTrainer: real tokens per second, loss, memory.

One file of rows, one base (by `auto` in bfloat16 where the hardware is fast in it), LoRA of rank 16
on all linear layers, the same number of optimizer steps. TRL runs twice: as it comes (random
order), and on the rows in hone's order, which makes the losses comparable. Padding is not counted
as tokens. Rounds alternate, so that what else the machine does falls on all.

    python benchmarks/training.py --json
    python benchmarks/training.py --rows train.jsonl --batch 8 --steps 40 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
ROWS = ROOT / "examples/support_intents/train.jsonl"
CONTENDERS = {
    "hone": ("sft_ours.py", []),
    "trl": ("sft_trl.py", ["--order", "random"]),
    "trl_same_order": ("sft_trl.py", ["--order", "given"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="prompt/completion or chat rows")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="the first three are not timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--json", action="store_true", help="print the result only")
    given = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    for _ in range(given.rounds):
        for name in given.only:
            rounds[name].append(run(name, given))
    found = {name: summary(runs) for name, runs in rounds.items()}
    ratios = {}
    if "hone" in found:
        for name in found.keys() - {"hone"}:
            ratios[name] = {
                key: round(found["hone"][key] / found[name][key], 3)
                for key in ("tokens_per_s", "final_loss", "peak_bytes")
            }
    work = {"rows": given.rows.name, "batch": given.batch, "steps": given.steps}
    result = {
        "work": work | {"dtype": rounds[given.only[0]][0]["dtype"], "rounds": given.rounds},
        **found,
        "hone_over": ratios,
        "machine": {"cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
    }
    print(json.dumps(result) if given.json else json.dumps(result, indent=2))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the rounds; losses are the same in each."""
    return {
        "tokens_per_s": round(statistics.median(run["tokens_per_s"] for run in runs), 1),
        "each": [round(run["tokens_per_s"], 1) for run in runs],
        "padding": runs[0]["padding"],
        "final_loss": runs[0]["final_loss"],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "loaded_bytes": max(run["loaded_bytes"] for run in runs),
    }


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run one contender alone; returns what it printed last."""
    script, more = CONTENDERS[name]
    command = [sys.executable, str(HERE / "peers" / script), *more]
    for word in ("rows", "batch", "steps", "learning_rate", "dtype", "threads", "models_dir"):
        command.append(f"--{word.replace('_', '-')}={getattr(given, word)}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {found['tokens_per_s']:.1f} tokens/s", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()

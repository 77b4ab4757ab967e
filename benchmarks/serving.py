"""Serving against what one would pick instead, all on the same work and in turn.

48 requests of 75 random prompt tokens and 64 greedy output tokens, EOS ignored, from 16 clients or
from one; rank-8 adapters on all linear layers. hone and OpenVINO GenAI run in process, hone's
server, vLLM and llama.cpp's server over HTTP. Each peer gets an environment of its own below
.cache/peers on the first run (llama.cpp is built from source, about ten minutes).

    python benchmarks/serving.py --json
    python benchmarks/serving.py --peers openvino --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROWS = ("base_16", "one_adapter_16", "mixed_16", "base_1", "one_adapter_1")
OURS = {
    "engine": [HERE / "engine.py", "--scenarios", *ROWS],
    "server": [HERE / "peers/hone_server.py"],
}
PEERS = {
    "openvino": [HERE / "peers/openvino_engine.py", "--precision", "f32"],
    "openvino_bf16": [HERE / "peers/openvino_engine.py", "--precision", "bf16"],
    "vllm": [HERE / "peers/vllm_server.py", "--dtype", "bfloat16"],
    "vllm_f32": [HERE / "peers/vllm_server.py", "--dtype", "float32"],
    "llama": [HERE / "peers/llama_server.py", "--precision", "bf16"],
    "llama_q8": [HERE / "peers/llama_server.py", "--precision", "q8_0"],
}
# A peer that cannot mix adapters is compared by its row with one adapter for all.
AGAINST = {
    "mixed_16": ("mixed_16", "one_adapter_16"),
    **{row: (row,) for row in ROWS if row != "mixed_16"},
}
RunRows = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["openvino", "vllm", "llama"])
    parser.add_argument("--rounds", type=int, default=2, help="times that all are run in turn")
    parser.add_argument("--work", type=Path, default=Path(".cache/serving"), help="scratch folder")
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    prepare = [HERE / "engine.py", "--scenarios", "base_1", "--save-base-and-adapters", work]
    run([*prepare, "--json"])
    found: dict[str, RunRows] = {}
    for number in range(arguments.rounds):
        for name, command in {**OURS, **{name: PEERS[name] for name in arguments.peers}}.items():
            place = () if name == "engine" else ("--work", work)
            rows = rows_of(run([*command, *place, "--json"]))
            for row, value in rows.items():
                found.setdefault(name, {}).setdefault(row, []).append(value)
            if not arguments.json:
                print(f"round {number + 1}, {name}: {rows}", flush=True)
    print(json.dumps(report(found), indent=None if arguments.json else 2))


def run(command: list[Any]) -> dict[str, Any]:
    """Run a script that prints a JSON object last."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rows_of(result: dict[str, Any]) -> dict[str, float]:
    """Return output tokens a second by row."""
    if "ours" in result:
        return {row: result["ours"][row]["tokens_per_s"] for row in ROWS}
    return dict(result["tokens_per_s"])


def report(found: dict[str, RunRows]) -> dict[str, Any]:
    """Return medians over the rounds, and ratios of ours over each peer."""
    medians = {
        name: {row: round(statistics.median(values), 1) for row, values in rows.items()}
        for name, rows in found.items()
    }
    peers = {name: rows for name, rows in medians.items() if name not in OURS}
    ratios = {}
    for name, rows in peers.items():
        ours = medians["engine" if name.startswith("openvino") else "server"]
        for row, candidates in AGAINST.items():
            theirs = next((rows[c] for c in candidates if c in rows), None)
            if theirs:
                ratios[f"{row}_tokens_per_s_vs_{name}"] = round(ours[row] / theirs, 2)
    return {
        "work": {"prompt_tokens": 75, "output_tokens": 64, "requests": 48, "rank": 8},
        "ours": {name: medians[name] for name in OURS},
        "peers": peers,
        "ratios": ratios,
        "all_rounds": found,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
        },
    }


if __name__ == "__main__":
    main()

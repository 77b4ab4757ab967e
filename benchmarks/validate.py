"""Rate and memory of validating a JSONL dataset, beside a plain reading of the same file.

    python benchmarks/validate.py --json [--bytes 1e9] [--format chat|prompt]

A dataset of varied text is written to a temporary folder. Each contender reads it in a process of
its own, so that peak memory is its own: `data.validate` with all checks; a plain loop of json.loads
a line with the same checks of presence (no columns, duplicates or hash); and, when it is installed,
`datasets.load_dataset("json")`, which parses and writes its cache but checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
LATIN = ["ka", "lo", "mi", "ren", "tas", "vo", "pre", "sil", "ungt", "ste", "ri", "and", "er", "o"]
ACCENTED = [*LATIN, "ché", "ñe", "ä", "øs"]
HAN = ["東", "京", "都", "人", "大", "学", "生", "中", "国", "日"]
CONTENDERS = ("hone", "json_loop", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure validation of a JSONL dataset.")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--bytes", type=float, default=1e9, help="size of the dataset")
    parser.add_argument("--format", choices=["chat", "prompt"], default="chat")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.path, args.format)))
        return
    result = compare(int(args.bytes), args.format)
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


def compare(num_bytes: int, format: str) -> dict[str, Any]:
    """Write the dataset, run every contender on it, and set them side by side."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset.jsonl"
        num_rows = write_dataset(path, num_bytes, format)
        size = path.stat().st_size
        names = [name for name in CONTENDERS if name != "datasets" or find_spec("datasets")]
        results = {name: run_contender(name, path, format) for name in names}
    ours = results.pop("hone")
    ratios = {}
    for name, peer in results.items():
        ratios[f"mb_per_s_vs_{name}"] = round(ours["mb_per_s"] / peer["mb_per_s"], 3)
        ratios[f"peak_bytes_vs_{name}"] = round(ours["peak_bytes"] / peer["peak_bytes"], 3)
    return {
        "work": {"format": format, "bytes": size, "rows": num_rows},
        "ours": ours,
        "peers": results,
        "ratios": ratios,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def write_dataset(path: Path, num_bytes: int, format: str) -> int:
    """Write rows of made-up words, all different, until the file has `num_bytes`."""
    rows = 0
    with path.open("w", encoding="utf-8") as file:
        written = 0
        for row in make_rows(format):
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line)
            rows += 1
            written += len(line.encode())
            if written >= num_bytes:
                break
    return rows


def make_rows(format: str) -> Iterator[dict[str, Any]]:
    """Rows of made-up words: of ten, eight in ASCII, one with accents, one in Chinese."""
    draw = random.Random(0)
    vocabularies = [
        ["".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(5000)]
        for parts in [LATIN] * 8 + [ACCENTED, HAN]
    ]
    for number in count(1):
        words = draw.choice(vocabularies)
        question = f"{number} " + " ".join(draw.choices(words, k=8 if format == "prompt" else 25))
        answer = " ".join(draw.choices(words, k=3 if format == "prompt" else 35))
        if format == "prompt":
            yield {"prompt": question, "completion": answer}
        else:
            system = {"role": "system", "content": "You answer the customers of a shop."}
            user = {"role": "user", "content": question}
            yield {"messages": [system, user, {"role": "assistant", "content": answer}]}


def run_contender(name: str, path: Path, format: str) -> dict[str, Any]:
    """Measure one contender in a process of its own, on a file that is in the page cache."""
    command = [sys.executable, __file__, "--contender", name, "--path", str(path)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        [*command, "--format", format], env=environment, capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return result


def measure(name: str, path: Path, format: str) -> dict[str, Any]:
    begin = time.perf_counter()
    cpu_begin = time.process_time()
    rows = {"hone": run_hone, "json_loop": run_json_loop, "datasets": run_datasets}[name](
        path, format
    )
    seconds = time.perf_counter() - begin
    return {
        "rows": rows,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu_begin, 3),
        "mb_per_s": round(path.stat().st_size / seconds / 1e6, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_hone(path: Path, format: str) -> int:
    from data.validate import validate

    report = validate(path)
    if not report.ok:
        raise SystemExit(report.summary())
    return report.num_examples


def run_json_loop(path: Path, format: str) -> int:
    rows = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if format == "prompt":
                good = isinstance(row["prompt"], str) and bool(row["completion"].strip())
            else:
                good = any(m["role"] == "assistant" and m["content"] for m in row["messages"])
            if not good:
                raise SystemExit(f"bad row: {line}")
            rows += 1
    return rows


def run_datasets(path: Path, format: str) -> int:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    cache = str(path.parent / "datasets_cache")
    return len(load_dataset("json", data_files=str(path), split="train", cache_dir=cache))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()

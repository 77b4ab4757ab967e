"""What `auto` settings make of public datasets: the table and the curve of docs/results.md.

    python benchmarks/results.py table --data DIR --out runs/results
    python benchmarks/results.py curve --data DIR --out runs/results --picture docs/images/curve.svg

DIR has a folder for each dataset with train.jsonl and test.jsonl. Each run is `train.sft` with
nothing but its file, then `train.evaluate` of the adapter and of the base on the test rows. Both
commands go on where they were stopped; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = (10, 30, 100, 300, 1000, 3000)  # and all rows
CURVE_ROWS = 500  # test rows of every point
FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
NUMBER = "number after ####"
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """How a dataset is scored.

    Attributes:
        metric: Of `train.evaluate`; NUMBER compares what follows the answer's last ####.
        rows: Test rows asked, a random sample by one seed; None for all.
    """

    metric: str
    rows: int | None = None


TASKS = {
    "banking77": Task("exact_match"),
    "sms_spam": Task("exact_match"),
    "restaurant8k": Task("exact_match"),
    "e2e_nlg": Task("bleu"),
    "gsm8k": Task(NUMBER, 300),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("table", "curve"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets' folders")
    parser.add_argument("--out", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sizes", nargs="*", type=int, help="of the curve; default: all")
    parser.add_argument("--picture", type=Path, help="write the curve as SVG")
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--dtype", default="auto", help="of the engine that answers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "table":
        for name in given.only:
            print(table_row(name, given), flush=True)
    else:
        points = [point for size in sizes(given) if (point := curve_point(size, given))]
        print(json.dumps(points))
        if given.picture:
            draw(points, given.picture)


def table_row(name: str, given: argparse.Namespace) -> str:
    """Run one dataset, and return its line of the table."""
    task = TASKS[name]
    folder = given.out / name
    train = convert(given.data / name / "train.jsonl", folder / "train.jsonl", None)
    test = convert(given.data / name / "test.jsonl", folder / "test.jsonl", task.rows)
    result = fit(train, folder / "run", given)
    base = evaluate(test, None, task.metric, folder / "base.json", given)
    tuned = evaluate(test, folder / "run/adapter", task.metric, folder / "tuned.json", given)
    plan, seconds = result["hyperparameters"], result["seconds"]
    cells = (
        *(name, task.metric, count(train), count(test), show(task, base), show(task, tuned)),
        f"{plan['num_epochs']} epochs, {plan['batch_size']} rows a step",
        *(f"{seconds / 60:.1f}", f"{result['trained_tokens'] / seconds:.0f}"),
    )
    return f"| {' | '.join(map(str, cells))} |"


def sizes(given: argparse.Namespace) -> list[int]:
    every = [*SIZES, count(given.data / "banking77/train.jsonl")]
    return given.sizes or every


def curve_point(size: int, given: argparse.Namespace) -> Row:
    """Train on the first rows of one random order, and score a fixed sample of the test rows."""
    source = given.data / "banking77"
    test = convert(source / "test.jsonl", given.out / "curve/test.jsonl", CURVE_ROWS)
    folder = given.out / f"curve/{size}"
    if size == count(source / "train.jsonl"):  # that is the table's run
        train, run = (
            convert(source / "train.jsonl", given.out / "banking77/train.jsonl", None),
            (given.out / "banking77/run"),
        )
    else:
        train, run = convert(source / "train.jsonl", folder / "train.jsonl", size), folder / "run"
    result = fit(train, run, given)
    score = evaluate(test, run / "adapter", "exact_match", folder / "tuned.json", given)
    point = {
        "rows": size,
        "exact_match": score,
        "minutes": round(result["seconds"] / 60, 1),
        "epochs": result["hyperparameters"]["num_epochs"],
        "steps": result["steps"],
    }
    print(point, file=sys.stderr, flush=True)
    return point


def convert(source: Path, target: Path, limit: int | None) -> Path:
    """Write a dataset's rows, or a random sample of them, as prompt and completion."""
    if target.exists():
        return target
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    if limit is not None:
        random.Random(0).shuffle(rows)
        rows = rows[:limit]
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [as_prompt(row) for row in rows]
    target.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return target


def as_prompt(row: Row) -> Row:
    if "label" in row:
        return {"prompt": f"{row['text']}\n\nLabel:", "completion": f" {row['label']}"}
    return {name: row[name] for name in ("prompt", "completion", "references") if name in row}


def fit(train: Path, run: Path, given: argparse.Namespace) -> Row:
    """Train with `auto` settings unless that is done; a run that was stopped goes on."""
    if not (run / "result.json").exists():
        words = {"train_file": train, "output_dir": run, "models_dir": given.models_dir}
        call("train.sft", *(f"{name}={value}" for name, value in words.items()))
    found: Row = json.loads((run / "result.json").read_text("utf-8"))
    return found


def evaluate(
    test: Path, adapter: Path | None, metric: str, kept: Path, given: argparse.Namespace
) -> float:
    """Return the metric of greedy answers, asked once and kept."""
    if not kept.exists():
        answers = kept.with_suffix(".answers.jsonl")
        kept.parent.mkdir(parents=True, exist_ok=True)
        asked = "exact_match" if metric == NUMBER else metric
        words = ["--file", test, "--metric", asked, "--answers", answers, "--json"]
        words += ["--models-dir", given.models_dir, "--dtype", given.dtype]
        found = json.loads(
            call("train.evaluate", *words, *(["--adapter", adapter] * bool(adapter)))
        )
        if metric == NUMBER:
            said = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
            found[NUMBER] = sum(map(ends_alike, said)) / len(said)
        kept.write_text(json.dumps(found) + "\n", "utf-8")
    return float(json.loads(kept.read_text("utf-8"))[metric])


def ends_alike(record: Row) -> bool:
    """Tell whether an answer's final number is the right one."""
    said, right = (FINAL.findall(text) for text in (record["said"], record["answers"][0]))
    return bool(said) and said[-1].replace(",", "") == right[-1].replace(",", "")


def call(module: str, *words: object) -> str:
    """Run a module of hone; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def count(path: Path) -> int:
    return sum(1 for line in path.open("rb") if line.strip())


def show(task: Task, value: float) -> str:
    return f"{value:.2f}" if task.metric == "bleu" else f"{value:.1%}"


def draw(points: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    x, y = [point["rows"] for point in points], [100 * point["exact_match"] for point in points]
    axes.plot(x, y, "o-")
    for row, value in zip(x, y, strict=True):
        axes.annotate(f"{value:.1f}", (row, value), (0, 6), textcoords="offset points", ha="center")
    axes.set(xscale="log", ylim=(0, 105), xlabel="training rows", ylabel="exact match, %")
    axes.set_xticks(x, [f"{row:,}" for row in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""What a customer gets: train on a dataset through the API, then score held-out rows.

Starts a server, uploads the training file, runs one job with the official client, completes every
test row with base and tuned model, and scores them. Peers: the base model on the same rows.

    python benchmarks/task.py --train banking77/train.jsonl --test banking77/test.jsonl \\
        --metric exact_match --epochs 1 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from rich.progress import track

from data.accounts import create_account
from data.db import Database
from data.settings import load_settings
from serve.background import running_server

CLIENTS = 16
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--metric", choices=("exact_match", "bleu"), default="exact_match")
    parser.add_argument("--epochs", default="auto", help="number, or auto")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--learning-rate-multiplier", default="auto")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--limit", type=int, help="score only the first rows")
    parser.add_argument("--home", type=Path, help="HONE_HOME to use; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print the result only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = run(arguments, arguments.home or Path(scratch))
    print(json.dumps(result, indent=None if arguments.json else 2))


def run(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    settings = load_settings(overrides=[f"home={home}"])
    database = Database(settings.effective_database_url)
    database.migrate()
    _, key = create_account(database, f"benchmark-{int(time.time())}")
    rows = [json.loads(line) for line in arguments.test.read_text("utf-8").splitlines()]
    rows = rows[: arguments.limit]
    with running_server(home) as base_url:
        client = OpenAI(base_url=base_url, api_key=key, timeout=7200, max_retries=0)
        job, train_s = train(client, settings.model, arguments)
        scores, seconds = {}, {}
        for name, model in (("base", settings.model), ("tuned", job.fine_tuned_model)):
            started = time.monotonic()
            answers = complete(client, str(model), rows, arguments.max_tokens)
            seconds[name] = round(time.monotonic() - started, 1)
            scores[name] = score(arguments.metric, answers, rows)
    return {
        "work": {
            "train": arguments.train.parent.name + "/" + arguments.train.name,
            "test_rows": len(rows),
            "metric": arguments.metric,
            "hyperparameters": job.hyperparameters.model_dump(),
        },
        "ours": {
            arguments.metric: scores["tuned"],
            "job_minutes": round(train_s / 60, 1),
            "trained_tokens": job.trained_tokens,
            "trained_tokens_per_s": round((job.trained_tokens or 0) / train_s, 1),
            "scoring_s": seconds["tuned"],
        },
        "peers": {"base": {arguments.metric: scores["base"], "scoring_s": seconds["base"]}},
        "ratios": {"scoring_rows_per_s_vs_base": round(seconds["base"] / seconds["tuned"], 2)},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "memory_gb": round(psutil.virtual_memory().total / 1e9),
        },
    }


def train(client: OpenAI, base: str, arguments: argparse.Namespace) -> tuple[Any, float]:
    hyperparameters = {
        "n_epochs": _number(arguments.epochs),
        "batch_size": _number(arguments.batch_size),
        "learning_rate_multiplier": _number(arguments.learning_rate_multiplier),
    }
    with arguments.train.open("rb") as stream:
        uploaded = client.files.create(file=stream, purpose="fine-tune")
    started = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=uploaded.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[arg-type]
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise SystemExit(f"the job {job.status}: {job.error}")
    return job, time.monotonic() - started


def complete(client: OpenAI, model: str, rows: list[Row], max_tokens: int) -> list[str]:
    def one(row: Row) -> str:
        answer = client.completions.create(
            model=model, prompt=row["prompt"], max_tokens=max_tokens, temperature=0
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(track(pool.map(one, rows), f"asking {model}", total=len(rows)))


def score(metric: str, answers: list[str], rows: list[Row]) -> float:
    """Return exact match (share) or sacreBLEU (0-100, all references of a row)."""
    if metric == "exact_match":
        hits = [a.strip() == r["completion"].strip() for a, r in zip(answers, rows, strict=True)]
        return round(sum(hits) / len(hits), 4)
    import sacrebleu

    references = [row.get("references") or [row["completion"]] for row in rows]
    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    stripped = [answer.strip() for answer in answers]
    return round(sacrebleu.corpus_bleu(stripped, columns).score, 2)  # type: ignore[arg-type]


def _number(text: str) -> float | int | str:
    if text == "auto":
        return text
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()

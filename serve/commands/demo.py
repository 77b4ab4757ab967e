"""`hone demo`: the main job, done through the public interface only.

Starts a server, makes an account, uploads a dataset, runs a fine-tuning job, then asks the base and
the tuned model the same held-out questions with the official `openai` client. Nothing in here has
access that a customer's own script would not have.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data.errors import InvalidInput, TrainingFailed
from serve.commands.common import AsJson, open_home

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

    from data.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIENTS = 8  # questions asked at the same time: the server batches them
Row = dict[str, str]


def demo(
    dataset: Annotated[
        Path, typer.Option(help="Folder with train.jsonl and test.jsonl.")
    ] = EXAMPLES / "support_intents",
    questions: Annotated[int, typer.Option(min=1, help="Held-out rows to ask.")] = 60,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the base model on an example dataset and compare the two, end to end."""
    from openai import OpenAI
    from rich.console import Console

    from serve.background import running_server

    console = Console(stderr=as_json)
    train_file, test_rows = _dataset(dataset, questions)
    settings, database = open_home()
    account, key = _account(database)
    started = time.monotonic()
    with ExitStack() as stack:
        with console.status("Starting the server (the first time it fetches the base model)"):
            base_url = stack.enter_context(running_server(settings.home))
        console.print(f"The server answers at {base_url}; its log is {settings.home}/server.log")
        client = OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=600)
        console.print(f"Uploading {train_file.name} for the account [bold]{account}[/]")
        with train_file.open("rb") as stream:
            uploaded = client.files.create(file=stream, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=settings.model, training_file=uploaded.id, suffix="demo"
        )
        job = _wait(client, job, console)
        training_s = time.monotonic() - started
        answers = {
            model: _ask(client, model, test_rows, console)
            for model in (settings.model, str(job.fine_tuned_model))
        }
    result = _result(job, answers, test_rows, training_s, time.monotonic() - started)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    _show(console, answers, test_rows, result)
    _show_next(console, settings, key, str(job.fine_tuned_model))


def _dataset(folder: Path, questions: int) -> tuple[Path, list[Row]]:
    train_file, test_file = folder / "train.jsonl", folder / "test.jsonl"
    for path in (train_file, test_file):
        if not path.is_file():
            raise InvalidInput(f"{path} does not exist; the folder must hold it")
    rows = [json.loads(line) for line in test_file.read_text("utf-8").splitlines() if line.strip()]
    return train_file, rows[:questions]


def _account(database: Any) -> tuple[str, str]:
    """Make the account `demo`, or another key for it when the demo ran before."""
    from sqlalchemy import select

    from data import accounts
    from data.tables import Project

    with database.read() as session:
        project = session.scalar(select(Project).where(Project.slug == "demo"))
    if project is None:
        project, key = accounts.create_account(database, "demo")
    else:
        _, key = accounts.create_key(database, project.id, "demo")
    return project.slug, key


def _wait(client: OpenAI, job: FineTuningJob, console: Any) -> FineTuningJob:
    """Show a progress bar until the job ends; events feed it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown: set[str] = set()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        bar = progress.add_task("Fine-tuning", total=None, note="")
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
            events = client.fine_tuning.jobs.list_events(job.id, limit=50).data
            for event in sorted((e for e in events if e.id not in shown), key=_order(events)):
                shown.add(event.id)
                data = event.data if isinstance(event.data, dict) else {}
                if event.type == "metrics" and "total_steps" in data:
                    loss = data.get("train_loss")
                    note = "" if loss is None else f"loss {loss:.3f}"
                    progress.update(
                        bar, completed=data["step"], total=data["total_steps"], note=note
                    )
                else:
                    progress.console.print(f"  {event.message}")
    if job.status != "succeeded":
        reason = job.error.message if job.error else job.status
        raise TrainingFailed(f"The job {job.id} {job.status}: {reason}")
    return job


def _order(events: Sequence[Any]) -> Any:
    """Oldest first: the API lists events newest first."""
    position = {event.id: -index for index, event in enumerate(events)}
    return lambda event: position[event.id]


def _ask(client: OpenAI, model: str, rows: Sequence[Row], console: Any) -> list[str]:
    from rich.progress import track

    def complete(row: Row) -> str:
        answer = client.completions.create(
            model=model, prompt=row["prompt"], max_tokens=16, temperature=0
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(complete, rows)
        return list(track(answers, f"Asking {model}", total=len(rows), console=console))


def _is_right(answer: str, row: Row) -> bool:
    return answer.strip() == row["completion"].strip()


def _result(
    job: FineTuningJob,
    answers: dict[str, list[str]],
    rows: Sequence[Row],
    training_s: float,
    total_s: float,
) -> dict[str, Any]:
    accuracy = {
        model: sum(map(_is_right, texts, rows)) / len(rows) for model, texts in answers.items()
    }
    return {
        "job": job.id,
        "fine_tuned_model": job.fine_tuned_model,
        "trained_tokens": job.trained_tokens,
        "hyperparameters": job.hyperparameters.model_dump() if job.hyperparameters else {},
        "questions": len(rows),
        "exact_match": accuracy,
        "training_s": round(training_s, 1),
        "total_s": round(total_s, 1),
    }


def _show(
    console: Any, answers: dict[str, list[str]], rows: Sequence[Row], result: dict[str, Any]
) -> None:
    from rich.markup import escape
    from rich.table import Table

    (base, base_texts), (_, tuned_texts) = answers.items()
    table = Table(title="The same question to both models")
    for header in ("message", base, "tuned", "right answer"):
        table.add_column(header, overflow="fold", max_width=44)
    for row, before, after in list(zip(rows, base_texts, tuned_texts, strict=True))[:5]:
        texts = (row["prompt"], before, after, row["completion"])
        table.add_row(*(escape(" ".join(text.split())) for text in texts))
    console.print(table)
    summary = Table(title=f"Held-out accuracy, {len(rows)} messages, exact match")
    summary.add_column("model", overflow="fold")
    summary.add_column("accuracy", justify="right")
    for model, share in result["exact_match"].items():
        summary.add_row(model, f"{share:.1%}")
    console.print(summary)
    console.print(
        f"{result['trained_tokens']} tokens trained; {result['training_s']:.0f} s to the tuned "
        f"model, {result['total_s']:.0f} s in all"
    )


def _show_next(console: Any, settings: Settings, key: str, model: str) -> None:
    console.print("\nGo on with the server, and ask it from another terminal:", highlight=False)
    hone = Path(sys.executable).with_name("hone")
    console.print(f"  {_short(hone)} serve home={settings.home}", highlight=False)
    body = json.dumps(
        {"model": model, "prompt": "Where is my parcel?\n\nIntent:", "temperature": 0}
    )
    console.print(
        f"  curl http://127.0.0.1:{settings.port}/v1/completions \\\n"
        f"    -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

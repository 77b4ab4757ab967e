"""`hone jobs`: fine-tuning jobs, as `POST /v1/fine_tuning/jobs` makes them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.common import (
    Account,
    AsJson,
    choose_account,
    clock,
    open_home,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from data.db import Database
    from data.tables import Job

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)

POLL_S = 1.0
PAGE = 1000


@app.command("create")
def create(
    training_file: Annotated[str, typer.Argument(help="File id, or a path to upload first.")],
    account: Account = None,
    validation_file: Annotated[str | None, typer.Option(help="File id.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the model's name.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default auto.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step; default auto.")] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(help="Default auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, and kept.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Print events until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Queue a job; the worker of a running server (or `python -m train.worker`) does it."""
    from data import jobs
    from data.job_spec import JobSpec
    from serve.engine.base_spec import find_spec

    settings, database = open_home()
    project = choose_account(database, account)
    spec = JobSpec(
        model=find_spec(settings.model).name,
        training_file=_upload_if_path(settings, database, project.id, training_file),
        validation_file=validation_file,
        hyperparameters={
            "n_epochs": epochs,
            "batch_size": batch_size,
            "learning_rate_multiplier": learning_rate_multiplier,
        },
        suffix=suffix,
        seed=seed,
    )
    job = jobs.create(database, project.id, spec, [spec.model], settings.limits)
    if not as_json:
        print(job.id)
    if wait:
        job = _follow(database, project.id, job.id, quiet=as_json)
    if as_json:
        print_json(_describe(job))
    if job.status in ("failed", "cancelled"):
        raise typer.Exit(1)


@app.command("list")
def list_jobs(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's jobs, newest first."""
    from data import jobs

    _, database = open_home()
    found, _ = jobs.list_jobs(database, choose_account(database, account).id, PAGE)
    if as_json:
        print_json([_describe(job) for job in found])
    else:
        rows = [(j.id, j.status, clock(j.created_at), j.fine_tuned_model) for j in found]
        print_table(("id", "status", "created", "model"), rows)


@app.command("show")
def show(job_id: str, account: Account = None) -> None:
    """Print all that is known of a job, as JSON."""
    from data import jobs

    _, database = open_home()
    print_json(_describe(jobs.get(database, choose_account(database, account).id, job_id)))


@app.command("logs")
def logs(
    job_id: str,
    account: Account = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Print a job's events, oldest first."""
    _, database = open_home()
    _follow(database, choose_account(database, account).id, job_id, once=not follow)


@app.command("pause")
def pause(job_id: str, account: Account = None) -> None:
    """Stop a job at a checkpoint, to go on later; another job may have its place."""
    from data import job_pause

    _, database = open_home()
    job = job_pause.pause(database, choose_account(database, account).id, job_id)
    print(f"{job.id} is {job.status}" + (", its trainer is stopping" if job.worker_id else ""))


@app.command("resume")
def resume(job_id: str, account: Account = None) -> None:
    """Queue a paused job again; it goes on from its newest checkpoint."""
    from data import job_pause

    _, database = open_home()
    job = job_pause.resume(database, choose_account(database, account).id, job_id)
    print(f"{job.id} is {job.status}")


@app.command("cancel")
def cancel(job_id: str, account: Account = None) -> None:
    """Stop a job; its checkpoints stay."""
    from data import jobs

    _, database = open_home()
    job = jobs.request_cancel(database, choose_account(database, account).id, job_id)
    print(f"{job.id} is {job.status}" + ("" if job.status == "cancelled" else ", stopping"))


def _upload_if_path(settings: Any, database: Database, project_id: str, given: str) -> str:
    from data.errors import InvalidInput
    from data.files import FileStore

    path = Path(given)
    if given.startswith("file-"):
        return given
    if not path.is_file():
        raise InvalidInput(f"{given} is neither a file id (file-...) nor a file")
    with path.open("rb") as stream:
        store = FileStore(
            database, settings.effective_blob_url, settings.max_upload_mb << 20, settings.limits
        )
        return store.create(project_id, stream, path.name, "fine-tune").id


def _follow(
    database: Database, project_id: str, job_id: str, *, once: bool = False, quiet: bool = False
) -> Job:
    from data import jobs

    seen = 0
    while True:
        job = jobs.get(database, project_id, job_id)
        events, _ = jobs.list_events(database, project_id, job_id, PAGE)
        for event in reversed(events):
            if event.seq > seen and not quiet:
                mark = "" if event.level == "info" else f"{event.level}: "
                print(f"{clock(event.created_at)}  {mark}{event.message}")
        seen = events[0].seq if events else seen
        if once or job.status in jobs.FINAL:
            return job
        time.sleep(POLL_S)


def _describe(job: Job) -> dict[str, Any]:
    names = (
        *("id", "status", "model", "fine_tuned_model", "training_file", "validation_file"),
        *("hyperparameters", "suffix", "seed", "trained_tokens", "result_files", "error"),
        *("created_at", "started_at", "finished_at", "estimated_finish"),
    )
    return {name: getattr(job, name) for name in names}

"""`hone files`: datasets in, checked and converted."""

from __future__ import annotations

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
    from data.prepare import Preparation

app = typer.Typer(help="Datasets: upload, list, check, convert.", no_args_is_help=True)

Format = Annotated[str, typer.Option("--format", help="auto, or the format to insist on.")]


@app.command("upload")
def upload(
    path: Path,
    account: Account = None,
    purpose: Annotated[str, typer.Option(help="What the file is for.")] = "fine-tune",
    as_json: AsJson = False,
) -> None:
    """Store a file for an account, exactly as `POST /v1/files` does."""
    from data.errors import InvalidInput
    from data.files import FileStore

    if not path.is_file():
        raise InvalidInput(f"{path} is not a file; give the path of a JSONL file")
    settings, database = open_home()
    project = choose_account(database, account)
    store = FileStore(
        database, settings.effective_blob_url, settings.max_upload_mb << 20, settings.limits
    )
    with path.open("rb") as stream:
        record = store.create(project.id, stream, path.name, purpose)
    if as_json:
        print_json({"id": record.id, "bytes": record.bytes, "filename": record.filename})
    else:
        print(f"{record.id} ({record.filename}, {record.bytes} bytes)")


@app.command("list")
def list_files(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's files."""
    from data.files import FileStore

    settings, database = open_home()
    project = choose_account(database, account)
    found, _ = FileStore(database, settings.effective_blob_url).list(project.id)
    if as_json:
        print_json([{"id": f.id, "filename": f.filename, "purpose": f.purpose} for f in found])
    else:
        rows = [(f.id, f.filename, f.purpose, f.bytes, clock(f.created_at)) for f in found]
        print_table(("id", "name", "purpose", "bytes", "created"), rows)


@app.command("report")
def report(file_id: str, account: Account = None, as_json: AsJson = False) -> None:
    """Check every row of a stored dataset and tell all that is wrong with it."""
    from data.files import FileStore

    settings, database = open_home()
    project = choose_account(database, account)
    found = FileStore(database, settings.effective_blob_url).report(project.id, file_id)
    if as_json:
        print_json(found)
        return
    good = "ready to train on" if found["ok"] else "not usable yet"
    print(f"{found['name']}: {found['num_examples']} examples, {found['format']}, {good}")
    for kind in ("problems", "warnings"):
        for item in found[kind]:
            where = f"{item['line']}:{item['column']}: " if item["line"] else ""
            print(f"  {where}{item['code']}: {item['message']} {item['fix']}")
    if not found["ok"]:
        raise typer.Exit(1)


@app.command("validate")
def validate_file(path: Path, format: Format = "auto", as_json: AsJson = False) -> None:
    """Check a local dataset: every bad line with line, column, code and fix."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from data.validate import validate

    size = path.stat().st_size if path.is_file() else None
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=size)
        found = validate(
            path, format, on_progress=lambda done: progress.update(task, completed=done)
        )
    if as_json:
        print_json(found.to_dict())
    else:
        print(found.summary())
    if not found.ok:
        raise typer.Exit(1)


@app.command("prepare")
def prepare(
    path: Path,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSONL to write.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept every suggested fix.")] = False,
    prompt_column: Annotated[str, typer.Option(help="Column with the prompts.")] = "prompt",
    completion_column: Annotated[str, typer.Option(help="With the answers.")] = "completion",
) -> None:
    """Turn CSV, TSV, XLSX, JSON, JSONL or TXT into JSONL, with advice."""
    from data.prepare import inspect

    preparation = inspect(path, prompt_column=prompt_column, completion_column=completion_column)
    print(f"{path}: {len(preparation.rows)} rows, {preparation.task}")
    for advice in preparation.advice:
        print(f"- {advice.message}" + (f" {advice.fix}" if advice.fix else ""))
    preparation.apply(_accepted(preparation, yes))
    for written in preparation.write(output):
        print(f"wrote {written}")
    minutes = max(1, round(preparation.estimate_s() / 60))
    print(f"Training three epochs takes about {minutes} min on two CPU cores.")


def _accepted(preparation: Preparation, yes: bool) -> set[str] | None:
    """Ask about each fix that is open; None accepts the usual ones, as without a terminal."""
    import sys

    if yes or not sys.stdin.isatty():
        return None
    open_fixes: list[Any] = [a for a in preparation.advice if a.fix and not a.necessary]
    return {
        advice.code
        for advice in open_fixes
        if typer.confirm(f"{advice.fix}?", default=advice.fix_applied_by_default)
    }

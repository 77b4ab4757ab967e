"""`hone models upgrade`: recipes run again on a new base, compared, promoted by a rule."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.common import (
    AsJson,
    choose_account,
    open_home,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from data.db import Database
    from data.settings import Settings
    from data.tables import Project
    from data.upgrades import Bases, Recipe

Tries = set[tuple[str, str | None]]  # versions, each with the last job that upgrades it
POLL_S = 1.0
BASE_HELP = "Name in configs/models, YAML, folder or hub id."


def upgrade(
    old: Annotated[str, typer.Option("--from", help=f"The base in use. {BASE_HELP}")],
    new: Annotated[str, typer.Option("--to", help=f"The base to move to. {BASE_HELP}")],
    account: Annotated[
        str | None, typer.Option("--account", "-a", help="One account; without it, all of them.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    undo: Annotated[
        bool,
        typer.Option(
            "--undo",
            help="Move upgraded aliases back to the old base's versions; --dry-run says which.",
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--detach", help="Watch the jobs, or leave them to the worker.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train every alias's recipe again on a new base, compare on the same rows, promote by rule.

    The worker of a running server (or `python -m train.worker`) does the jobs. An alias moves to
    the new base's version unless that is worse on the rows, and not by chance. Running the command
    again goes on where it was: what is done or under way is not done twice. A server of the old
    base serves the old versions until one of the new base is started.
    """

    settings, database = open_home()
    bases = _bases(old, new)
    projects = _projects(database, account)
    if undo:
        _undo(database, projects, bases, dry_run, as_json)
        return
    recipes = _plan(database, projects, bases)
    held: Tries = set()
    if not dry_run:
        held = _start(database, recipes, bases, settings)
        if wait:
            _warn_of_no_worker(recipes, settings)
            recipes = _watch(database, projects, bases, settings, held, quiet=as_json)
    if as_json:
        print_json([recipe.as_dict() for recipe in recipes])
    else:
        _show(recipes, bases)
        _hint(recipes)
    if not dry_run and not wait:
        _warn_of_no_worker(recipes, settings)
    if any(one.standing == "due" and one.job_id and _try_of(one) not in held for one in recipes):
        raise typer.Exit(1)  # a job failed


def _undo(
    database: Database, projects: list[Project], bases: Bases, dry_run: bool, as_json: bool
) -> None:
    """Take aliases back, or say which would be; exits with 1 where one could not."""
    from data import upgrades

    moves = [move for one in projects for move in upgrades.undo(database, one, bases, dry_run)]
    if as_json:
        print_json([asdict(move) for move in moves])
    else:
        heading = "would name again" if dry_run else "names again"
        rows = [(move.alias, move.version or "", move.problem) for move in moves]
        print_table(("alias", heading, "problem"), rows)
    if any(move.version is None for move in moves):
        raise typer.Exit(1)


def _bases(old: str, new: str) -> Bases:
    from data.errors import InvalidInput
    from data.upgrades import Bases
    from serve.engine.base_spec import find_spec

    names = [find_spec(given).name for given in (old, new)]
    if names[0] == names[1]:
        raise InvalidInput(f"--from and --to are both {names[0]}; give two bases")
    sources = [
        str(Path(given).resolve()) if Path(given).exists() else given for given in (old, new)
    ]
    return Bases(*names, *sources)


def _projects(database: Database, account: str | None) -> list[Project]:
    from sqlalchemy import select

    from data.tables import Project

    if account is not None:
        return [choose_account(database, account)]
    with database.read() as session:
        return list(session.scalars(select(Project).order_by(Project.created_at)))


def _plan(database: Database, projects: list[Project], bases: Bases) -> list[Recipe]:
    from data import upgrades

    return [recipe for project in projects for recipe in upgrades.plan(database, project, bases)]


def _try_of(recipe: Recipe) -> tuple[str, str | None]:
    return recipe.version_id, recipe.job_id


def _start(database: Database, recipes: list[Recipe], bases: Bases, settings: Settings) -> Tries:
    """Queue what is due; what an account's cap holds back stays due, and is returned."""
    from data import upgrades
    from data.errors import QuotaExceeded

    held: Tries = set()
    for recipe in recipes:
        if recipe.standing == "due":
            try:
                upgrades.start(database, recipe, bases, settings.limits)
            except QuotaExceeded as error:
                recipe.reason = error.message
                held.add(_try_of(recipe))
    return held


def _watch(
    database: Database,
    projects: list[Project],
    bases: Bases,
    settings: Settings,
    held: Tries,
    quiet: bool,
) -> list[Recipe]:
    """Wait for the jobs, queueing what a cap `held` back; one that fails is not tried again."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("upgrading"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    note = TextColumn("{task.fields[note]}")
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), note, console=console, disable=quiet) as progress:
        task = progress.add_task("upgrading", note="")
        while True:
            recipes = _plan(database, projects, bases)
            held_back = [r for r in recipes if r.standing == "due" and _try_of(r) in held]
            held = _start(database, held_back, bases, settings)
            left = [r for r in recipes if r.standing == "running" or r in held_back]
            note_text = ", ".join(f"{r.account}: {_last_event(database, r)}" for r in left[:1])
            progress.update(
                task, total=len(recipes), completed=len(recipes) - len(left), note=note_text
            )
            if not left:
                return recipes
            time.sleep(POLL_S)


def _last_event(database: Database, recipe: Recipe) -> str:
    from data import jobs

    if recipe.standing == "due" or recipe.job_id is None:
        return recipe.reason
    events, _ = jobs.list_events(database, recipe.project_id, recipe.job_id, 1)
    return events[0].message.splitlines()[0][:80] if events else ""


def _show(recipes: list[Recipe], bases: Bases) -> None:
    rows: list[tuple[Any, ...]] = []
    for recipe in recipes:
        note = recipe.reason or (f"compared on {recipe.rows}" if recipe.rows else "")
        aliases = ", ".join([*recipe.moved, *recipe.aliases])
        rows.append((recipe.account, aliases, recipe.standing, recipe.candidate or "", note))
    print_table(("account", "alias", "standing", f"on {bases.new}", "note"), rows)


def _hint(recipes: list[Recipe]) -> None:
    for recipe in recipes:
        if recipe.standing in ("refused", "rolled_back"):
            for alias in recipe.aliases:
                print(f"overrule: hone models promote {recipe.candidate} --alias {alias}")


def _warn_of_no_worker(recipes: list[Recipe], settings: Settings) -> None:
    """Say on stderr that jobs wait for a worker, where none lives on this machine."""
    from data import presence

    is_open = any(recipe.standing == "running" for recipe in recipes)
    if is_open and not presence.alive(settings.workers_dir):
        print(
            "No worker runs here, and the jobs wait for one: start `hone serve` or "
            "`python -m train.worker`.",
            file=sys.stderr,
        )

"""What every command shares: opening HONE_HOME, choosing the account, printing tables or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data.errors import InvalidInput

if TYPE_CHECKING:
    from data.db import Database
    from data.settings import Settings
    from data.tables import Project

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Account = Annotated[
    str | None,
    typer.Option(
        "--account", "-a", help="Account name or project id; not needed when there is only one."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as key=value, e.g. home=/srv/hone.", show_default=False),
]


def open_home(overrides: Sequence[str] = ()) -> tuple[Settings, Database]:
    """Read the settings and open the migrated database."""
    from data.db import Database
    from data.settings import load_settings

    settings = load_settings(overrides=overrides)
    database = Database(settings.effective_database_url)
    database.migrate()
    return settings, database


def choose_account(database: Database, wanted: str | None) -> Project:
    """Find the account by name, slug or id; the only one when none is named."""
    from sqlalchemy import or_, select

    from data.tables import Project

    query = select(Project).order_by(Project.created_at)
    if wanted is not None:
        query = query.where(
            or_(Project.name == wanted, Project.slug == wanted, Project.id == wanted)
        )
    with database.read() as session:
        found = list(session.scalars(query))
    if len(found) == 1:
        return found[0]
    if wanted is not None:
        raise InvalidInput(f'No account "{wanted}"; `hone accounts list` shows them')
    if not found:
        raise InvalidInput("There is no account yet; make one with `hone accounts create NAME`")
    names = ", ".join(project.slug for project in found)
    raise InvalidInput(f"There are several accounts; name one with --account: {names}")


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, or say that there is nothing."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print("none")
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(soft_wrap=False).print(table, markup=False)


def clock(seconds: int | None) -> str:
    """Show a unix time in the reader's own time zone."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

"""`hone access`: who asks for an account, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.common import AsJson, clock, open_home, print_json, print_table

if TYPE_CHECKING:
    from data.tables_accounts import AccessRequest

app = typer.Typer(help="Requests for access.", no_args_is_help=True)

Note = Annotated[str | None, typer.Option("--note", help="A word for the record.")]
LISTED = 100


@app.command("list")
def list_requests(
    status: Annotated[
        str | None, typer.Option(help="pending, waitlisted, approved, denied")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the requests, oldest first."""
    from data import access

    _, database = open_home()
    found: list[AccessRequest] = []
    after, more = None, True
    while more:
        page, more = access.list_requests(database, LISTED, after, status)
        found += page
        after = page[-1].id if page else None
    if as_json:
        names = ("id", "name", "email", "organization", "use_case", "volume", "status", "note")
        print_json([{name: getattr(request, name) for name in names} for request in found])
    else:
        rows = [(r.id, r.status, clock(r.created_at), r.organization, r.email) for r in found]
        print_table(("id", "status", "asked", "organization", "email"), rows)


@app.command("approve")
def approve(
    request_id: str,
    account: Annotated[str | None, typer.Option(help="Name, if not the organization's.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="The only models it may use; repeatable.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=0)] = None,
    requests_per_day: Annotated[int | None, typer.Option(min=0)] = None,
    spend_limit: Annotated[
        float | None, typer.Option(min=0, help="US dollars a calendar month.")
    ] = None,
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Make the account with its limits, and its first API key, which is shown this once."""
    from data import access
    from serve.engine.base_spec import find_spec

    settings, database = open_home()
    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "requests_per_day": requests_per_day,
    }
    terms = access.Terms(
        {name: value for name, value in given.items() if value is not None},
        None if spend_limit is None else round(100 * spend_limit),
        models,
    )
    request, project, key = access.approve(
        database,
        request_id,
        account,
        note,
        terms,
        find_spec(settings.model).name,
        settings.limits,
    )
    if as_json:
        print_json({"id": request.id, "project_id": project.id, "api_key": key})
    else:
        print(f"account {project.slug} ({project.id}) for {request.email}")
        print(f"api key {key}\nKeep it: it is not stored.")


@app.command("deny")
def deny(request_id: str, note: Note = None) -> None:
    """Deny a request."""
    from data import access

    _, database = open_home()
    print(f"{request_id} is {access.decide(database, request_id, 'denied', note).status}")


@app.command("waitlist")
def waitlist(request_id: str, note: Note = None) -> None:
    """Keep a request for later."""
    from data import access

    _, database = open_home()
    print(f"{request_id} is {access.decide(database, request_id, 'waitlisted', note).status}")

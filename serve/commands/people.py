"""`hone people`: who signs in to the web pages."""

from __future__ import annotations

import secrets
from typing import Annotated

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

app = typer.Typer(help="People who sign in to the web pages.", no_args_is_help=True)

Login = Annotated[str, typer.Argument(help="What they sign in with, such as an email address.")]
Password = Annotated[
    str | None,
    typer.Option(
        "--password-from-env",
        envvar="HONE_PASSWORD",
        help="From the environment variable HONE_PASSWORD; default: one is made and shown once.",
    ),
]


@app.command("add")
def add(
    login: Login,
    account: Account = None,
    name: Annotated[str, typer.Option(help="As others see them.")] = "",
    role: Annotated[str, typer.Option(help="admin, reviewer or labeler.")] = "labeler",
    password: Password = None,
    as_json: AsJson = False,
) -> None:
    """Add somebody to an account."""
    from data import people

    _, database = open_home()
    project = choose_account(database, account)
    chosen = password or secrets.token_urlsafe(12)
    person = people.create(database, project.id, login, name, role, chosen)
    shown = None if password else chosen
    if as_json:
        print_json({"id": person.id, "login": person.login, "role": role, "password": shown})
        return
    print(f"{person.login} may sign in at /web as {role} of {project.slug}")
    if shown:
        print(f"password, shown this once: {shown}")


@app.command("list")
def list_people(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's people."""
    from data import people

    _, database = open_home()
    found = people.list_people(database, choose_account(database, account).id)
    if as_json:
        names = ("id", "login", "name", "role", "disabled", "created_at")
        print_json([{name: getattr(person, name) for name in names} for person in found])
        return
    rows = [
        (p.login, p.name, p.role, "disabled" if p.disabled else "", clock(p.created_at))
        for p in found
    ]
    print_table(("login", "name", "role", "", "added"), rows)


@app.command("role")
def role(login: Login, role: Annotated[str, typer.Argument(help="The new one.")]) -> None:
    """Change what somebody may do."""
    from data import people

    _, database = open_home()
    print(f"{people.change(database, login, role=role).login} is {role} now")


@app.command("password")
def password(login: Login, password: Password = None) -> None:
    """Give somebody a new password; their sessions end."""
    from data import people

    _, database = open_home()
    chosen = password or secrets.token_urlsafe(12)
    people.change(database, login, password=chosen)
    print(f"{login} has a new password" + ("" if password else f", shown this once: {chosen}"))


@app.command("disable")
def disable(login: Login) -> None:
    """Shut somebody out at once; what they judged stays."""
    from data import people

    _, database = open_home()
    people.change(database, login, disabled=True)
    print(f"{login} may not sign in any more")


@app.command("enable")
def enable(login: Login) -> None:
    """Let somebody in again."""
    from data import people

    _, database = open_home()
    people.change(database, login, disabled=False)
    print(f"{login} may sign in again")

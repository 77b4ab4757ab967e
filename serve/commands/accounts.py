"""`hone accounts`, `hone keys`, `hone admin-keys`: who may call, and with which key."""

from __future__ import annotations

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

accounts_app = typer.Typer(help="Customers of this installation.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of an account.", no_args_is_help=True)
admin_keys_app = typer.Typer(help="Keys of the operators.", no_args_is_help=True)

KeyName = Annotated[str, typer.Option("--name", help="What the key is for.")]

Reason = Annotated[str, typer.Option("--reason", help="Why; the account reads it.")]


@accounts_app.command("create")
def create_account(name: str, as_json: AsJson = False) -> None:
    """Make an account and its first API key, which is shown this once."""
    from data import accounts

    _, database = open_home()
    project, key = accounts.create_account(database, name)
    if as_json:
        print_json({"project_id": project.id, "slug": project.slug, "api_key": key})
    else:
        print(f"account {project.slug} ({project.id})\napi key {key}\nKeep it: it is not stored.")


@accounts_app.command("list")
def list_accounts(as_json: AsJson = False) -> None:
    """List the accounts."""
    from data import accounts

    _, database = open_home()
    projects = accounts.list_accounts(database)
    if as_json:
        print_json([{"id": p.id, "name": p.name, "status": p.status} for p in projects])
    else:
        rows = [(p.slug, p.id, p.status, clock(p.created_at), p.name) for p in projects]
        print_table(("account", "id", "status", "created", "name"), rows)


@accounts_app.command("suspend")
def suspend(name: str, reason: Reason) -> None:
    """Stop an account: its calls, streams, jobs and adapters, within seconds."""
    from data import safety

    _, database = open_home()
    project = choose_account(database, name)
    case = safety.suspend(database, project.id, reason)
    print(f"{project.slug} is suspended, case {case.id}; {len(case.paused_jobs)} jobs are paused")


@accounts_app.command("cases")
def cases(
    waiting: Annotated[bool, typer.Option(help="Only those whose appeal has no answer.")] = False,
    as_json: AsJson = False,
) -> None:
    """List warnings and suspensions, newest first, and the appeals to them."""
    from data import safety

    _, database = open_home()
    found, _ = safety.list_cases(database, waiting)
    if as_json:
        names = ("id", "project_id", "notice", "reason", "created_at", "closed_at", "appeal")
        print_json([{name: getattr(case, name) for name in names} for case in found])
        return
    rows = [
        (
            *(case.id, case.project_id, case.notice, clock(case.created_at)),
            "closed" if case.closed_at else "open",
            case.reason,
            (case.appeal or {}).get("message", ""),
        )
        for case in found
    ]
    print_table(("case", "account", "notice", "opened", "state", "reason", "appeal"), rows)


@accounts_app.command("answer")
def answer(case: str, message: str) -> None:
    """Answer the appeal to a case; the account reads it. `reinstate` lets the account go on."""
    from data import safety

    _, database = open_home()
    safety.answer_appeal(database, case, message)
    print(f"the appeal to {case} is answered")


@accounts_app.command("reinstate")
def reinstate(name: str) -> None:
    """Let a suspended account go on, and its jobs."""
    from data import safety

    _, database = open_home()
    project = safety.reinstate(database, choose_account(database, name).id)
    print(f"{project.slug} is {project.status}")


@keys_app.command("create")
def create_key(
    account: Account = None,
    name: KeyName = "",
    role: Annotated[str, typer.Option(help="owner, member, reader or labeler.")] = "owner",
    as_json: AsJson = False,
) -> None:
    """Make another API key for an account; it is shown this once."""
    from data import accounts, roles

    _, database = open_home()
    record, key = accounts.create_key(
        database, choose_account(database, account).id, name, role=roles.check_name(role)
    )
    if as_json:
        print_json({"id": record.id, "project_id": record.project_id, "api_key": key})
    else:
        print(f"api key {key}\nKeep it: it is not stored.")
        print(f"`hone keys revoke {record.id}` makes it useless.")


@keys_app.command("list")
def list_keys(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's keys, never in full."""
    from data import accounts

    _, database = open_home()
    keys = accounts.list_keys(database, choose_account(database, account).id)
    if as_json:
        names = ("id", "redacted", "role", "revoked_at")
        print_json([{name: getattr(key, name) for name in names} for key in keys])
    else:
        rows = [
            (k.id, k.redacted, k.role, k.name, clock(k.last_used_at), clock(k.revoked_at))
            for k in keys
        ]
        print_table(("id", "key", "role", "name", "last used", "revoked"), rows)


@keys_app.command("revoke")
def revoke_key(key_id: str) -> None:
    """Make a key useless from the next request on."""
    from data import accounts

    _, database = open_home()
    accounts.revoke_key(database, key_id)
    print(f"{key_id} is revoked")


@admin_keys_app.command("create")
def create_admin_key(name: KeyName = "", as_json: AsJson = False) -> None:
    """Make a key for an operator; it is shown this once."""
    from data import accounts

    _, database = open_home()
    record, key = accounts.create_admin_key(database, name)
    if as_json:
        print_json({"id": record.id, "api_key": key})
    else:
        print(f"admin key {key}\nKeep it: it is not stored.")

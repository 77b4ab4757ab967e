"""`hone content`: what is done about an account's texts, and what was found."""

from __future__ import annotations

import json
from typing import Annotated, Any

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

app = typer.Typer(help="Content policies of accounts.", no_args_is_help=True)

Mode = Annotated[str | None, typer.Option(help="off, score or block.")]
Identifier = Annotated[str, typer.Argument(help="As the account sends it.")]


@app.command("show")
def show(account: Account = None, as_json: AsJson = False) -> None:
    """Show an account's policy and what broke it lately."""
    from data import content, content_events

    _, database = open_home()
    project = choose_account(database, account)
    policy = content.get(database, project.id)
    events, _ = content_events.list_events(database, project.id, 20)
    modes: dict[str, Any] = {side: policy.mode(side) for side in content.SIDES}
    modes |= {"case_after": policy.case_after, "block_user_after": policy.block_user_after}
    rules = [rule.to_dict() for rule in policy.rules]
    names = ("id", "created_at", "side", "mode", "matched", "end_user")
    if as_json:
        shown = [{name: getattr(event, name) for name in names} for event in events]
        print_json({**modes, "rules": rules, "events": shown})
        return
    print(", ".join(f"{name} {value}" for name, value in modes.items()))
    print_table(("rule",), [(json.dumps(rule),) for rule in rules])
    rows = [(clock(e.created_at), e.side, e.mode, ", ".join(e.matched), e.end_user) for e in events]
    print_table(("when", "side", "mode", "matched", "end user"), rows)


@app.command("set")
def set_policy(
    account: Account = None,
    input_mode: Annotated[str | None, typer.Option("--input", help="off, score, block")] = None,
    output_mode: Annotated[str | None, typer.Option("--output", help="off, score, block")] = None,
    training: Mode = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="A rule as JSON; with any, all are replaced.")
    ] = None,
    no_rules: Annotated[bool, typer.Option("--no-rules", help="Remove all rules.")] = False,
    case_after: Annotated[
        int | None, typer.Option(min=0, help="Violations a day that open a case; 0: never.")
    ] = None,
    block_user_after: Annotated[
        int | None, typer.Option(min=0, help="Of one end user, who is shut out then; 0: never.")
    ] = None,
) -> None:
    """Change an account's policy; what is not named stays as it is."""
    from dataclasses import replace

    from data import content
    from data.moderation import classifier

    settings, database = open_home()
    project = choose_account(database, account)
    changes: dict[str, Any] = {}
    for side, mode in (("input", input_mode), ("output", output_mode), ("training", training)):
        if mode is not None:
            changes[side] = _checked_mode(side, mode)
    if rule or no_rules:
        model = classifier.load(settings.moderation_weights)
        changes["rules"] = content.read_rules([_rule(text) for text in rule or []], model)
    if case_after is not None:
        changes["case_after"] = case_after or None
    if block_user_after is not None:
        changes["block_user_after"] = block_user_after or None
    policy = replace(content.get(database, project.id), **changes)
    content.replace_policy(database, project.id, policy)
    modes = ", ".join(f"{side} {policy.mode(side)}" for side in content.SIDES)
    print(f"{project.slug}: {modes}, {len(policy.rules)} rules")


@app.command("block-user")
def block_user(identifier: Identifier, account: Account = None) -> None:
    """Shut an end user of an account out."""
    from data import content_events

    _, database = open_home()
    content_events.block_user(database, choose_account(database, account).id, identifier)
    print(f"{identifier} is blocked")


@app.command("unblock-user")
def unblock_user(identifier: Identifier, account: Account = None) -> None:
    """Let an end user call again."""
    from data import content_events

    _, database = open_home()
    content_events.unblock_user(database, choose_account(database, account).id, identifier)
    print(f"{identifier} is not blocked")


def _checked_mode(side: str, mode: str) -> str:
    from data import content
    from data.errors import InvalidInput

    if mode not in content.MODES:
        raise InvalidInput(f'--{side} is "{mode}"; expected one of: {", ".join(content.MODES)}')
    return mode


def _rule(text: str) -> dict[str, Any]:
    from data.errors import InvalidInput

    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--rule {text} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"--rule {text} is not a JSON object")
    return found

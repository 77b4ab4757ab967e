"""`hone feedback round`: judgements to a model in use, by the command line."""

from __future__ import annotations

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

app = typer.Typer(
    help="Rounds: train on a project's judgements, compare blindly, promote by a rule.",
    no_args_is_help=True,
)

RoundId = Annotated[str, typer.Argument(help="round-...")]


@app.command("start")
def start(
    label_project: Annotated[str, typer.Argument(help="Its judgements are learned: lproj-...")],
    account: Account = None,
    model: Annotated[
        str | None, typer.Option(help="To start from and compare with; default: the base.")
    ] = None,
    method: Annotated[str, typer.Option(help="dpo, or ppo with a reward model.")] = "dpo",
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    comparisons: Annotated[int, typer.Option(help="Prompts held out, a quarter at most.")] = 50,
    min_win_rate: Annotated[float, typer.Option(help="That promotes the new model.")] = 0.5,
    min_judgements: Annotated[int, typer.Option(help="Of the comparison.")] = 10,
    certain: Annotated[
        bool, typer.Option("--certain", help="The interval's lower end must reach it too.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Of the dpo job; default auto.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is held out, and of the jobs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Begin a round; a running server and its worker do the rest, and labelers judge."""
    from data.errors import InvalidInput
    from data.feedback import rounds
    from data.feedback.round_rules import Rule
    from data.files import FileStore
    from serve.engine.base_spec import find_spec

    settings, database = open_home()
    project = choose_account(database, account)
    base = find_spec(settings.model).name
    if epochs is not None and method != "dpo":
        raise InvalidInput("--epochs is of the method dpo; the API takes all hyperparameters")
    spec = rounds.RoundSpec(
        label_project_id=label_project,
        model=model or base,
        method=method,
        suffix=suffix,
        comparisons=comparisons,
        rule=Rule(min_win_rate, min_judgements, certain),
        hyperparameters={} if epochs is None else {"dpo": {"n_epochs": epochs}},
        seed=seed,
    )
    files = FileStore(database, settings.effective_blob_url, limits=settings.limits)
    made = rounds.start(database, files, project.id, spec, [base])
    if as_json:
        print_json(rounds.describe(made))
    else:
        print(made.id)


@app.command("list")
def list_rounds(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's rounds, newest first."""
    from data.feedback import rounds

    _, database = open_home()
    found = rounds.list_all(database, choose_account(database, account).id)
    if as_json:
        print_json([rounds.describe(one) for one in found])
        return
    rows = [
        (one.id, one.label_project_id, one.method, one.status, one.candidate or "", rate(one))
        for one in found
    ]
    print_table(("id", "project", "method", "status", "new model", "win rate"), rows)


@app.command("show")
def show(round_id: RoundId, account: Account = None, as_json: AsJson = False) -> None:
    """Tell how far a round is, and what it decided."""
    from data.feedback import rounds

    _, database = open_home()
    found = rounds.get(database, choose_account(database, account).id, round_id)
    if as_json:
        print_json(rounds.describe(found))
        return
    rows: list[tuple[str, Any]] = [
        ("status", found.status),
        ("begun", clock(found.created_at)),
        ("judgements of", found.label_project_id),
        ("method", found.method),
        ("old model", found.model),
        ("new model", found.candidate),
        ("jobs", ", ".join(filter(None, (found.reward_job_id, found.policy_job_id)))),
        ("comparison", found.comparison_id),
        ("win rate", rate(found)),
        ("why", "; ".join((found.decision or {}).get("reasons", ())) or found.error),
    ]
    print_table(("", ""), [(name, value) for name, value in rows if value])


@app.command("cancel")
def cancel(round_id: RoundId, account: Account = None, as_json: AsJson = False) -> None:
    """End a round and its job; the model in use stays."""
    from data.feedback import rounds

    _, database = open_home()
    found = rounds.cancel(database, choose_account(database, account).id, round_id)
    if as_json:
        print_json(rounds.describe(found))
    else:
        print(f"{found.id} {found.status}")


def rate(found: Any) -> str:
    """Return the win rate as text, empty before there is one."""
    value = (found.decision or {}).get("win_rate")
    return "" if value is None else f"{value:.1%}"

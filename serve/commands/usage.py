"""`hone usage`: what accounts used and what it cost."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from data.errors import InvalidInput
from serve.commands.common import (
    Account,
    AsJson,
    choose_account,
    open_home,
    print_json,
    print_table,
)

GROUPS = {"account": "project_id", "key": "api_key_id", "model": "model", "user": "user_id"}
DAY_S = 86400


def usage(
    account: Account = None,
    days: Annotated[int, typer.Option(min=1, max=366, help="How far to look back.")] = 7,
    by: Annotated[str, typer.Option(help="account, key, model or user.")] = "model",
    as_json: AsJson = False,
) -> None:
    """Sum tokens, requests and cost of each UTC day; training counts as a line of its own."""
    from data import usage as ledger

    if by not in GROUPS:
        raise InvalidInput(f'--by is "{by}"; choose of {", ".join(GROUPS)}', param="by")
    _, database = open_home()
    filters = {}
    if account is not None:
        filters["project_id"] = [choose_account(database, account).id]
    end = int(time.time()) + 1
    start = end - end % DAY_S - (days - 1) * DAY_S
    wanted = ledger.Range(start, end, "1d", days)
    used = ledger.completions(database, wanted, [GROUPS[by]], filters)
    paid = ledger.costs(database, wanted, ["project_id", "line_item"], filters)
    if as_json:
        print_json({"usage": used["data"], "costs": paid["data"]})
        return
    print_table(
        ("day", by, "requests", "prompt", "cached", "completion"),
        [
            (
                _day(bucket),
                result[GROUPS[by]] or "-",
                str(result["num_model_requests"]),
                str(result["input_tokens"]),
                str(result["input_cached_tokens"]),
                str(result["output_tokens"]),
            )
            for bucket in used["data"]
            for result in bucket["results"]
        ],
    )
    costs = [
        (
            _day(bucket),
            result["project_id"],
            result["line_item"],
            str(result["quantity"]),
            f"{result['amount']['value']:.6f}",
        )
        for bucket in paid["data"]
        for result in bucket["results"]
        if result["amount"]["value"]
    ]
    if costs:
        print_table(("day", "account", "line item", "tokens", "USD"), costs)


def _day(bucket: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"]))

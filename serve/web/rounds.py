"""Rounds of learning: started from a project's page, followed to what they decide."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput
from data.feedback import rounds
from data.feedback.round_rules import Rule
from data.feedback.rounds import FINAL, RoundSpec
from serve.web.view import Visit, go, page, whole_number

STEPS = (
    ("training_reward", "a reward model is trained"),
    ("training", "a model is trained"),
    ("sampling", "old and new answer the prompts held out"),
    ("comparing", "labelers compare the answers blindly"),
)


@page("admin")
def list_rounds(visit: Visit) -> Response:
    """List the account's rounds; while one is under way, htmx asks again."""
    found = rounds.list_all(visit.runtime.database, visit.account)
    live = any(one.status not in FINAL for one in found)
    return visit.render("rounds.html", rounds=found, steps=STEPS, final=FINAL, live=live)


@page("admin")
async def start_round(visit: Visit) -> Response:
    """Begin a round with a project's judgements."""
    runtime = visit.runtime
    runtime.gate.check_money(visit.account)
    percent = whole_number(visit.form, "min_win_rate")
    if percent is None:
        raise InvalidInput(f"'{visit.text('min_win_rate')}' is no percentage.")
    spec = RoundSpec(
        label_project_id=visit.path("label_project_id"),
        model=visit.text("model") or runtime.models.base_model,
        method=visit.text("method", "dpo"),
        comparisons=whole_number(visit.form, "comparisons") or 0,
        rule=Rule(
            min_win_rate=percent / 100,
            min_judgements=whole_number(visit.form, "min_judgements") or 0,
            certain=bool(visit.text("certain")),
        ),
    )
    bases = await runtime.models.bases(visit.account)
    files = runtime.files
    await run_in_threadpool(rounds.start, runtime.database, files, visit.account, spec, bases)
    return go("/web/rounds", "saved")


@page("admin")
def cancel_round(visit: Visit) -> Response:
    """End a round; the model in use stays."""
    rounds.cancel(visit.runtime.database, visit.account, visit.path("round_id"))
    return go("/web/rounds", "saved")

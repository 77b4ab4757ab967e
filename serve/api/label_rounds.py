"""`/v1/label_rounds`: from a labeling project's judgements to a model in use, or to why not."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.feedback import rounds
from data.feedback.round_rules import Rule
from data.feedback.rounds import RoundSpec
from serve.api.deps import Caller, Running, json_response
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import RequestModel

router = APIRouter(prefix="/v1/label_rounds", route_class=StrictJsonRoute)


class RuleRequest(RequestModel):
    """When the new model takes the old one's place."""

    min_win_rate: float = 0.5
    min_judgements: int = 10
    certain: bool = False


class StartRound(RequestModel):
    """A round; see docs/feedback.md."""

    label_project_id: str
    model: str
    method: str = "dpo"
    suffix: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    comparisons: int = 50
    rule: RuleRequest = Field(default_factory=RuleRequest)
    hyperparameters: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seed: int = Field(0, ge=0, le=2**31 - 1)


@router.post("")
async def start_round(body: StartRound, caller: Caller, runtime: Running) -> Response:
    """Freeze a project's judgements, train on them, and compare what comes of it."""
    runtime.gate.check_money(caller.id)
    spec = RoundSpec(**body.model_dump(exclude={"rule"}), rule=Rule(**body.rule.model_dump()))
    bases = await runtime.models.bases(caller.id)
    made = await run_in_threadpool(
        rounds.start, runtime.database, runtime.files, caller.id, spec, bases
    )
    return json_response(rounds.describe(made))


@router.get("")
async def list_rounds(
    caller: Caller, runtime: Running, label_project_id: str | None = None
) -> Response:
    """List the account's rounds, newest first."""
    found = await run_in_threadpool(rounds.list_all, runtime.database, caller.id, label_project_id)
    return json_response({"object": "list", "data": [rounds.describe(one) for one in found]})


@router.get("/{round_id}")
async def retrieve_round(round_id: str, caller: Caller, runtime: Running) -> Response:
    """Return a round."""
    found = await run_in_threadpool(rounds.get, runtime.database, caller.id, round_id)
    return json_response(rounds.describe(found))


@router.post("/{round_id}/cancel")
async def cancel_round(round_id: str, caller: Caller, runtime: Running) -> Response:
    """End a round, and its job if one is under way."""
    found = await run_in_threadpool(rounds.cancel, runtime.database, caller.id, round_id)
    return json_response(rounds.describe(found))

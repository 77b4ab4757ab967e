"""`/v1/fine_tuning/alpha/graders`: score one sample, or only check a grader."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.adapters import RewardModel
from serve.api.deps import Caller, Running, json_response
from serve.api.generation import unless_disconnected
from serve.api.grader_schemas import Multi, RunRequest, ScoreModel, ValidateRequest
from serve.api.grading import check_reward_grader, run_grader
from serve.api.json_route import StrictJsonRoute

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", route_class=StrictJsonRoute)


@router.post("/run")
async def run(body: RunRequest, request: Request, caller: Caller, runtime: Running) -> Response:
    """Score what a model said about one row."""
    work = run_grader(body, request, runtime, caller.id)
    return json_response(await unless_disconnected(request, work))


@router.post("/validate")
async def validate(body: ValidateRequest, caller: Caller, runtime: Running) -> Response:
    """Check a grader, and that its models exist; return it with every default filled in."""
    grader = body.grader
    for part in grader.graders.values() if isinstance(grader, Multi) else [grader]:
        if isinstance(part, ScoreModel):
            model = await runtime.models.resolve_judge(caller.id, part.model)
            if isinstance(model, RewardModel):
                check_reward_grader(part)
    return json_response({"grader": _dump(grader)})


def _dump(grader: Any) -> dict[str, Any]:
    told: dict[str, Any] = grader.model_dump(exclude_none=True)
    if isinstance(grader, Multi):
        told["graders"] = {name: _dump(part) for name, part in grader.graders.items()}
    return told

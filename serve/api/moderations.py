"""`POST /v1/moderations`: texts judged by the moderation classifier; docs/moderation.md tells what
it knows and how well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.accounts import Principal
from data.errors import InvalidInput, RateLimited
from data.metering import Usage
from data.tables import new_id
from serve.api.deps import Caller, Running, is_batch, json_response
from serve.api.json_route import StrictJsonRoute
from serve.api.moderation_shapes import check_model, moderation_result
from serve.api.schemas import RequestModel
from serve.runtime import Runtime

MAX_TEXTS = 2048

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class ModerationRequest(RequestModel):
    """Texts to judge."""

    input: Any = None  # a text, texts, or text parts
    model: str | None = None


@router.post("/moderations")
async def create_moderation(
    body: ModerationRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Judge each text; text parts are one text together."""
    classifier = runtime.moderator.classifier
    check_model(body.model, classifier.name, "model")
    texts = _read(body.input)
    await run_in_threadpool(meter, runtime, request, caller.id, texts)
    verdicts = [await run_in_threadpool(runtime.moderator.judge, text) for text in texts]
    return json_response(
        {
            "id": new_id("modr-"),
            "model": classifier.name,
            "results": [moderation_result(verdict) for verdict in verdicts],
        }
    )


def meter(
    runtime: Runtime, request: Request, account: str, texts: Sequence[str], num_labels: int = 0
) -> int:
    """Count the call against the account's rates, and its tokens in the ledger; it costs nothing.

    Args:
        num_labels: Tokens of the answer.

    Returns:
        The tokens of the texts.

    Raises:
        Forbidden: The account is closed.
        RateLimited: The account calls too often.
    """
    runtime.generator.check(account)
    principal: Principal = request.state.principal
    base = runtime.models.base_model
    try:
        reservation, left = runtime.gate.admit(account, base, 0, 0, is_free=True)
    except RateLimited:
        request.state.rate_headers = runtime.gate.headers(account, base)
        raise
    reservation.settle(0)
    request.state.rate_headers = left
    counted = sum(map(runtime.models.count_tokens, texts))
    runtime.gate.record(
        Usage(
            project_id=account,
            key_id=principal.key_id,
            model=runtime.moderator.classifier.name,
            request_id=request.state.request_id,
            kind="moderations",
            prompt_tokens=counted,
            completion_tokens=num_labels,
            batch=is_batch(request),
        )
    )
    return counted


def _read(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and len(value) <= MAX_TEXTS:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(_is_text_part(item) for item in value):
            return ["\n".join(item["text"] for item in value)]
    raise InvalidInput(
        f"Invalid 'input': expected a string, an array of 1 to {MAX_TEXTS} strings, or an array "
        'of parts {"type": "text", "text": string}; this server judges text only.',
        param="input",
    )


def _is_text_part(item: Any) -> bool:
    if not isinstance(item, dict) or item.keys() != {"type", "text"}:
        return False
    return item["type"] == "text" and isinstance(item["text"], str)

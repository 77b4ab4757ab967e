"""`POST /v1/embeddings`: texts as vectors, from the base model or a fine-tune.

The vector is the mean over the text's tokens of the model's last hidden states, scaled to length 1.
These models were trained to continue texts, not to embed them: good enough to group and to find
likes, less good than a model made for it.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput
from data.tables import new_id
from serve.api.adapters import ServedModel
from serve.api.deps import Caller, Running, json_response
from serve.api.generation import Generator, unless_disconnected
from serve.api.json_route import StrictJsonRoute
from serve.api.metered import metered
from serve.api.prompts import Prompt, read_prompts, room_for
from serve.api.sampling import engine_requests
from serve.api.schemas import RequestModel
from serve.api.screening import Screening
from serve.engine.base import SamplingParams

router = APIRouter(prefix="/v1", route_class=StrictJsonRoute)


class EmbeddingRequest(RequestModel):
    """Texts to embed."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"dimensions"})

    input: Any = None  # a text, texts, token ids, lists of them
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.post("/embeddings")
async def create_embeddings(
    body: EmbeddingRequest, request: Request, caller: Caller, runtime: Running
) -> Response:
    """Embed each text."""
    served = await runtime.models.resolve(caller.id, body.model, caller.models)
    prompts = await run_in_threadpool(_read, body.input, served, runtime.engine.max_context)
    screening = Screening(runtime, request, caller.id, body, served.name)
    await screening.admit([prompt.text for prompt in prompts], "input")
    generator = metered(runtime, request, body.user, served, prompts, kind="embeddings")
    answer = _embed(body, served, prompts, generator, caller.id)
    return json_response(await unless_disconnected(request, answer))


async def _embed(
    body: EmbeddingRequest,
    served: ServedModel,
    prompts: Sequence[Prompt],
    generator: Generator,
    account_id: str,
) -> dict[str, Any]:
    params = SamplingParams(max_tokens=0, embed=True)
    planned = [(prompt, params) for prompt in prompts]
    requests = engine_requests(new_id("embd-"), planned, 1, served, account_id)
    answers = await generator.answer(requests)
    write = _as_base64 if body.encoding_format == "base64" else list
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    return {
        "object": "list",
        "model": served.name,
        "data": [
            {"object": "embedding", "index": i, "embedding": write(_unit(answer.embedding))}
            for i, answer in enumerate(answers)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _read(value: Any, served: ServedModel, max_context: int) -> list[Prompt]:
    texts = value if isinstance(value, list) else [value]
    if value is None or any(text == "" or text is None for text in texts):
        raise InvalidInput(
            "Invalid 'input': there is nothing to embed in an empty text. Send some text.",
            param="input",
        )
    try:
        prompts = read_prompts(value, served.tokens, add_special_tokens=True)
    except InvalidInput as error:
        error.param = "input"
        raise
    for prompt in prompts:
        room_for(prompt, 0, 0, max_context, "input")
    return prompts


def _unit(values: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def _as_base64(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

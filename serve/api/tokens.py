"""`/tokenizer_info`, `/tokenize`, `/detokenize`: what evaluation harnesses ask beside completions.

At the root of the server and below /v1, in the shapes of vLLM and the lm-evaluation-harness.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput
from serve.api.deps import Caller, Running, json_response
from serve.api.json_route import StrictJsonRoute
from serve.api.schemas import RequestModel
from serve.api.token_text import TokenText
from serve.runtime import Runtime

MAX_CHARACTERS = 1 << 22
MAX_TOKENS = 1 << 20

router = APIRouter(route_class=StrictJsonRoute)


class TokenizeRequest(RequestModel):
    """A text to split."""

    model: str | None = None
    prompt: str = Field(max_length=MAX_CHARACTERS)
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(RequestModel):
    """Tokens to join."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_TOKENS)


@router.get("/tokenizer_info")
@router.get("/v1/tokenizer_info")
async def tokenizer_info(caller: Caller, runtime: Running, model: str | None = None) -> Response:
    """Describe a model's tokenizer: its special tokens and chat template."""
    tokenizer = (await _tokens(runtime, caller.id, model)).tokenizer
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if value}
    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
            **special,
            "chat_template": tokenizer.chat_template,
            "vocab_size": len(tokenizer),
            "model_max_length": runtime.engine.max_context,
        }
    )


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(body: TokenizeRequest, caller: Caller, runtime: Running) -> Response:
    """Split a text into tokens."""
    tokens = await _tokens(runtime, caller.id, body.model)
    ids = await run_in_threadpool(
        tokens.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
    )
    found: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": runtime.engine.max_context,
        "token_strs": [tokens.string_of(i) for i in ids] if body.return_token_strs else None,
    }
    return json_response(found)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeRequest, caller: Caller, runtime: Running) -> Response:
    """Join tokens to a text."""
    tokens = await _tokens(runtime, caller.id, body.model)
    wrong = next((i for i in body.tokens if not 0 <= i < tokens.vocabulary_size), None)
    if wrong is not None:
        raise InvalidInput(
            f"Invalid 'tokens': token id {wrong} does not exist; the model's ids are 0 to "
            f"{tokens.vocabulary_size - 1}.",
            param="tokens",
        )
    text = await run_in_threadpool(tokens.tokenizer.decode, body.tokens)
    return json_response({"prompt": text})


async def _tokens(runtime: Runtime, account_id: str, model: str | None) -> TokenText:
    name = model if model is not None else runtime.models.base_model
    return (await runtime.models.resolve(account_id, name)).tokens

"""Prompts in all their forms, as token ids that fit in the model's context.

A completion prompt is a text, several texts, token ids, several lists of token ids, or null (the
start of a document). Ids are used exactly as given; texts follow the tokenizer's own rule for
special tokens. A conversation is rendered by the chat template of the model it is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from data.errors import ContextTooLong, InvalidInput
from serve.api.schemas import ChatMessage
from serve.api.token_text import TokenText

MAX_PROMPTS = 2048


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, and the same as text."""

    ids: tuple[int, ...]
    text: str


def between(prompts: Sequence[Prompt], suffix: str, tokens: TokenText) -> list[Prompt]:
    """Return prompts that ask for what stands between each prompt and the suffix.

    They are written prefix, suffix, middle, as in Bavarian et al. 2022 (arXiv 2207.14255, "PSM"),
    which is how the models whose tokens are known here were trained.

    Raises:
        InvalidInput: The tokenizer has no tokens for it.
    """
    marks = tokens.middle_marks
    if marks is None:
        raise InvalidInput(
            "Unsupported parameter: 'suffix' is not supported with this model: its tokenizer has "
            "no fill-in-the-middle tokens.",
            param="suffix",
            code="unsupported_parameter",
        )
    before, after, middle = marks
    end = (after, *tokens.tokenizer.encode(suffix, add_special_tokens=False), middle)
    start = tuple(tokens.tokenizer.encode("", add_special_tokens=True))
    found = []
    for prompt in prompts:
        has_start = bool(start) and prompt.ids[: len(start)] == start
        head, body = (start, prompt.ids[len(start) :]) if has_start else ((), prompt.ids)
        found.append(Prompt((*head, before, *body, *end), prompt.text))
    return found


def read_prompts(value: Any, tokens: TokenText, add_special_tokens: bool) -> list[Prompt]:
    """Read the `prompt` field of a completion request.

    Raises:
        InvalidInput: It has none of the allowed forms, or names a token that does not exist.
    """
    if value is None or value == "":
        return [_document_start(tokens)]
    if isinstance(value, str):
        return [_from_text(value, tokens, add_special_tokens)]
    if not isinstance(value, list) or not value:
        raise _wrong_form(value)
    if _is_ids(value):
        return [_from_ids(value, tokens)]
    if len(value) > MAX_PROMPTS:
        raise InvalidInput(
            f"Invalid 'prompt': array too long. Expected an array with maximum length "
            f"{MAX_PROMPTS}, but got length {len(value)} instead.",
            param="prompt",
        )
    if all(isinstance(item, str) for item in value):
        return [
            _from_text(item, tokens, add_special_tokens) if item else _document_start(tokens)
            for item in value
        ]
    if all(isinstance(item, list) and item and _is_ids(item) for item in value):
        return [_from_ids(item, tokens) for item in value]
    raise _wrong_form(value)


def read_messages(
    messages: Sequence[ChatMessage], tokens: TokenText, add_special_tokens: bool = False
) -> Prompt:
    """Render a conversation for the model to answer.

    Raises:
        InvalidInput: The model has no chat template (`chat_template_missing`), or its template
            refuses the conversation.
    """
    if not messages:
        raise InvalidInput(
            "Invalid 'messages': the conversation is empty; send at least one message.",
            param="messages",
        )
    if not tokens.tokenizer.chat_template:
        raise InvalidInput(
            "This model has no chat template; use /v1/completions, or add a chat_template to the "
            "model's tokenizer.",
            param="model",
            code="chat_template_missing",
        )
    turns = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content,
        }
        for message in messages
    ]
    try:
        text = tokens.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise InvalidInput(
            f"Invalid 'messages': the model's chat template refuses the conversation: {error}",
            param="messages",
        ) from error
    return _from_text(text, tokens, add_special_tokens)


def room_for(prompt: Prompt, wanted: int | None, default: int, max_context: int, param: str) -> int:
    """Return how many tokens may be generated after the prompt.

    Args:
        wanted: What the client asked for; it must fit. None takes as much of `default` as fits.

    Raises:
        ContextTooLong: The prompt, or the prompt and the tokens asked for, exceed the context.
    """
    room = max_context - len(prompt.ids)
    if (wanted is None and room >= 1) or (wanted is not None and room >= wanted):
        return min(default, room) if wanted is None else wanted
    asked = 1 if wanted is None else wanted
    raise ContextTooLong(
        f"This model's maximum context length is {max_context} tokens. However, you requested "
        f"{len(prompt.ids) + asked} tokens ({len(prompt.ids)} in the {param}, {asked} for the "
        f"completion): the prompt is too long. Please reduce the length of the {param} or of the "
        "completion.",
        param=param,
    )


def _from_text(text: str, tokens: TokenText, add_special_tokens: bool) -> Prompt:
    ids = tokens.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return Prompt(tuple(ids), text)


def _from_ids(ids: Sequence[int], tokens: TokenText) -> Prompt:
    wrong = next((i for i in ids if not 0 <= i < tokens.vocabulary_size), None)
    if wrong is not None:
        raise InvalidInput(
            f"Invalid 'prompt': token id {str(wrong)[:20]} does not exist; the model's ids are 0 "
            f"to {tokens.vocabulary_size - 1}.",
            param="prompt",
        )
    return Prompt(tuple(ids), b"".join(map(tokens.bytes_of, ids)).decode("utf-8", "replace"))


def _document_start(tokens: TokenText) -> Prompt:
    tokenizer = tokens.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InvalidInput(
            "Invalid 'prompt': it is empty, and this model has no token for the start of a "
            "document. Send some text.",
            param="prompt",
        )
    return Prompt((start,), "")


def _is_ids(value: Sequence[Any]) -> bool:
    return all(type(item) is int for item in value)


def _wrong_form(value: Any) -> InvalidInput:
    got = "an empty array" if value == [] else f"{type(value).__name__}"
    return InvalidInput(
        "Invalid type for 'prompt': expected a string, an array of strings, an array of token "
        f"ids, or an array of arrays of token ids, none of them empty, but got {got}.",
        param="prompt",
        code="invalid_type",
    )

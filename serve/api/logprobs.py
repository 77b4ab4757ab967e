"""Log-probabilities in the two shapes that clients read.

They are the model's own, before temperature, penalties and bias. The chosen token is always among
the alternatives with the very same value, whatever other token decodes to the same string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve.api.prompts import Prompt
from serve.api.token_text import OffsetCounter, TokenText
from serve.engine.base import TokenLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot carry


class CompletionLogprobs:
    """Writes the `logprobs` object of one choice, in pieces when it is streamed.

    Offsets count characters from the start of the prompt, whether it is echoed or not.
    """

    def __init__(self, tokens: TokenText, prompt: Prompt, num_top: int):
        self._tokens = tokens
        self._prompt = prompt
        self._num_top = num_top
        self._offsets = OffsetCounter()
        self._start = len(prompt.text)

    def of_prompt(self, scored: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Return the entries of the prompt's tokens; the first has no probability."""
        ids = self._prompt.ids
        offsets = _prompt_offsets(self._prompt, self._tokens)
        entries = [None if entry is None else _finite(entry.logprob) for entry in scored]
        tops = [None if entry is None else self._top(entry) for entry in scored]
        return _object([self._tokens.string_of(i) for i in ids], entries, tops, offsets)

    def of_tokens(self, scored: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Return the entries of the next generated tokens."""
        ids = [entry.token_id for entry in scored]
        return _object(
            [self._tokens.string_of(i) for i in ids],
            [_finite(entry.logprob) for entry in scored],
            [self._top(entry) for entry in scored],
            self._tokens.offsets(ids, self._start, self._offsets),
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        return top_by_string(entry, self._tokens, self._num_top)


def top_by_string(entry: TokenLogprob, tokens: TokenText, num_top: int) -> dict[str, float]:
    """Return the alternatives by token string, most likely first, the chosen token among them."""
    chosen = tokens.string_of(entry.token_id)
    found: dict[str, float] = {}
    for token_id, logprob in entry.top[:num_top]:
        found.setdefault(tokens.string_of(token_id), _finite(logprob))
    found[chosen] = _finite(entry.logprob)
    return found


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Concatenate `logprobs` objects."""
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def chat_logprobs(
    scored: Sequence[TokenLogprob], tokens: TokenText, num_top: int
) -> dict[str, list[Any] | None]:
    """Return the `logprobs` object of a chat choice."""
    content = [
        {
            **_chat_entry(entry.token_id, entry.logprob, tokens),
            "top_logprobs": [_chat_entry(i, value, tokens) for i, value in entry.top[:num_top]],
        }
        for entry in scored
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    scored: Sequence[TokenLogprob | None], tokens: TokenText, num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """Return the extension `prompt_logprobs`: by token id, for each token of the prompt."""
    return [None if entry is None else _by_id(entry, tokens, num_top) for entry in scored]


def mean_logprob(scored: Sequence[TokenLogprob]) -> float:
    """Return the average, by which `best_of` compares; an empty answer comes last."""
    return sum(entry.logprob for entry in scored) / len(scored) if scored else -math.inf


def _by_id(entry: TokenLogprob, tokens: TokenText, num_top: int) -> dict[str, dict[str, Any]]:
    shown = dict(entry.top[:num_top]) | {entry.token_id: entry.logprob}
    return {
        str(token_id): {"logprob": _finite(value), "decoded_token": tokens.string_of(token_id)}
        for token_id, value in shown.items()
    }


def _chat_entry(token_id: int, logprob: float, tokens: TokenText) -> dict[str, Any]:
    return {
        "token": tokens.string_of(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokens.bytes_of(token_id)),
    }


def _prompt_offsets(prompt: Prompt, tokens: TokenText) -> list[int]:
    """Say where each token of the prompt begins, in its text.

    Special tokens that the tokenizer added (BOS), and the space that some tokenizers put before
    the first word, are not in the text.
    """
    found, counter = [], OffsetCounter()
    for token_id in prompt.ids:
        found.append(counter.characters)
        piece = tokens.bytes_of(token_id)
        if not prompt.text.startswith(tokens.string_of(token_id), counter.characters):
            if token_id in tokens.special_ids:
                continue
            piece = piece.removeprefix(b" ")
        counter.feed(piece)
    return found


def _object(
    strings: list[str], logprobs: list[Any], tops: list[Any], offsets: list[int]
) -> dict[str, list[Any]]:
    return {
        "tokens": strings,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

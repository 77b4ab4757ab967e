"""Answers that must be JSON of a schema: which tokens may come next.

llguidance keeps the state of each sequence's parse and tells, for every step, the tokens with which
the text can still become valid. The mask depends on the sequence's own tokens alone, so what else
is in the batch changes nothing.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from data.errors import EngineFailure, InvalidInput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_CHARS = 1 << 16
# White space between tokens is bounded: a model must not write blanks until its tokens are used up.
OPTIONS: dict[str, Any] = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,12}",
    "coerce_one_of": False,
    "lenient": False,
}
UNKNOWN_KEYS = re.compile(r'Unimplemented keys: \["(.*)"\]')
OWN_OPTIONS = "x-guidance"


def compile_schema(schema: str) -> str:
    """Return a JSON schema as a grammar.

    Raises:
        InvalidInput: It is no schema, cannot be fulfilled, or has keywords that cannot be enforced;
            the message names them.
    """
    from llguidance import LLMatcher

    if len(schema) > MAX_SCHEMA_CHARS:
        raise _refused(f"it has {len(schema)} characters, more than {MAX_SCHEMA_CHARS}")
    if OWN_OPTIONS in schema and _holds_options(json.loads(schema)):
        raise _refused(f"unsupported keyword '{OWN_OPTIONS}'")
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    except ValueError as error:
        raise _refused(str(error)) from error
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None)
    if failed:
        raise _refused(_reason(messages))
    return grammar


class Grammars:
    """Makes the parsers of one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocab_size: Of the model's logits.
        eos_token_ids: What ends an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def parser(self, schema: str) -> Parser:
        """Return the parser of one sequence; raises InvalidInput."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, compile_schema(schema), log_level=0)
        if matcher.is_error():
            raise _refused(_reason([matcher.get_error()]))
        return Parser(matcher, self._vocab_size)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        size = max(self._vocab_size, len(self._tokenizer))
        return from_tokenizer(
            self._tokenizer, n_vocab=size, eos_token=sorted(self._eos_token_ids), slices=None
        )


class Parser:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self, logits: torch.Tensor, stop_ids: frozenset[int]) -> torch.Tensor:
        """Return the logits [V] with every token impossible that the grammar forbids.

        Args:
            stop_ids: Possible as soon as the text is whole.

        Raises:
            EngineFailure: The grammar became too large to follow.
        """
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: self._vocab_size].bool()
        if self._matcher.is_accepting() and stop_ids:
            allowed[sorted(stop_ids)] = True
        if self._matcher.is_error() or not allowed.any():
            raise EngineFailure(
                "The answer could not be continued within its JSON schema: "
                f"{self._matcher.get_error() or 'no token fits'}. Use a simpler schema.",
                code="schema_too_complex",
            )
        missing = logits.shape[-1] - len(allowed)
        if missing > 0:
            allowed = torch.nn.functional.pad(allowed, (0, missing))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on after a token that the mask allowed and that does not stop the sequence."""
        self._matcher.consume_token(token_id)


def _reason(messages: list[str]) -> str:
    told = "; ".join(messages)
    match = UNKNOWN_KEYS.search(told)
    if match is None:
        return told
    names = ", ".join(f"'{name}'" for name in re.split(r'",\s*"', match[1]))
    return f"unsupported keyword{'s' if ',' in names else ''} {names}"


def _refused(reason: str) -> InvalidInput:
    return InvalidInput(f"The JSON schema cannot be enforced: {reason}.", param="json_schema")


def _holds_options(value: Any) -> bool:
    if isinstance(value, dict):
        return OWN_OPTIONS in value or any(map(_holds_options, value.values()))
    return isinstance(value, list) and any(map(_holds_options, value))

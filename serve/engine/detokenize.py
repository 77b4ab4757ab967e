"""Tokens to text as they come: never half a character, never part of a stop string.

A token's text depends on its neighbours (leading spaces, bytes of one character), so a short window
of tokens is decoded each time and what was said before is cut off. Bytes that do not yet make a
character decode to U+FFFD at the window's end and are held back, as is any end of the text that
may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 4  # tokens that settle how the next one reads
WINDOW = 12
INCOMPLETE = "�"
MAX_PENDING_BYTES = 3  # an unfinished UTF-8 character has at most three


class TextStream:
    """The text of one completion.

    Args:
        prompt_ids: The first tokens read as the continuation of these.
        stop: Strings that end the text; the text never holds them.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._window = list(prompt_ids[-CONTEXT:])
        # Characters of the window that are out; bytes that the prompt left open are ours to finish.
        self._said = len(self._decode().rstrip(INCOMPLETE))
        self._held = ""  # decoded, but perhaps the start of a stop string

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """Add a token; return the text that is now certain, and whether a stop string ended it."""
        self._window.append(token_id)
        text = self._decode()
        bare = text.rstrip(INCOMPLETE)
        complete = text[: max(len(bare), len(text) - MAX_PENDING_BYTES)]
        self._held += complete[self._said :]
        self._said = max(self._said, len(complete))
        if len(complete) == len(text) and len(self._window) >= WINDOW:
            del self._window[:-CONTEXT]
            self._said = len(self._decode())
        if not may_stop or not self._stop:
            return self._release(len(self._held)), False
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            return self._release(min(places)), True
        return self._release(len(self._held) - self._partial_stop()), False

    def flush(self) -> str:
        """Return what was held back: the text ends here without a stop string."""
        self._held += self._decode()[self._said :]
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _partial_stop(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

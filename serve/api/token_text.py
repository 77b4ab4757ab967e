"""Token ids as clients see them: the string of one token, its bytes, where it stands in the text.

A byte-level tokenizer splits one character over several tokens. Such a token has no text of its
own, so it is shown as `bytes:\\xf0\\x9f`, as OpenAI does, and it keeps its exact bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property
from typing import Any

# What stands before the prefix, the suffix and the middle: Qwen and CodeGemma, StarCoder and SmolLM
# for code, Code Llama, DeepSeek Coder.
MIDDLE_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
BYTE_TOKEN_LENGTH = len("<0x00>")
SENTENCEPIECE_SPACE = "\u2581"


class TokenText:
    """Reads the vocabulary of one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.vocabulary_size = len(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self._cache: dict[int, bytes] = {}

    @cached_property
    def middle_marks(self) -> tuple[int, int, int] | None:
        """The tokens before prefix, suffix and middle; None if the tokenizer has none."""
        ids = {content: index for index, content in self._added.items()}
        for before, after, middle in MIDDLE_MARKS:
            if {before, after, middle} <= ids.keys():
                return ids[before], ids[after], ids[middle]
        return None

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text."""
        if token_id not in self._cache:
            self._cache[token_id] = self._read(token_id)
        return self._cache[token_id]

    def string_of(self, token_id: int) -> str:
        """Return the token as text, or as `bytes:...` when it is not whole characters."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, token_ids: Iterable[int], start: int, decoder: OffsetCounter) -> list[int]:
        """Return where each token begins, in characters; `decoder` carries over between calls."""
        found = []
        for token_id in token_ids:
            found.append(start + decoder.characters)
            decoder.feed(self.bytes_of(token_id))
        return found

    @cached_property
    def _byte_of_character(self) -> dict[str, int] | None:
        """Byte-level BPE writes each byte as one printable character; None for other schemes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in repr(backend.decoder):
            return None
        return {character: byte for byte, character in enumerate(_byte_level_alphabet())}

    @cached_property
    def _added(self) -> dict[int, str]:
        return {
            index: token.content for index, token in self.tokenizer.added_tokens_decoder.items()
        }

    def _read(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # the model's vocabulary is padded beyond the tokenizer's
            return b""
        if self._byte_of_character is not None:
            if all(character in self._byte_of_character for character in piece):
                return bytes(self._byte_of_character[character] for character in piece)
            return str(piece).encode("utf-8")
        if len(piece) == BYTE_TOKEN_LENGTH and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SENTENCEPIECE_SPACE, " ").encode("utf-8")


class OffsetCounter:
    """Counts the complete characters of a growing byte string."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, raw: bytes) -> None:
        """Add the bytes of the next token."""
        self.characters += len(self._decoder.decode(raw))


def _byte_level_alphabet() -> list[str]:
    """The character of each byte in GPT-2's byte-level BPE.

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in
    order (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", its code).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

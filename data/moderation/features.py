"""Texts as hashed n-grams: what the classifier sees.

Characters in windows of three to five and words in runs of one and two, each hashed to one of
`NUM_FEATURES` numbers (Weinberger et al. 2009, arXiv 0902.2206). There is no vocabulary, so nothing
of the training texts can be read back from the weights.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

NUM_FEATURES = 1 << 16
CHAR_SIZES = (3, 4, 5)
MAX_PIECE = 280  # characters; longer texts are judged piece by piece
URL = re.compile(r"https?://\S+|<url>")
NAME = re.compile(r"(?<!\w)@\w+")
REPEATED = re.compile(r"(.)\1{2,}")
WORD = re.compile(r"\w+|[^\w\s]")
SPACE = re.compile(r"\s+")
SENTENCE = re.compile(r"(?<=[.!?\n])\s+")
PRIME = 0x01000193  # of FNV-1a


def normalize(text: str) -> str:
    """Return the text as features see it: compatible forms, no accents or case, short repeats."""
    decomposed = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in decomposed if not unicodedata.combining(c))
    plain = NAME.sub("@user", URL.sub("<url>", plain))
    return SPACE.sub(" ", REPEATED.sub(r"\1\1", plain)).strip()


def pieces(text: str) -> list[str]:
    """Cut a text into runs of sentences of at most `MAX_PIECE` characters; a short one is whole."""
    found, piece = [], ""
    for sentence in SENTENCE.split(text):
        for start in range(0, max(1, len(sentence)), MAX_PIECE):
            part = sentence[start : start + MAX_PIECE]
            if piece and len(piece) + 1 + len(part) > MAX_PIECE:
                found.append(piece)
                piece = part
            else:
                piece = f"{piece} {part}" if piece else part
    return [*found, piece]


def features(text: str) -> np.ndarray:
    """Return the numbers of a text's n-grams, sorted, each once: int64 [n]."""
    plain = normalize(text)
    codes = np.array([ord(c) for c in f" {plain} "], dtype=np.uint64)
    hashes = [_windows(codes, size) for size in CHAR_SIZES if len(codes) >= size]
    words = WORD.findall(plain)
    grams = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    hashes.append(np.array([zlib.crc32(b"w" + gram.encode()) for gram in grams], dtype=np.uint64))
    return np.unique(_mix(np.concatenate(hashes)) % np.uint64(NUM_FEATURES)).astype(np.int64)


def stack(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of all texts in a row, and where each text's begin: [total], [n + 1]."""
    found = [features(text) for text in texts]
    starts = np.cumsum([0, *map(len, found)])
    return np.concatenate(found) if found else np.zeros(0, np.int64), starts


def _windows(codes: np.ndarray, size: int) -> np.ndarray:
    """Hash every run of `size` characters, as FNV does bytes, vectorised over the runs."""
    count = len(codes) - size + 1
    hashes = np.full(count, size, dtype=np.uint64)
    for offset in range(size):
        hashes = (hashes * np.uint64(PRIME)) ^ codes[offset : offset + count]
        hashes &= np.uint64(0xFFFFFFFF)
    return hashes


def _mix(hashes: np.ndarray) -> np.ndarray:
    """Spread the bits (the finalizer of MurmurHash3, in the public domain)."""
    mask = np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes = ((hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)) & mask
    return hashes ^ (hashes >> np.uint64(16))

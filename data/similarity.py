"""How alike two texts are, from 0 to 1, by the measures that graders name.

Word measures read words and single punctuation marks, in any script; ROUGE reads lower-case words
alone. References: BLEU, Papineni et al. 2002, for one sentence, with exponential smoothing (Chen
and Cherry 2014, method 3) and the order that the text allows; GLEU, Wu et al. 2016 (section 5);
ROUGE, Lin 2004, as F1; fuzzy_match, twice the longest common subsequence over both lengths;
METEOR, Lavie and Agarwal 2007, as NLTK computes it, by equal words and equal Porter stems: its last
stage, of synonyms, needs WordNet, which is not there.

`cosine` is measured where a model is: the cosine of the base model's embeddings of both texts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

MAX_CHARS = 100_000  # of a text
MAX_ORDER = 4
WORD = re.compile(r"\w+|[^\w\s]")
PLAIN_WORD = re.compile(r"\w+")


def compare(operation: str, text: str, reference: str) -> bool:
    """Return what a string check of OpenAI's says: eq, ne, like (holds) or ilike."""
    return {
        "eq": text == reference,
        "ne": text != reference,
        "like": reference in text,
        "ilike": reference.casefold() in text.casefold(),
    }[operation]


def fuzzy_match(text: str, reference: str) -> float:
    """Return the share of both texts' characters that lie in a longest common subsequence."""
    total = len(text) + len(reference)
    return 1.0 if total == 0 else 2 * common_length(text, reference) / total


def bleu(text: str, reference: str) -> float:
    """Return the smoothed BLEU of a sentence."""
    said, wanted = WORD.findall(text), WORD.findall(reference)
    if not said or not wanted:
        return float(said == wanted)
    logs, smoothing = [], 1.0
    for order in range(1, min(MAX_ORDER, len(said)) + 1):
        grams = _grams(said, order)
        hits, total = (grams & _grams(wanted, order)).total(), grams.total()
        if order == 1 and not hits:
            return 0.0
        if not hits:
            smoothing *= 2
        logs.append(math.log(hits / total if hits else 1 / (smoothing * total)))
    brevity = min(0.0, 1 - len(wanted) / len(said))
    return math.exp(brevity + sum(logs) / len(logs))


def gleu(text: str, reference: str) -> float:
    """Return the smaller of precision and recall of all sequences of one to four words."""
    said, wanted = WORD.findall(text), WORD.findall(reference)
    if not said or not wanted:
        return float(said == wanted)
    ours: Counter[Hashable] = Counter()
    theirs: Counter[Hashable] = Counter()
    for order in range(1, MAX_ORDER + 1):
        ours += _grams(said, order)
        theirs += _grams(wanted, order)
    return (ours & theirs).total() / max(ours.total(), theirs.total())


def rouge_n(text: str, reference: str, order: int) -> float:
    """Return the F1 of the sequences of `order` words."""
    said, wanted = (_grams(_plain_words(part), order) for part in (text, reference))
    return _f1((said & wanted).total(), said.total(), wanted.total())


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words."""
    said, wanted = _plain_words(text), _plain_words(reference)
    return _f1(common_length(said, wanted), len(said), len(wanted))


class _NoSynonyms:
    """What METEOR asks for synonyms, in place of WordNet."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


def meteor(text: str, reference: str) -> float:
    """Return the METEOR of a sentence without synonyms: equal words, then equal English stems."""
    from nltk.translate.meteor_score import single_meteor_score

    said, wanted = WORD.findall(text), WORD.findall(reference)
    if not said or not wanted:
        return float(said == wanted)
    return float(single_meteor_score(wanted, said, wordnet=_NoSynonyms()))


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors; 0 where one has no length."""
    lengths = math.hypot(*left) * math.hypot(*right)
    dot = math.fsum(a * b for a, b in zip(left, right, strict=True))
    return max(-1.0, min(1.0, dot / lengths)) if lengths else 0.0


def common_length(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Return the length of a longest common subsequence.

    By one bit an item (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    places: dict[Hashable, int] = {}
    for index, item in enumerate(left):
        places[item] = places.get(item, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for item in right:
        found = row & places.get(item, 0)
        row = ((row + found) | (row - found)) & full
    return len(left) - row.bit_count()


MEASURES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    "rouge_1": lambda text, reference: rouge_n(text, reference, 1),
    "rouge_2": lambda text, reference: rouge_n(text, reference, 2),
    "rouge_3": lambda text, reference: rouge_n(text, reference, 3),
    "rouge_4": lambda text, reference: rouge_n(text, reference, 4),
    "rouge_5": lambda text, reference: rouge_n(text, reference, 5),
    "rouge_l": rouge_l,
}
COSINE = "cosine"  # needs a model
METRICS = (*MEASURES, COSINE)


def _plain_words(text: str) -> list[str]:
    return PLAIN_WORD.findall(text.lower())


def _grams(words: Sequence[str], order: int) -> Counter[Hashable]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _f1(hits: int, said: int, wanted: int) -> float:
    return 2 * hits / (said + wanted) if hits else 0.0

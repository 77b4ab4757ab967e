"""Similarity against sacreBLEU and plain dynamic programming; formulas and places."""

from __future__ import annotations

import math
import random

import pytest
import sacrebleu

from data import similarity
from data.formula import Formula
from data.grader_text import MissingVariable, SampleNotJson, check_places, fill

WORDS = ["the", "cat", "sat", "on", "a", "mat", ",", "dog", "."]


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_sacrebleus(seed: int) -> None:
    truth = sacrebleu.BLEU(tokenize="none", effective_order=True)
    pairs = zip(sentences(40, seed), sentences(40, seed + 100), strict=True)
    for said, wanted in [*pairs, ("the cat sat", "the cat sat")]:
        expected = truth.sentence_score(said, [wanted]).score / 100
        assert similarity.bleu(said, wanted) == pytest.approx(expected, abs=1e-9)


def slow_common(left: str, right: str) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        before = 0
        for index, b in enumerate(right, 1):
            before, row[index] = (
                row[index],
                before + 1 if a == b else max(row[index], row[index - 1]),
            )
    return row[-1]


def test_longest_common_subsequences() -> None:
    draw = random.Random(0)
    for _ in range(200):
        left, right = ("".join(draw.choices("abc", k=draw.randrange(20))) for _ in range(2))
        assert similarity.common_length(left, right) == slow_common(left, right)
    assert similarity.fuzzy_match("kitten", "sitting") == pytest.approx(8 / 13)
    assert similarity.fuzzy_match("", "") == 1.0
    assert similarity.fuzzy_match("x" * 50_000, "x" * 50_000) == 1.0


def test_meteor_by_hand() -> None:
    """Lavie and Agarwal 2007: (1 - 0.5 (chunks / m)^3) P R / (0.9 P + 0.1 R)."""
    meteor = similarity.meteor
    assert meteor("The cat sat", "the cat sat") == pytest.approx(1 - 0.5 / 27)
    # "cats" has the stem of "cat": 3 of 4 and 3 of 3 words, in one chunk.
    p, r = 3 / 4, 3 / 3
    expected = (1 - 0.5 / 27) * p * r / (0.9 * p + 0.1 * r)
    assert meteor("the cats sat down", "the cat sat") == pytest.approx(expected)
    # Two chunks of 4 words in another order.
    assert meteor("on a the cat", "the cat on a") == pytest.approx(1 - 0.5 * (2 / 4) ** 3)
    assert meteor("dog", "hound") == 0  # synonyms count nothing
    assert (meteor("", ""), meteor("a", ""), meteor("", "a")) == (1, 0, 0)


def test_cosine_by_hand() -> None:
    assert similarity.cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    assert similarity.cosine([1, 0], [0, 5]) == 0
    assert similarity.cosine([1, 1], [-2, -2]) == pytest.approx(-1)
    assert similarity.cosine([0, 0], [1, 2]) == 0


def test_rouge_and_gleu_by_hand() -> None:
    said, wanted = "The cat sat on the mat.", "the cat lay on the mat"
    assert similarity.rouge_n(said, wanted, 1) == pytest.approx(5 / 6)
    assert similarity.rouge_n(said, wanted, 2) == pytest.approx(3 / 5)
    assert similarity.rouge_l(said, wanted) == pytest.approx(5 / 6)
    # One to four words: 4 + 3 + 2 + 1 of "a b c d", of which "a b c" shares 3 + 2 + 1.
    assert similarity.gleu("a b c d", "a b c e") == pytest.approx(6 / 10)
    for name, measure in similarity.MEASURES.items():
        if name != "meteor":  # less than 1 even for equal texts
            assert measure("a b c d e f", "a b c d e f") == pytest.approx(1.0)
        assert measure("a b c", "x y z") == 0.0 or measure is similarity.fuzzy_match
        assert measure("", "x") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + b * 2", 7.0),
        ("(a + b) / 4", 1.0),
        ("-a ^ 2", -1.0),
        ("2 ** b", 8.0),
        ("min(a, b) + max(a, b, 9) + abs(-a)", 11.0),
        ("floor(2.5) + ceil(2.5) + sqrt(4) + exp(0) + log(1)", 8.0),
        ("0.25", 0.25),
    ],
)
def test_formulas(text: str, value: float) -> None:
    assert Formula(text, ["a", "b"]).compute({"a": 1.0, "b": 3.0}) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "a +", "c", "a.b", "a[0]", "'x'", "True", "a if b else a", "lambda: a", "a < b"),
        *("__import__('os')", "min()", "abs(a, b)", "max(*[a])", "(a).__class__", "a; b", "a % b"),
        *("open(a)", "[a for a in b]", "a" * 2000, "(" * 500, "1" * 400, "1j", "a := b", "\0"),
    ],
)
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        Formula(text, ["a", "b"])


@pytest.mark.parametrize("text", ["1 / 0", "9^9^9^9", "log(0 - 1)", "exp(1000)", "(0-1)^0.5"])
def test_formulas_without_a_value(text: str) -> None:
    with pytest.raises(ArithmeticError):
        Formula(text, []).compute({})


def test_places_are_filled() -> None:
    item = {"q": "why", "n": [1, {"x": "y"}], "price": 2.5, "tags": {"a": None}}
    sample = '{"answer": {"text": "so"}, "list": ["p"]}'
    filled = fill(
        "{{item.q}} {{ item.n[1].x }} {{item.price}} {{item.tags}} {{ sample.output_json.list.0 }}"
        " {{sample.output_json.answer.text}}",
        sample,
        item,
    )
    assert filled == 'why y 2.5 {"a": null} p so'
    assert fill("{{sample.output_text}}!", "{{item.q}}", item) == "{{item.q}}!"  # filled once
    for text in ("{{item.none}}", "{{item.n[7]}}", "{{item.q.x}}", "{{sample.output_json.x}}"):
        check_places(text)
        with pytest.raises(MissingVariable):
            fill(text, sample, item)
    with pytest.raises(SampleNotJson):
        fill("{{sample.output_json.x}}", "no json", item)
    for text in ("{{ other.x }}", "{{ item.q() }}", "{{}}", "{{ sample.choices }}", "{{sample}}"):
        with pytest.raises(ValueError, match="cannot be filled"):
            check_places(text)
    assert math.isfinite(len(fill("{{ item }}", sample, item)))

"""The moderation classifier: its measures by their definitions, its training, what it ships."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data.content import Policy, judge, read_rules
from data.content_training import screen
from data.errors import DataError, InvalidInput
from data.moderation import classifier, measure, train
from data.moderation.features import MAX_PIECE, features, normalize, pieces
from data.moderation.labelled import read, read_map
from data.rows import Format

GOOD = ("the parcel came today", "thank you for the help", "the bread is fresh", "we sail at noon")
BAD = ("you zorgs are filth", "all zorgs must go", "i loathe zorgs", "no zorgs in this town")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in range(12):
        rows += [{"text": f"{text} {number}", "label": "fine"} for text in GOOD]
        rows += [{"text": f"{text} {number}", "label": "hateful"} for text in BAD]
    return rows


def test_auc_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(1)
    truth, scores = draw.integers(0, 2, 200), draw.integers(0, 20, 200).astype(float)
    pairs = [
        1.0 if one > zero else 0.5 if one == zero else 0.0
        for one in scores[truth == 1]
        for zero in scores[truth == 0]
    ]
    assert measure.auc(truth, scores) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(measure.auc(np.ones(3), scores[:3]))


def test_average_precision_by_hand() -> None:
    # Ranks of the 1s: first and third. Precision there: 1/1 and 2/3; each adds half the recall.
    truth, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    assert measure.average_precision(truth, scores) == pytest.approx((1 + 2 / 3) / 2)
    # All scores equal: one step, at the share of 1s.
    assert measure.average_precision(truth, np.ones(4)) == pytest.approx(0.5)


def test_precision_and_recall_by_hand() -> None:
    truth, scores = np.array([1, 1, 0, 0, 1]), np.array([0.9, 0.2, 0.8, 0.1, 0.5])
    assert measure.precision_at(0.5)(truth, scores) == pytest.approx(2 / 3)
    assert measure.recall_at(0.5)(truth, scores) == pytest.approx(2 / 3)


def test_a_binomial_interval_is_about_right() -> None:
    truth = np.array([1] * 300 + [0] * 100)
    value, low, high = measure.with_interval(measure.precision_at(0), truth, np.ones(400))
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert value == 0.75
    assert low == pytest.approx(0.75 - spread, abs=0.012)
    assert high == pytest.approx(0.75 + spread, abs=0.012)


def test_spelling_tricks_that_are_undone() -> None:
    assert normalize("Ｈéllo   THERE!!!! @bob https://x.y/z") == "hello there!! @user <url>"
    assert np.array_equal(features("Hello there"), features("hello   THERE"))


def test_a_long_text_is_judged_piece_by_piece() -> None:
    text = "A short one. " * 200 + "x" * 1000
    cut = pieces(text)
    assert max(map(len, cut)) <= MAX_PIECE
    assert "".join("".join(cut).split()) == "".join(text.split())
    model = classifier.load()
    bad = "I hate those filthy people."
    hidden = " ".join(["The weather is nice today, we walk in the park."] * 60)
    alone, within = model.judge(bad), model.judge(f"{hidden}\n{bad}\n{hidden}")
    assert within["hate"] >= min(alone["hate"], 0.5) * 0.5
    assert model.judge("")["hate"] < 0.5


def test_scores_are_the_regression_of_the_definition() -> None:
    """The vectorised path equals w.x + b, written out, for each text."""
    model = classifier.load()
    for text in ("ok", "thank you all", "grüße 你好 🎉", ""):
        found = features(text)
        values = model.idf[found] / max(1e-9, float(np.linalg.norm(model.idf[found])))
        for column, name in enumerate(model.categories):
            logit = float(model.weights[column][found] @ values) + float(model.bias[column])
            assert model.judge(text)[name] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-4)


def test_training_learns_and_repeats_itself(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", labelled_rows())
    benign = write(tmp_path / "benign.jsonl", [{"prompt": f"plain {i}"} for i in range(20)])
    words = [str(source), "--label", "hateful=hate", "--benign", str(benign)]
    out = tmp_path / "w.npz"
    assert train.main([*words, "--out", str(out), "--name", "mine"]) == 0
    model = classifier.load(out)
    assert (model.name, model.categories) == ("mine", ("hate",))
    assert model.judge("the zorgs are here")["hate"] > 0.5
    assert model.judge("the parcel is here")["hate"] < 0.5
    found = measure.report(model, read([source], {"hateful": "hate"}))
    assert found["hate"]["auc"][0] == 1.0
    assert (found["hate"]["texts"], found["hate"]["positive"]) == (96, 48)
    again = tmp_path / "again.npz"
    assert train.main([*words, "--out", str(again), "--name", "mine"]) == 0
    assert np.array_equal(classifier.load(again).weights, model.weights)


def test_missing_labels_are_unknown(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": "a", "labels": {"hate": 1}},
        {"text": "b", "labels": {"sexual": 0}},
    ]
    found = read([write(tmp_path / "a.jsonl", rows)], {})
    assert found.of("hate").tolist() == [1, -1]
    assert found.of("sexual").tolist() == [-1, 0]


BAD_ROWS: list[dict[str, object]] = [
    {"text": ""},
    {"text": "a"},
    {"text": "a", "label": "new"},
    {"text": "a", "labels": {"x": 2}},
]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, object]) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "labels": {"hate": 0}}, row])
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read([path], {"hateful": "hate"})
    with pytest.raises(InvalidInput, match="VALUE=CATEGORY"):
        read_map(["hateful"])


def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    path.write_text("no")
    with pytest.raises(InvalidInput, match="moderation_weights"):
        classifier.load(path)


def test_what_is_shipped() -> None:
    model = classifier.load()
    assert classifier.SHIPPED.stat().st_size < 2 << 20
    assert model.categories == ("hate", "offensive", "spam")
    assert model.judge("Call now to claim your free prize of 1000 pounds")["spam"] > 0.5
    assert model.flagged(model.judge("See you at dinner")) == []


def rules(*values: dict[str, object]) -> Policy:
    return Policy(rules=read_rules(values, classifier.load()))


def matched(policy: Policy, text: str) -> tuple[str, ...]:
    return judge(text, policy, classifier.load()).matched


def test_words_are_whole_and_without_case() -> None:
    policy = rules({"type": "word", "value": "Red  Box", "name": "box"})
    assert matched(policy, "the RED\nbox.") == ("box",)
    assert matched(policy, "the red boxes") == ()
    assert matched(policy, "infrared box") == ()
    assert matched(rules({"type": "word", "value": "c++"}), "I like C++, too") == ("c++",)


def test_an_expression_that_takes_too_long_counts_as_a_match() -> None:
    policy = rules({"type": "regex", "value": "(a+)+b", "name": "slow"})
    assert matched(policy, "xxb") == ()
    assert matched(policy, "aab") == ("slow",)
    assert matched(policy, "a" * 5000) == ("slow",)


def test_thresholds_of_an_account() -> None:
    text = "See you at dinner"
    score = classifier.load().judge(text)["hate"]
    low = {"type": "classifier", "category": "hate", "threshold": score / 2, "name": "strict"}
    assert matched(rules(low), text) == ("strict",)
    assert matched(rules(low | {"threshold": 1.0}), text) == ()


@pytest.mark.parametrize(
    ("rule", "param"),
    [
        ({"type": "glob", "value": "x"}, "rules[0].type"),
        ({"type": "word", "value": " "}, "rules[0].value"),
        ({"type": "word"}, "rules[0].value"),
        ({"type": "word", "value": "x", "threshold": 1}, "rules[0].threshold"),
        ({"type": "regex", "value": "("}, "rules[0].value"),
        ({"type": "regex", "value": "x" * 600}, "rules[0].value"),
        ({"type": "classifier", "category": "sexual"}, "rules[0].category"),
        ({"type": "classifier", "category": "hate", "threshold": 0}, "rules[0].threshold"),
        ({"type": "classifier", "category": "hate", "threshold": True}, "rules[0].threshold"),
    ],
)
def test_bad_rules_are_named(rule: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        rules(rule)
    assert caught.value.param == param


def test_a_policy_only_tightens() -> None:
    policy = Policy(input="block", output="off")
    assert policy.tightened(input="score", output="score") == Policy(input="block", output="score")


def test_rows_that_break_a_policy_are_told_by_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}
        for text in ("fine", "a zorg", "fine", "zorg zorg")
    ]
    policy = rules({"type": "word", "value": "zorg"})
    found = screen(write(tmp_path / "a.jsonl", rows), Format.CHAT, policy, classifier.load())
    assert (found.rows, found.lines, dict(found.matched)) == (4, [2, 4], {"zorg": 2})
    assert "2 of 4 rows of f break" in found.message("f")
    assert "lines 2, 4" in found.message("f")

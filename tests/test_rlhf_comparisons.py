"""Comparisons as a reward model learns them: pairs of a prompt, disagreement, and long answers."""

from __future__ import annotations

import pytest
from test_rlhf_reward import vowel_rows, write
from tiny_models import tiny_tokenizer

from data.errors import DataError
from data.rows import Ranking
from rlhf import report_card
from rlhf.comparisons import (
    agreement,
    limit_length,
    load_comparisons,
    noise_ceiling,
    split_prompts,
)


def test_rankings_become_all_their_pairs(tmp_path):
    ranking = Ranking("p", ("a", "b", "c"), (2, 1, 2))
    pairs = {(pair.chosen, pair.rejected, pair.label_prob) for pair in ranking.pairs()}
    assert pairs == {("b", "a", None), ("a", "c", 0.5), ("b", "c", None)}
    rows = [
        {"prompt": f"p{i}", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 3]}
        for i in range(3)
    ]
    found = load_comparisons(write(tmp_path / "r.jsonl", rows), tiny_tokenizer(), 1)
    assert [len(group.pairs) for group in found.groups] == [6, 6, 6]
    assert [len(group.answers) for group in found.groups] == [4, 4, 4]


def test_judgements_of_the_same_pair_become_its_probability(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3
    rows += [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    found = load_comparisons(write(tmp_path / "d.jsonl", rows), tiny_tokenizer(), 1)
    [pair] = found.groups[0].pairs
    assert (pair.prob, pair.judgements) == (0.75, 4)
    ceiling, _ = noise_ceiling(found.groups)
    assert ceiling == pytest.approx((0.75 + 1) / 2)
    agreed, _ = agreement(found.groups)
    assert agreed == pytest.approx(3 / 6)  # of the six pairs of judgements, three agree


@pytest.mark.parametrize(
    ("wins", "losses", "prob", "margin"), [(1, 1, 0.5, 0.0), (2, 1, 2 / 3, 1 / 3), (0, 2, 1.0, 1.0)]
)
def test_margins_of_opposite_judgements_cancel(tmp_path, wins, losses, prob, margin):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1}] * wins
    rows += [{"prompt": "p", "chosen": "b", "rejected": "a", "margin": 1}] * losses
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    found = load_comparisons(write(tmp_path / "d.jsonl", rows), tiny_tokenizer(), 1)
    [pair] = found.groups[0].pairs
    assert (pair.prob, pair.margin) == (pytest.approx(prob), pytest.approx(margin))


def test_the_card_tells_whose_judgements_the_model_agrees_with(tmp_path):
    """Counted by hand: three answers of one prompt, scored a > b > c."""
    kim, lee = {"labeler": "kim", "confidence": 9}, {"labeler": "lee", "confidence": 1}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    turned = {"prompt": "p", "chosen": "b", "rejected": "a"}
    rows = [
        *(pair | kim, pair | kim, turned | lee),
        {"prompt": "p", "chosen": "c", "rejected": "b"} | lee,
        {"prompt": "p", "chosen": "a", "rejected": "c", "label_prob": 0.5} | kim,  # a tie
        {"prompt": "p", "completions": ["b", "a"], "ranks": [1, 2], "labeler": "ann"},
    ]
    path = write(tmp_path / "d.jsonl", [row for row in rows if "ranks" not in row])
    ranked = write(tmp_path / "r.jsonl", [row for row in rows if "ranks" in row])
    tokenizer = tiny_tokenizer()
    [group] = load_comparisons(path, tokenizer, 1).groups
    names = [tokenizer.decode(ids[len(group.prompt) :]).strip()[0] for ids in group.answers]
    scores = [{"a": 3.0, "b": 2.0, "c": 1.0}[name] for name in names]
    found = report_card.by_tag([group], [scores])
    agree = {"kim": 0.5, "lee": 0.0}  # kim's two: the other kim, not lee; lee's: neither kim
    assert found["labeler"] == {
        "kim": {"judgements": 2, "accuracy": 1.0, "agreement": agree["kim"]},
        "lee": {"judgements": 2, "accuracy": 0.0, "agreement": agree["lee"]},
    }
    assert list(found["confidence"]) == ["1", "9"]
    assert "batch" not in found
    [group] = load_comparisons(ranked, tokenizer, 1).groups
    assert list(report_card.by_tag([group], [[0.0, 0.0]])["labeler"]) == ["ann"]
    page = report_card.card_page(report_card.report_card([group], [[0.0, 0.0]]), "<b>")
    assert "<h2>By labeler</h2>" in page
    assert "<td>ann</td><td>1</td><td>0.500</td><td>not known</td>" in page


@pytest.mark.parametrize(
    ("probs", "agreed"),
    [
        ((0.8, 0.8), 0.8**2 + 0.2**2),
        ((1.0, 1.0, 0.0), 1 / 3),
        ((0.9, 0.5, 0.6), 0.9 * 0.6 + 0.1 * 0.4),  # one that cannot decide is left out
        ((0.5, 0.5), None),
    ],
)
def test_soft_judgements_agree_as_often_as_they_would_choose_alike(tmp_path, probs, agreed):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [row | {"label_prob": prob} for prob in probs]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    found = load_comparisons(write(tmp_path / "d.jsonl", rows), tiny_tokenizer(), 1)
    assert agreement(found.groups)[0] == (None if agreed is None else pytest.approx(agreed))


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_one_long_answer_costs_the_others_no_more_than_it_must(tmp_path, on_long):
    """A token is a byte: prompts of 10, answers of 2 and 3, and one of 30, with EOS."""
    rows = [
        {"prompt": "0123456789", "completions": ["a", "bb", "c" * 29], "ranks": [1, 2, 3]},
        {"prompt": "other", "chosen": "a", "rejected": "b"},
    ]
    ranked = write(tmp_path / "r.jsonl", rows[:1])
    found = load_comparisons(ranked, tiny_tokenizer(), 1)
    [group] = found.groups
    size = len(group.prompt)
    before = [ids[size:] for ids in group.answers]
    limit_length(found, 24, on_long)
    assert found.long == [1]
    [kept] = found.groups
    after = [ids[len(kept.prompt) :] for ids in kept.answers]
    assert kept.prompt == group.prompt[:1] + group.prompt[-len(kept.prompt) + 1 :]
    if on_long == "drop":
        assert len(kept.prompt) == size
        assert after == before[:2]
        assert [(p.better, p.worse) for p in kept.pairs] == [(0, 1)]
    else:
        assert len(kept.prompt) == min(size, 12)
        assert after[:2] == before[:2]
        assert len(kept.prompt) + len(after[2]) == 24
        assert after[2] == (*before[2][: len(after[2]) - 1], before[2][-1])


def test_prompts_never_straddle_a_split(tmp_path):
    rows = [row | {"prompt": f"p{i % 7}"} for i, row in enumerate(vowel_rows(60))]
    found = load_comparisons(write(tmp_path / "s.jsonl", rows), tiny_tokenizer(), 1)
    one, other = split_prompts(found, 0.3, 0)
    assert not {g.prompt for g in one.groups} & {g.prompt for g in other.groups}
    assert one.num_pairs + other.num_pairs == found.num_pairs
    with pytest.raises(DataError, match="single prompt"):
        split_prompts(type(found)(found.path, found.groups[:1]), 0.3, 0)

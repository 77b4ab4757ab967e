"""Agreement, intervals and strengths against published examples, closed forms and brute force."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from data.feedback.agreement import alpha, kappa, kappas, raw_agreement
from data.feedback.bradley_terry import strengths
from data.feedback.rankings import comparisons, is_right
from data.intervals import bootstrap, wilson

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E: four observers.
FOUR = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
UNITS = [[value for value in unit if value is not None] for unit in zip(*FOUR, strict=True)]


@pytest.mark.parametrize(
    ("metric", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_krippendorffs_example(metric, value):
    found = alpha(UNITS, metric)
    assert found.value == pytest.approx(value, abs=5e-4)
    assert found.count == 11
    low, high = found.interval
    assert low < found.value < high


def by_definition(units, distance):
    """Alpha as 1 - D_o / D_e over all pairs of values, one by one."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(
        sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1)
        for unit in units
    ) / len(values)
    pairs = list(itertools.permutations(values, 2))
    expected = sum(distance(a, b) for a, b in pairs) / len(pairs)
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(5))
def test_alpha_by_its_definition(seed):
    draw = random.Random(seed)
    units = [[draw.randint(1, 5) for _ in range(draw.randint(1, 4))] for _ in range(30)]
    interval = by_definition(units, lambda a, b: (a - b) ** 2)
    assert alpha(units, "interval").value == pytest.approx(interval)
    nominal = by_definition(units, lambda a, b: float(a != b))
    assert alpha(units, "nominal").value == pytest.approx(nominal)
    named = [["abcde"[value - 1] for value in unit] for unit in units]
    assert alpha(named, "nominal").value == pytest.approx(nominal)


def test_what_is_undefined_says_why():
    assert "two labelers" in alpha([[1], [2]], "nominal").reason
    found = alpha([["A", "A"], ["A", "A"]], "nominal")
    assert found.value is None
    assert "the same" in found.reason
    assert raw_agreement([]).value is None
    assert "share no task" in kappa([], []).reason
    assert "throughout" in kappa(["A", "A"], ["A", "A"]).reason
    assert strengths([])[1] == "no two models were compared"
    assert "never compared" in strengths([("a", "b", 1.0), ("c", "d", 1.0)])[1]


def test_alpha_of_mixed_kinds_of_answer():
    """Positions and words, as pairwise answers have."""
    found = alpha([[0, 0], [1, "tie"], [1, 1], ["both_bad", 0]], "nominal")
    assert -1 < found.value < 1


def test_kappa_of_cohens_table():
    """Two readers of 50 applications: 20 both yes, 15 both no, 5 and 10 otherwise: 0.4."""
    table = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10
    table += [("no", "no")] * 15
    first, second = zip(*table, strict=True)
    found = kappa(first, second)
    assert found.value == pytest.approx(0.4)
    assert found.interval[0] < 0.4 < found.interval[1]


def test_kappas_of_shared_tasks_only():
    answers = {"a": {"1": 0, "2": 1, "3": 0}, "b": {"1": 0, "2": 1}, "c": {"9": 1}}
    ((one, other, measure),) = kappas(answers)
    assert (one, other, measure.value, measure.count) == ("a", "b", 1.0, 2)


def test_raw_agreement_is_the_share_of_pairs():
    found = raw_agreement([["A", "A", "B"], ["A", "A"], ["B"]])
    assert found.value == pytest.approx((1 / 3 + 1) / 2)
    assert found.count == 2


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_of_newcombes_table(successes, count, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-4)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(400, lambda weights: weights @ values / 400)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)


def test_two_models_have_the_log_odds_of_their_wins():
    results = [("a", "b", 1.0)] * 75 + [("a", "b", 0.0)] * 25
    (first, second), reason = strengths(results)
    assert reason is None
    assert (first.model, second.model) == ("a", "b")
    assert first.value - second.value == pytest.approx(math.log(3), abs=0.01)
    assert first.value == pytest.approx(-second.value)
    assert first.interval[0] < first.value < first.interval[1]
    assert first.comparisons == 100


def test_strengths_are_found_again():
    truth = {"a": 1.0, "b": 0.2, "c": -1.2}
    draw = random.Random(0)
    results = []
    for _ in range(6000):
        one, other = draw.sample(sorted(truth), 2)
        chance = 1 / (1 + math.exp(truth[other] - truth[one]))
        results.append((one, other, float(draw.random() < chance)))
    found, _ = strengths(results)
    for strength in found:
        assert strength.value == pytest.approx(truth[strength.model], abs=0.12)


def test_ties_are_half_a_win_and_a_clean_sheet_is_finite():
    (first, second), _ = strengths([("a", "b", 0.5)] * 9)
    assert first.value == pytest.approx(second.value)
    (best, _), _ = strengths([("a", "b", 1.0)] * 9)
    assert best.model == "a"
    assert 1 < best.value < 10


def test_rankings_are_pairs():
    answer = {"ranks": [2, 1, 2]}
    assert list(comparisons("ranking", answer)) == [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)]
    assert list(comparisons("pairwise", {"choice": "both_bad"})) == []
    assert is_right("ranking", {"ranks": [3, 1, 2]}, answer)  # gold's tie may go either way
    assert not is_right("ranking", {"ranks": [1, 2, 3]}, answer)
    assert is_right("likert", {"axes": {"tone": 4}}, {"axes": {"tone": 5}})
    assert not is_right("likert", {"axes": {"tone": 3}}, {"axes": {"tone": 5}})

"""Sampling against closed forms and brute force."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from serve.engine import sampling
from serve.engine.base import SamplingParams

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0])


def adjusted(
    counts: dict[int, int] | None = None, prompt: tuple[int, ...] = (), **params: Any
) -> list[float]:
    row = sampling.adjust(LOGITS, SamplingParams(**params), prompt, counts or {}, ())
    return row.tolist()


def test_penalties_by_hand() -> None:
    assert adjusted({0: 3, 3: 1}, presence_penalty=0.5) == [1.5, -1.0, 0.5, -0.5]
    assert adjusted({0: 3, 3: 1}, frequency_penalty=0.5) == [0.5, -1.0, 0.5, -0.5]
    assert adjusted({1: 2}, prompt=(0,), repetition_penalty=2.0) == [1.0, -2.0, 0.5, 0.0]
    assert adjusted(logit_bias={2: 10.0, 0: -1.0}) == [1.0, -1.0, 10.5, 0.0]
    assert LOGITS.tolist() == [2.0, -1.0, 0.5, 0.0]  # never changed in place


def test_penalties_see_only_generated_tokens_but_repetition_sees_the_prompt() -> None:
    assert adjusted(prompt=(0, 1), presence_penalty=1, frequency_penalty=1) == LOGITS.tolist()
    assert adjusted(prompt=(1,), repetition_penalty=3.0)[1] == -3.0


def test_banned_tokens_are_impossible() -> None:
    row = sampling.adjust(LOGITS, SamplingParams(), (), {}, {0})
    assert row[0] == -math.inf
    assert sampling.choose(row, SamplingParams(temperature=0), 0, 0) == 2


def brute_force(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    if top_k:
        order = order[:top_k]
    total = sum(probabilities[i] for i in order)
    kept, mass = [], 0.0
    for index in order:
        if mass >= top_p * total:
            break
        kept.append(index)
        mass += probabilities[index]
    return {i for i in kept if probabilities[i] >= min_p * probabilities[order[0]]}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=600, unique=True),
    st.integers(0, 20),
    st.sampled_from([0.1, 0.37, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_truncation_is_brute_force(
    weights: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float64)
    probabilities /= probabilities.sum()
    ids, kept = sampling.truncate(probabilities, top_k, top_p, min_p)
    found = range(len(weights)) if ids is None else ids.tolist()
    assert set(found) == brute_force(probabilities.tolist(), top_k, top_p, min_p)
    assert torch.equal(kept, probabilities[list(found)])


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=0.7)
    expected = torch.softmax(LOGITS / 0.7, -1).tolist()
    draws = Counter(sampling.choose(LOGITS, params, seed, 5) for seed in range(4000))
    for token, probability in enumerate(expected):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(draws[token] / 4000 - probability) < 4 * spread


def test_a_draw_depends_on_seed_and_position_only() -> None:
    assert sampling.uniform(7, 3) == sampling.uniform(7, 3)
    numbers = {sampling.uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(numbers) == 900
    assert all(0 <= number < 1 for number in numbers)


def test_a_tiny_temperature_is_greedy() -> None:
    params = SamplingParams(temperature=1e-4)
    assert {sampling.choose(LOGITS, params, seed, 0) for seed in range(50)} == {0}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    drawn = {sampling.choose(logits, SamplingParams(), seed, 0) for seed in range(200)}
    assert drawn == {1, 3}


def test_logprobs_are_of_the_untouched_distribution() -> None:
    [entry] = sampling.logprobs_of(LOGITS[None], [3], 2)
    expected = torch.log_softmax(LOGITS, -1)
    assert entry.logprob == expected[3].item()
    assert entry.top == ((0, expected[0].item()), (2, expected[2].item()))
    assert sampling.logprobs_of(LOGITS[None], [3], 0)[0].top == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2),
        ("max_tokens", -1),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("min_tokens", 17),
        ("stop", ("",)),
    ],
)
def test_wrong_values_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name

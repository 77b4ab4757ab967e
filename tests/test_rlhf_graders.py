"""Graders as rewards: cosines in training are those of the base, whatever its adapters say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_rlhf_roles import make_roles
from tiny_models import tiny_model, tiny_tokenizer

from data.errors import ConfigError, TrainingFailed
from data.similarity import meteor
from rlhf.graders import GraderReward
from rlhf.prompts import Prompt
from rlhf.rollout import Sample

GRADER = {
    "type": "text_similarity",
    "name": "alike",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "cosine",
}
TEXTS = ["a cat", "a cat sat there", "", "two dogs", "a cat"]
ANSWERS = ["the cat", "the cat", "the cat", "two dogs", ""]


def samples(texts: list[str] = TEXTS, answers: list[str] = ANSWERS) -> list[Sample]:
    pairs = enumerate(zip(texts, answers, strict=True), 1)
    return [
        Sample(Prompt(line, (1, 2), "p", {"answer": answer}), (3,), text, True, (-1.0,))
        for line, (text, answer) in pairs
    ]


def reward(grader: dict[str, Any], context_length: int = 512) -> GraderReward:
    base: Any = SimpleNamespace(
        tokenizer=tiny_tokenizer(), context_length=context_length, name="tiny"
    )
    return GraderReward(grader, make_roles(), None, base)


def states(text: str) -> torch.Tensor:
    ids = torch.tensor([tiny_tokenizer().encode(text)])
    with torch.no_grad():
        return tiny_model("llama").model(input_ids=ids).last_hidden_state[0].mean(0)


def test_cosines_are_those_of_the_plain_base() -> None:
    found = reward(GRADER).score(samples())
    wanted = [
        float(torch.cosine_similarity(states(text), states(answer), dim=0))
        if text and answer
        else 0.0
        for text, answer in zip(TEXTS, ANSWERS, strict=True)
    ]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found[3] == pytest.approx(1)
    assert reward(GRADER).score(samples(["", ""], ["", "a"])) == [1.0, 0.0]


def test_a_cosine_in_a_formula() -> None:
    stems = GRADER | {"evaluation_metric": "meteor"}
    parts = {"near": GRADER, "stems": stems}
    both = {"type": "multi", "graders": parts, "calculate_output": "near + 2 * stems"}
    near = reward(GRADER).score(samples())
    expected = [
        cosine + 2 * meteor(text, answer)
        for cosine, text, answer in zip(near, TEXTS, ANSWERS, strict=True)
    ]
    assert reward(both).score(samples()) == pytest.approx(expected)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(TrainingFailed, match=r"24 tokens for line 1 .* at most 20"):
        reward(GRADER, context_length=20).score(samples(["x" * 24], ["a"]))
    with pytest.raises(TrainingFailed, match="line 1 of the prompts' file does not have"):
        reward(GRADER | {"reference": "{{ item.other }}"}).score(samples())
    with pytest.raises(ConfigError, match=r"expected one of .*cosine"):
        reward(GRADER | {"evaluation_metric": "sine"})
    parsed = GRADER | {"input": "{{ sample.output_json.v }}"}
    assert reward(parsed).score(samples(["{"], ["a"])) == [0.0]

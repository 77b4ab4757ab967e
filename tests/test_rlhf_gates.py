"""What decides whether a policy or a reward model is promoted, and what is told on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from test_rlhf_ppo import lines, place, run
from test_rlhf_reward import pairs_of, vowel_rows, write
from test_rlhf_roles import ROWS, TEMPERATURE, alone, make_roles
from test_rlhf_trl import words

from rlhf import dpo, grpo, report_card
from rlhf.actor_critic import POLICY, REFERENCE, make_micro
from rlhf.config import RewardConfig
from rlhf.evaluate import Answers, compare, gate
from rlhf.experience import response_kl
from rlhf.ppo_trainer import PpoTrainer
from rlhf.prompts import Prompt
from rlhf.reward_model import Normalizer
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rewards import make_source
from rlhf.rollout import Sample
from rlhf.trl_config import DpoConfig
from serve.engine import base_model

__all__ = ["place"]  # a fixture


def exact_kl(ours, theirs, prompt, response) -> float:
    """The sum over a response's tokens of the KL of two models' distributions, one at a time."""
    total = 0.0
    for step in range(len(response)):
        ids = torch.tensor([[*prompt, *response[:step]]])
        with torch.no_grad():
            log_p, log_q = (
                (model(input_ids=ids).logits[0, -1].double() / TEMPERATURE).log_softmax(-1)
                for model in (ours, theirs)
            )
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def sample(prompt, response, text="") -> Sample:
    return Sample(Prompt(1, tuple(prompt), "p", {}), tuple(response), text, True, ())


def test_the_kl_of_responses_is_that_of_the_two_models():
    roles = make_roles()
    with torch.no_grad():
        for parameter in roles.parameters_of(POLICY):
            parameter += 0.1 * torch.randn(parameter.shape)
    models = [alone("llama", roles, role) for role in (POLICY, REFERENCE)]
    wanted = [exact_kl(*models, *row) for row in ROWS]
    found = roles.divergence(make_micro(ROWS, 4, roles.device)).sum(1)
    assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    total, count = response_kl(roles, [sample(*row) for row in ROWS] + [sample((1,), ())], 7)
    assert (total, count) == (pytest.approx(sum(wanted), rel=1e-3), len(ROWS))


def test_the_outcome_tells_the_kl_of_the_policy_that_is_saved(place, monkeypatch):
    """Not of the one that answered, which had not learned from its answers yet."""
    seen: list[Sample] = []
    judge = PpoTrainer._judge
    monkeypatch.setattr(PpoTrainer, "_judge", lambda self, s: seen.extend(s) or judge(self, s))
    given = {
        **{"reward.function": "my_rewards:vowels", "batch_size": 16, "total_episodes": 16},
        **{"num_epochs": 4, "learning_rate": 1e-2, "temperature": TEMPERATURE, "eval_prompts": 3},
    }
    assert run(place, "one-update", **given) == 0
    base, _ = base_model.load(place / "tiny-base", "float32", "cpu")
    start, _ = base_model.load(place / "tiny-base", "float32", "cpu")
    tuned = PeftModel.from_pretrained(base, str(place / "one-update/adapter"))
    wanted = [exact_kl(tuned, start, s.prompt.ids, s.response) for s in seen]
    result = json.loads((place / "one-update/result.json").read_text())
    assert lines(place / "one-update/metrics.jsonl")[0]["objective/kl"] == 0
    rows = [r for r in lines(place / "one-update/completions.jsonl") if r["kind"] == "rollout"]
    assert [row["kl"] for row in rows] == [0, 0]
    assert "<th>KL</th>" in (place / "one-update/report.html").read_text()
    assert result["kl"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-3)
    assert result["kl"] > 0.01


def test_a_run_that_was_killed_at_its_end_is_judged_alike(place):
    given = {"reward.function": "my_rewards:vowels", "total_episodes": 32, "kl.budget": 0.001}
    assert run(place, "ended", **given) == 0
    path = place / "ended/result.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert run(place, "ended", **given) == 0
    after = json.loads(path.read_text())
    for name in ("gate", "kl", "score", "eos_rate", "comparison", "chosen_update"):
        assert after.get(name) == before.get(name)


def test_no_gate_opens_without_rewards_or_far_from_the_start():
    samples = [sample((1,), (2, 3))] * 2
    known, unknown = Answers(samples, [0.0, 1.0]), Answers(samples, [math.nan, math.nan])
    assert gate({}) is None
    json.dumps(compare(known, unknown), allow_nan=False)
    found = gate({"comparison": compare(known, unknown)})
    assert found == {"promote": False, "reasons": ["no answer to the fixed prompts got a reward"]}
    better = {"comparison": compare(known, Answers(samples, [1.0, 2.0]))}
    assert gate({**better, "kl": 3.0})["promote"]
    far = gate({**better, "kl": 26.0})
    assert not far["promote"]
    assert far["reasons"] == ["KL 26.00 of at most 25"]


@pytest.mark.parametrize(
    ("before", "after", "promoted"),
    [
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", ""], True),
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "", " "], False),
        (["a", "", "", "", ""], [""] * 5, False),  # it fell silent
        ([""] * 5, [""] * 5, True),  # the start said nothing either
        ([""] * 5, ["a"] * 5, True),
    ],
)
def test_a_policy_that_falls_silent_is_not_promoted(before, after, promoted):
    start, end = (
        Answers([sample((1,), (2,), text) for text in texts], [score] * 5)
        for texts, score in ((before, 0.0), (after, 1.0))
    )
    found = gate({"comparison": compare(start, end), "kl": 1.0})
    assert found["promote"] is promoted
    if not promoted:
        assert found["reasons"][0].startswith("answers without text")


def test_a_reward_model_no_better_than_chance_is_not_promoted():
    cards = [
        {"accuracy": report_card.accuracy(pairs), "accuracy_interval": report_card.bootstrap(pairs)}
        for pairs in (pairs_of([1.0, -1.0] * 4), pairs_of([1.0, 1.0, -1.0]))
    ]
    assert [report_card.gate(card)["promote"] for card in cards] == [False, True]
    undecided = report_card.gate({"accuracy": None, "accuracy_interval": None})
    assert undecided == {"promote": False, "reasons": ["no held-out comparison is decided"]}


def test_pairs_that_labelers_disagree_on_count_as_often_as_they_agree():
    pairs = pairs_of([1.0, -1.0, 0.0], probs=[2 / 3, 2 / 3, 1.0])
    assert report_card.accuracy(pairs) == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)
    [bin_] = report_card.reliability(pairs_of([0.7] * 3, probs=[2 / 3] * 3))
    assert bin_["accuracy"] == pytest.approx(2 / 3)  # sigmoid(0.7) is 0.668: calibrated
    assert abs(bin_["confidence"] - bin_["accuracy"]) < 0.01


def test_a_formula_over_a_reward_model_is_not_the_reward_model_alone():
    roles = make_roles()
    samples = [sample(*row, text) for row, text in zip(ROWS, ("a", "b", "a"), strict=True)]
    is_a = {"type": "string_check", "name": "a", "operation": "eq", "reference": "a"}
    parts = {
        "a": {**is_a, "input": "{{ sample.output_text }}"},
        "judge": {"type": "score_model", "name": "judge", "model": "ft:judge"},
    }
    both = {"type": "multi", "graders": parts, "calculate_output": "10 * a + judge"}
    made = [
        make_source(PpoRewardSettings(model="reward", grader=grader), roles, Normalizer(), None)
        for grader in (None, both)
    ]
    alone_, formula = (source.score(samples) for source in made)
    wanted = [score + 10 * (s.text == "a") for score, s in zip(alone_, samples, strict=True)]
    assert formula == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", [RewardConfig, DpoConfig])
def test_dropout_that_would_not_act_is_refused(kind):
    given = {"base_model": "b", "output_dir": "o", "train_file": "t", "lora": {"dropout": 0.1}}
    with pytest.raises(ValidationError, match=r"lora\.dropout must be 0"):
        kind(**given)


def test_a_step_that_is_not_finite_is_never_a_whole_checkpoint(place, capsys):
    pairs = write(place / "pairs.jsonl", vowel_rows(40))
    given = words(place, "burst", train_file=pairs, num_epochs=4, n_evals=50)
    assert dpo.main([*given, "learning_rate=1e30", "warmup_fraction=0"]) == 1
    error = json.loads((place / "burst/error.json").read_text())
    assert error["code"] == "loss_not_finite"
    for mark in (place / "burst/checkpoints").glob("checkpoint-*/complete"):
        from safetensors.torch import load_file

        tensors = load_file(mark.parent / "adapter_model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_constant_reward_of_groups_is_told(place: Path):
    given = {"prompts_file": place / "prompts.jsonl", "total_episodes": 16, "max_new_tokens": 4}
    source = {"reward.function": "my_rewards:constant", "reward.missing_eos_penalty": 0}
    assert grpo.main(words(place, "flat", **given, **source, eval_prompts=3)) == 0
    events = [event["message"] for event in lines(place / "flat/events.jsonl")]
    assert any("every response got the same score" in message for message in events)
    result = json.loads((place / "flat/result.json").read_text())
    assert result["kl"] >= 0
    assert not result["gate"]["promote"]  # nothing rose

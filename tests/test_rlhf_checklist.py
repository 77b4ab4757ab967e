"""What PPO's literature lists as easily wrong and no other test here looks at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from test_rlhf_ppo import lines, place, run
from test_rlhf_roles import ROWS, lora, make_roles
from test_rlhf_rollout import base, policy_on
from test_rlhf_updates import config
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn

from data.render import render_answer, render_prompt
from data.rows import Message
from rlhf.actor_critic import POLICY, VALUE, ActorCritic, make_micro, with_policy
from rlhf.experience import shape_scores
from rlhf.ppo_setup import build_roles
from rlhf.prompts import Prompt
from rlhf.reward_model import Normalizer, RewardHead
from rlhf.reward_settings import PpoRewardSettings
from rlhf.rollout import Sampler
from rlhf.token_scores import CHUNK_BYTES, chosen_scores

__all__ = ["base", "place"]  # fixtures


def test_no_more_logits_than_a_chunk_are_ever_held():
    torch.manual_seed(0)
    width, vocabulary, count = 8, 50_000, 400
    head = nn.Linear(width, vocabulary, bias=False)
    hidden, chosen = torch.randn(count, width), torch.randint(0, vocabulary, (count,))
    held: list[int] = []

    def logits(part: torch.Tensor) -> torch.Tensor:
        held.append(4 * len(part) * vocabulary)
        return head(part)

    with torch.no_grad():
        found, _ = chosen_scores(logits, hidden, chosen, 0.7, closed_form=True)
        wanted = (head(hidden) / 0.7).log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert max(held) <= CHUNK_BYTES < 4 * count * vocabulary


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_nothing_drops_out_while_activations_are_computed_again():
    """GPT-2's configuration asks for dropout in residuals, attention and embeddings."""
    model = with_policy(tiny_model("gpt2"), lora(lora_dropout=0.3))
    assert any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    roles = ActorCritic(model, 1.0)
    roles.add_head(VALUE)
    roles.checkpoint_activations()
    assert roles.model.training
    micro = make_micro(ROWS, 4, roles.device)
    once, again = roles.log_probs(micro, POLICY), roles.log_probs(micro, POLICY)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_an_end_in_the_prompt_does_not_end_the_response(base):
    """A ChatML prompt is full of EOS; a reply that is cut off lacks its own."""
    tokenizer = tiny_tokenizer()
    ids = tuple(render_prompt(tokenizer, [Message("user", "hi")]))
    assert tokenizer.eos_token_id in ids
    sampler = Sampler(base, "cpu", 100, 2, stop_at_eos=True)
    [sample] = sampler.sample(policy_on(base).policy_adapter(), [Prompt(1, ids, "")], [3], 2, 0.7)
    sampler.close()
    assert sample.ended == (sample.response[-1] == tokenizer.eos_token_id)
    assert not sample.ended
    settings = PpoRewardSettings(function="m:f", missing_eos_penalty=1.0)
    assert shape_scores([0.5], [sample], settings, stops=True) == [-0.5]


def test_without_learning_every_evaluation_says_the_same(place: Path):
    still = {"learning_rate": 1e-30, "value.learning_rate": 1e-30, "eval_every": 1}
    assert run(place, "still", **{"reward.function": "my_rewards:vowels"}, **still) == 0
    said: dict[int, list[str]] = {}
    for row in lines(place / "still/completions.jsonl"):
        if row["kind"] in ("eval", "final"):
            said.setdefault(row["step"], []).append(row["response"])
    assert list(said) == [0, 1, 2, 3, 4]
    assert all(texts[:4] == said[0] for texts in said.values())


@pytest.mark.parametrize("chat", [False, True])
def test_a_rollout_ends_as_the_transcripts_that_the_reward_model_learned(chat: bool):
    """Else it would be scored on a suffix that training never showed."""
    tokenizer = tiny_tokenizer()
    asked = [Message("user", "say 1: ")] if chat else "say 1: "
    said = [Message("assistant", "one")] if chat else "one"
    response = (*tokenizer.encode("one"), tokenizer.eos_token_id)
    read = render_answer(tokenizer, asked, said).input_ids
    assert tuple(read) == (*render_prompt(tokenizer, asked), *response)
    roles = make_roles()
    rollout, transcript = [*render_prompt(tokenizer, asked), *response], list(read)
    with torch.no_grad():
        scores = roles.rewards([rollout, transcript])
    assert scores[0] == scores[1]


def test_the_value_starts_as_the_normalised_score_of_the_reward_model(tmp_path: Path):
    judge = get_peft_model(tiny_model("llama"), lora())
    judge.save_pretrained(str(tmp_path))
    weight = torch.randn(1, judge.config.hidden_size)
    settings = config(reward={"model": tmp_path})
    tiny = SimpleNamespace(model=tiny_model("llama"))
    roles = build_roles(settings, tiny, RewardHead(weight, Normalizer(0.7, 2.5, 256)))
    micro = make_micro([(prompt, (*response, 9)) for prompt, response in ROWS], 5, roles.device)
    with torch.no_grad():
        found = roles.values(micro)
        for row, (prompt, response) in enumerate(ROWS):
            ids = torch.tensor([[*prompt, *response]])
            last = judge.get_base_model().model(input_ids=ids).last_hidden_state[0, -1]
            score = (float(weight[0] @ last) - 0.7) / 2.5
            assert float(found[row, len(response)]) == pytest.approx(score, abs=1e-4)

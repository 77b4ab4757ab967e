"""What a policy learned from judged answers is worth, on prompts that it has not seen.

Such a policy is a reward model in itself: beta * log(p / p_ref) of an answer is the reward that it
has learned (eq. 5 of arXiv:2305.18290, up to a term of the prompt alone; arXiv:2402.01306 has the
same). So two things can be told without anybody who judges: whether it orders held-out answers as
people did, and how it answers held-out prompts beside the policy that it started from. A reward
model, where there is one, also says which of the two answers better.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from rlhf.actor_critic import (
    POLICY,
    REFERENCE,
    REWARD,
    ActorCritic,
    copy_adapter,
    load_role,
    make_micro,
)
from rlhf.evaluate import Answers, compare, gate, summarize
from rlhf.experience import response_kl
from rlhf.judged_rows import Row, Rows
from rlhf.prompts import Prompt
from rlhf.report_card import Judged, accuracy, bootstrap
from rlhf.reward_model import read_head
from rlhf.rewards import BATCH_TOKENS, ModelReward, by_length
from rlhf.rollout import GREEDY_ENOUGH, Sample, Sampler, describe, seed_of
from rlhf.trl_config import OfflineConfig
from serve.engine.adapter_files import memory_adapter
from serve.engine.base import MemoryAdapter
from train.base_model import Base
from train.run import RunFolder, write_lines

TRL_REFERENCE = "ref"  # the adapter in which TRL's trainers keep the start
Text = tuple[Sequence[int], Sequence[int]]  # ids of a prompt and of an answer


def judge(
    config: OfflineConfig, base: Base, model: PeftModel, rows: Rows, run: RunFolder, step: int
) -> dict[str, Any]:
    """Return how the trained policy does on held-out rows, and the gate; {} where there are none.

    Writes the answers of start and end to the run's completions.

    Args:
        model: The base with the trained policy and TRL's copy of its start, if that is an adapter;
            it gets the adapters to compare it with.
        step: The last.
    """
    if not rows:
        return {}
    roles = _roles(config, model)
    found: dict[str, Any] = {"held_out": order(roles, rows, config.beta)}
    prompts = prompts_of(rows, config.eval_prompts, config.max_new_tokens, base)
    if prompts:
        start, end = _answer(config, base, roles, prompts)
        total, count = response_kl(roles, end.samples, BATCH_TOKENS)
        plain = {"start": summarize(start), "end": summarize(end)}
        found["comparison"] = plain if config.reward_model is None else compare(start, end)
        found["kl"] = total / max(count, 1)
        told = zip(_told(start, 0, "start"), _told(end, step, "final"), strict=True)
        write_lines(run.completions, itertools.chain.from_iterable(told))
    return found | {"gate": gate(found)}


def order(roles: ActorCritic, rows: Rows, beta: float) -> dict[str, Any] | None:
    """Return how often the policy's own reward orders answers as they were judged.

    Of comparisons it is the share of pairs whose chosen answer has more reward, with an interval
    resampled by prompt. Of judged answers it is the share of pairs of a good and a bad answer to
    one prompt whose good one has more; where no prompt has both, of all such pairs
    (`across_prompts`, the area under the ROC curve), to which what the prompts are adds its part.
    Equal rewards count half. None where every answer was judged alike.
    """
    if "label" in rows[0]:
        texts = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        return _order_judged(rows, implicit_rewards(roles, texts, beta))
    chosen, rejected = (
        [(row["prompt_ids"], row[name]) for row in rows] for name in ("chosen_ids", "rejected_ids")
    )
    rewards = implicit_rewards(roles, chosen + rejected, beta)
    groups = {ids: index for index, ids in enumerate(dict.fromkeys(map(_prompt, rows)))}
    pairs = [
        Judged(
            *(groups[_prompt(row)], row["line"], better, worse),
            *(len(row["chosen_ids"]), len(row["rejected_ids"]), 1.0),
        )
        for row, better, worse in zip(rows, rewards[: len(rows)], rewards[len(rows) :], strict=True)
    ]
    return {
        "accuracy": accuracy(pairs),
        "accuracy_interval": bootstrap(pairs),
        "pairs": len(pairs),
    }


@torch.no_grad()
def implicit_rewards(roles: ActorCritic, texts: Sequence[Text], beta: float) -> list[float]:
    """Return beta * log(p / p_ref), in nats, of each answer to its prompt."""
    found = [0.0] * len(texts)
    for part in by_length([len(prompt) + len(answer) for prompt, answer in texts], BATCH_TOKENS):
        rows = [texts[index] for index in part]
        micro = make_micro(rows, max(len(answer) for _, answer in rows), roles.device)
        ours, theirs = (roles.log_probs(micro, role)[0] for role in (POLICY, REFERENCE))
        for index, reward in zip(part, (ours - theirs).double().sum(1).tolist(), strict=True):
            found[index] = beta * reward
    return found


def prompts_of(rows: Rows, count: int, max_new_tokens: int, base: Base) -> list[Prompt]:
    """Return the first different prompts of held-out rows that leave room for an answer."""
    room = base.context_length - max_new_tokens
    lines: dict[tuple[int, ...], int] = {}
    for row in rows:
        lines.setdefault(_prompt(row), row["line"])
    fitting = [(ids, line) for ids, line in lines.items() if len(ids) <= room][:count]
    return [
        Prompt(line, ids, base.tokenizer.decode(list(ids), skip_special_tokens=True))
        for ids, line in fitting
    ]


def _roles(config: OfflineConfig, model: PeftModel) -> ActorCritic:
    """Put the start of the policy, and the reward model if there is one, beside the policy."""
    if config.start_adapter is not None:  # else it is the base, as no adapter has that name
        copy_adapter(model, TRL_REFERENCE, REFERENCE)
    if config.reward_model is not None:
        load_role(model, config.reward_model, REWARD)
    return ActorCritic(model, 1.0)


def _answer(
    config: OfflineConfig, base: Base, roles: ActorCritic, prompts: Sequence[Prompt]
) -> list[Answers]:
    """Answer the prompts nearly greedily, as the policy was at the start and as it is now."""
    start: MemoryAdapter | None = None
    if config.start_adapter is not None:
        shape = roles.model.peft_config[REFERENCE].to_dict()
        start = memory_adapter(shape, roles.adapter_state(REFERENCE))
    longest = max(len(prompt.ids) for prompt in prompts)
    room, count = longest + config.max_new_tokens, len(prompts)
    seeds = [seed_of(config.seed, -1, index) for index in range(count)]
    sampler = Sampler(base, config.device, room, count, stop_at_eos=True)
    try:
        both = [
            sampler.sample(policy, prompts, seeds, config.max_new_tokens, GREEDY_ENOUGH)
            for policy in (start, roles.policy_adapter())
        ]
    finally:
        sampler.close()
    return [Answers(samples, _score(config, base, roles, samples)) for samples in both]


def _score(
    config: OfflineConfig, base: Base, roles: ActorCritic, samples: Sequence[Sample]
) -> list[float]:
    if config.reward_model is None:
        return [float("nan")] * len(samples)
    head = read_head(config.reward_model, base.fingerprint)
    roles.add_head(REWARD, head.weight)
    return ModelReward(roles, head.normalizer).score(samples)


def _order_judged(rows: Rows, rewards: Sequence[float]) -> dict[str, Any] | None:
    """Return the share of pairs of a good and a bad answer whose good one has more reward."""
    by_prompt: dict[tuple[int, ...], _Sides] = {}
    every = _Sides([], [])
    for row, reward in zip(rows, rewards, strict=True):
        for sides in (by_prompt.setdefault(_prompt(row), _Sides([], [])), every):
            (sides.good if row["label"] else sides.bad).append(reward)
    counted = [sides for sides in by_prompt.values() if sides.pairs]
    across = not counted
    counted = counted or [every]
    pairs = sum(sides.pairs for sides in counted)
    if not pairs:
        return None
    right = sum(sides.ordered() for sides in counted)
    found: dict[str, Any] = {"accuracy": right / pairs, "accuracy_interval": None, "pairs": pairs}
    return found | {"across_prompts": across}


@dataclass(frozen=True)
class _Sides:
    """Rewards of good answers and of bad ones."""

    good: list[float]
    bad: list[float]

    @property
    def pairs(self) -> int:
        return len(self.good) * len(self.bad)

    def ordered(self) -> float:
        """Return how many pairs have the good one above the bad; equal ones count half."""
        bad = sorted(self.bad)
        return sum(bisect_left(bad, good) + bisect_right(bad, good) for good in self.good) / 2


def _told(answers: Answers, step: int, kind: str) -> list[Mapping[str, Any]]:
    return [
        describe(sample, score=score, step=step, kind=kind)
        for sample, score in zip(answers.samples, answers.scores, strict=True)
    ]


def _prompt(row: Row) -> tuple[int, ...]:
    return tuple(row["prompt_ids"])

"""Comparing a policy with the one it started from, on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.intervals import wilson
from rlhf.rollout import Sample

EOS_LOSS = 0.2  # of the share of answers that end, or say something, that a policy may lose
MOST_KL = 25.0  # nats a response; rewards are no longer worth much that far from the start
MOST_GROWTH = 2.0  # of the mean length


@dataclass(frozen=True)
class Answers:
    """Responses to the fixed prompts and their scores, NaN where there is none."""

    samples: Sequence[Sample]
    scores: Sequence[float]

    @property
    def mean_score(self) -> float:
        known = [score for score in self.scores if not math.isnan(score)]
        return sum(known) / len(known) if known else math.nan


def summarize(answers: Answers) -> dict[str, float]:
    """Return mean reward, if there is any, length in tokens, and of all answers the shares that
    ended by themselves and that have no text."""
    count = len(answers.samples)
    if not count:
        return {}
    mean = answers.mean_score
    return {
        **({"reward": mean} if math.isfinite(mean) else {}),
        "length_mean": sum(len(sample.response) for sample in answers.samples) / count,
        "eos_rate": sum(sample.ended for sample in answers.samples) / count,
        "empty_rate": sum(not sample.text.strip() for sample in answers.samples) / count,
    }


def compare(start: Answers, end: Answers) -> dict[str, object]:
    """Return both sides' numbers and how often the end scores above the start."""
    pairs = [
        (before, after)
        for before, after in zip(start.scores, end.scores, strict=True)
        if not (math.isnan(before) or math.isnan(after))
    ]
    wins = sum(after > before for before, after in pairs)
    ties = sum(after == before for before, after in pairs)
    low, high = wilson(wins + ties / 2, len(pairs))
    return {
        "start": summarize(start),
        "end": summarize(end),
        "win_rate": (wins + ties / 2) / len(pairs) if pairs else None,
        "win_rate_interval": [low, high],
        "prompts": len(pairs),
        "ties": ties,
    }


def gate(outcome: Mapping[str, Any], kl_limit: float = MOST_KL) -> dict[str, Any] | None:
    """Decide whether a policy may take the place of the one it started from, and say why.

    It may when it orders held-out answers better than chance, its reward rose, it wins at least as
    often as it loses, it still ends its answers, they did not double in length and still say
    something, and its KL is within the limit; of these what was measured counts. None where nothing
    was.

    Args:
        outcome: `held_out`, of `rlhf.held_out.order`; `comparison`, of `compare`, or of
            `summarize` alone where nothing scores answers; and `kl`, of a response of the policy,
            in nats.
        kl_limit: Most nats a response that the policy may differ from the start by.
    """
    held, found, kl = (outcome.get(name) for name in ("held_out", "comparison", "kl"))
    if not held and not found:
        return None
    rules: list[tuple[bool, str]] = []
    if held:
        told = f"orders {held['accuracy']:.1%} of {held['pairs']} held-out pairs as people did"
        if held.get("across_prompts"):
            told = (
                f"puts good before bad in {held['accuracy']:.1%} of {held['pairs']} held-out pairs"
            )
        rules.append((held["accuracy"] > 0.5, told))
    if found:
        if "win_rate" in found and found["win_rate"] is None:
            return {"promote": False, "reasons": ["no answer to the fixed prompts got a reward"]}
        rules += _answer_rules(found)
    if kl is not None:
        rules.append((kl <= kl_limit, f"KL {kl:.2f} of at most {kl_limit:g}"))
    failed = [reason for passed, reason in rules if not passed]
    return {"promote": not failed, "reasons": failed or [reason for _, reason in rules]}


def _answer_rules(found: Mapping[str, Any]) -> list[tuple[bool, str]]:
    start, end = found["start"], found["end"]
    rules = []
    if "win_rate" in found:
        rose = f"reward {start['reward']:.3f} to {end['reward']:.3f}"
        won = f"wins {found['win_rate']:.0%} of {found['prompts']} prompts"
        rules += [(end["reward"] > start["reward"], rose), (found["win_rate"] >= 0.5, won)]
    ends = f"answers that end {start['eos_rate']:.0%} to {end['eos_rate']:.0%}"
    length = f"length {start['length_mean']:.0f} to {end['length_mean']:.0f} tokens"
    most = MOST_GROWTH * max(start["length_mean"], 1.0)
    empty = f"answers without text {start['empty_rate']:.0%} to {end['empty_rate']:.0%}"
    more = end["empty_rate"] > start["empty_rate"] + EOS_LOSS
    silenced = end["empty_rate"] == 1 > start["empty_rate"]
    return [
        *rules,
        (end["eos_rate"] >= start["eos_rate"] - EOS_LOSS, ends),
        (end["length_mean"] <= most, length),
        (not more and not silenced, empty),
    ]

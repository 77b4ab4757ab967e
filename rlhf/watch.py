"""Looking at a PPO run while it goes: the numbers of an update, and alarms about them.

Names are those of TRL's PPO trainer, with hone's beside them (docs/rlhf.md lists all).
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rlhf import ppo_math
from rlhf.actor_critic import POLICY, VALUE
from rlhf.experience import Experience
from rlhf.ppo_setup import Team
from rlhf.updates import UpdateStats

WINDOW = 10  # updates that an alarm about a trend looks at
ALARM_EVERY = 10  # records until the same alarm is told again
GROWTH = 1.25  # of the length of responses within it


def measure(
    experience: Experience,
    stats: UpdateStats,
    seconds: Mapping[str, float],
    team: Team,
    max_new_tokens: int,
    clip: float,
) -> dict[str, float]:
    """Return the numbers of an update, over the responses of all processes.

    Args:
        clip: Beyond which scores are cut; infinite where none is.
    """
    mask = experience.mask
    lengths = mask.sum(1).double()
    kl = ppo_math.sequence_kl(experience.log_probs, experience.ref_log_probs, mask).double()
    k3 = ppo_math.sequence_kl_k3(experience.log_probs, experience.ref_log_probs, mask).double()
    scores, raw = experience.scores.double(), experience.raw.double()
    ended = torch.tensor([float(sample.ended) for sample in experience.samples]).double()
    tokens = mask.sum().double()
    parts: dict[str, Tensor] = {
        "count": torch.tensor(float(len(experience)), dtype=torch.float64),
        "tokens": tokens,
        "kl": kl.sum(),
        "k3": k3.sum(),
        "entropy": experience.entropies.double().sum(),
        "scores": scores.sum(),
        "scores2": scores.square().sum(),
        "raw": raw.sum(),
        "clipped": (experience.raw.abs() > clip).double().sum(),
        "ended": ended.sum(),
        "lengths2": lengths.square().sum(),
        "score_length": (scores * lengths).sum(),
        "at_limit": (lengths >= max_new_tokens).double().sum(),
        "values": experience.values.double().sum(),
        "returns": experience.returns.double().sum(),
        "returns2": experience.returns.double().square().sum(),
        "residual": (experience.returns - experience.values).double().sum(),
        "residual2": (experience.returns - experience.values).double().square().sum(),
        "gap": torch.tensor(0.0 if math.isnan(experience.gap) else experience.gap).double(),
    }
    totals = dict(zip(parts, team.sum(torch.stack(list(parts.values()))).tolist(), strict=True))
    count, tokens_all = max(totals["count"], 1.0), max(totals["tokens"], 1.0)
    score, length = totals["scores"] / count, tokens_all / count
    score_var = max(totals["scores2"] / count - score**2, 0.0)
    length_var = max(totals["lengths2"] / count - length**2, 0.0)
    together = totals["score_length"] / count - score * length
    returns = totals["returns"] / tokens_all
    returns_var = max(totals["returns2"] / tokens_all - returns**2, 0.0)
    residual_var = totals["residual2"] / tokens_all - (totals["residual"] / tokens_all) ** 2
    spread = math.sqrt(score_var * length_var)
    mean_ratio = sum(stats.ratios) / len(stats.ratios) if stats.ratios else math.nan
    ratio_var = (
        sum((ratio - mean_ratio) ** 2 for ratio in stats.ratios) / len(stats.ratios)
        if stats.ratios
        else math.nan
    )
    total = sum(seconds.values())
    of_lengths = torch.bincount(lengths.long(), minlength=max_new_tokens + 1).double()
    longest = team.sum(of_lengths).nonzero()
    learned = stats if stats.ratios else None  # None: the value alone, whose policy is not measured

    def policy(name: str) -> float:
        return learned.mean(name) if learned else math.nan

    return {
        "eps": count / total if total else 0.0,
        "objective/kl": totals["kl"] / count,
        "objective/kl_k3": totals["k3"] / count,
        "objective/kl_per_token": totals["kl"] / tokens_all,
        "objective/entropy": totals["entropy"] / count,
        "objective/scores": score,
        "objective/score_std": math.sqrt(score_var),
        "objective/raw_scores": totals["raw"] / count,
        "policy/approxkl_avg": policy("approx_kl"),
        "policy/clipfrac_avg": policy("clipped"),
        "policy/entropy_avg": policy("entropy"),
        "policy/epochs_done": stats.epochs,
        "loss/policy_avg": policy("loss/policy"),
        "loss/value_avg": stats.mean("loss/value"),
        "val/clipfrac_avg": stats.mean("value_clipped"),
        "val/ratio": mean_ratio,
        "val/ratio_var": ratio_var,
        "val/num_eos_tokens": totals["ended"],
        "val/explained_var": 1 - residual_var / returns_var if returns_var else math.nan,
        "val/vpred_mean": totals["values"] / tokens_all,
        "returns/mean": returns,
        "returns/var": returns_var,
        "grad_norm/policy": _mean(stats.norms[POLICY]),
        "grad_norm/value": _mean(stats.norms[VALUE]),
        "score/clipped_frac": totals["clipped"] / count,
        "score/eos_rate": totals["ended"] / count,
        "score/length_corr": together / spread if spread > 1e-12 else math.nan,
        "response/length_mean": length,
        "response/length_max": float(longest.max()) if len(longest) else 0.0,
        "response/length_clip_ratio": totals["at_limit"] / count,
        "rollout/logprob_gap": totals["gap"] / team.size,
        **{f"time/{name}": value for name, value in seconds.items()},
        "time/step": total,
        "mem/peak": float(peak_bytes()),
    }


def peak_bytes() -> int:
    """Return the most memory the process has had: of the GPU where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alarms(history: Sequence[Mapping[str, Any]], stops_at_eos: bool) -> list[tuple[str, str]]:
    """Return (kind, message) of what looks wrong in the newest of the records."""
    now, found = history[-1], []
    kl, ratio = now["objective/kl"], now.get("val/ratio", 1.0)
    if kl < -1:
        found.append(
            (
                "negative_kl",
                f"the KL of a response is {kl:.2f}: log-probabilities of rollout and training "
                "disagree, or responses are cut where the policy is unlike the reference",
            )
        )
    if not 0.5 <= ratio <= 2:
        found.append(("ratio", f"the mean ratio is {ratio:.2f}: lower learning_rate"))
    eos_rate = now["score/eos_rate"]
    if stops_at_eos and eos_rate < 0.5:
        found.append(
            (
                "eos_rate",
                f"only {eos_rate:.0%} of the responses end by themselves: raise max_new_tokens or "
                "reward.missing_eos_penalty",
            )
        )
    if now["objective/score_std"] == 0:
        found.append(
            ("constant_reward", "every response got the same score: there is nothing to learn from")
        )
    if len(history) > WINDOW:
        then = history[-1 - WINDOW]
        longer = now["response/length_mean"] > GROWTH * then["response/length_mean"]
        higher = now["objective/scores"] > then["objective/scores"]
        if longer and higher:
            found.append(
                (
                    "length",
                    f"score and length rise together: {then['response/length_mean']:.0f} to "
                    f"{now['response/length_mean']:.0f} tokens in {WINDOW} updates; compare at "
                    "equal length",
                )
            )
    found += _gold_falls(history)
    return found


def _gold_falls(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    told = [r for r in history if "eval/gold" in r and "eval/reward" in r]
    if len(told) < 2:
        return []
    then, now = told[-2], told[-1]
    if now["eval/reward"] > then["eval/reward"] and now["eval/gold"] < then["eval/gold"]:
        return [
            (
                "overoptimised",
                f"the reward rose from {then['eval/reward']:.3f} to {now['eval/reward']:.3f} while "
                f"the gold score fell from {then['eval/gold']:.3f} to {now['eval/gold']:.3f}",
            )
        ]
    return []


class Watch:
    """Tells the alarms of a run's records, each at most every ALARM_EVERY records.

    Args:
        tell: Takes a message and the alarm's kind.
        stops_at_eos: Whether responses can end by themselves.
        history: Records of before, of a run that goes on.
    """

    def __init__(
        self,
        tell: Callable[[str, str], None],
        stops_at_eos: bool,
        history: Sequence[Mapping[str, Any]] = (),
    ):
        self._tell = tell
        self._stops_at_eos = stops_at_eos
        self._told: dict[str, int] = {}
        self.history: list[Mapping[str, Any]] = list(history)

    def look(self, record: Mapping[str, Any]) -> None:
        """Add a record, and tell what looks wrong."""
        self.history.append(record)
        now = len(self.history)
        for kind, message in alarms(self.history, self._stops_at_eos):
            if now - self._told.get(kind, -ALARM_EVERY) >= ALARM_EVERY:
                self._told[kind] = now
                self._tell(f"Alarm: {message}", kind)


class Bar:
    """A progress bar with reward, KL and where the time goes; on a terminal only."""

    def __init__(self, total: int, done: int, show: bool):
        self._bar = Progress(
            TextColumn("PPO"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not (show and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("PPO", total=total, completed=done, note="")
        self._bar.start()

    def show(self, done: int, record: Mapping[str, float]) -> None:
        """Show an update."""
        split = " ".join(
            f"{name} {record[f'time/{name}']:.0f}s" for name in ("rollout", "score", "train")
        )
        note = f"score {record['objective/scores']:.2f} KL {record['objective/kl']:.2f} | {split}"
        self._bar.update(self._task, completed=done, note=note)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan

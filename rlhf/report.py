"""A run on one page: curves, the frontier of reward against KL, responses over time, warnings.

What is drawn depends on the method (`SHEETS`). The page holds all it shows; it reads no network and
runs no script. Model text is only ever text.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.ppo_config import PpoConfig
from rlhf.trl_config import DpoConfig, GrpoConfig, KtoConfig, RlooConfig
from train.config import RunConfig
from train.pages import draw, flat, page, table
from train.run import RunFolder, replace_text

Record = Mapping[str, Any]
SHOWN = 60  # rows of the table of completions
FEW = 30  # points that are marked each
TIMES = ("rollout", "score", "train")


@dataclass(frozen=True)
class Curve:
    """One field: its label, and what is drawn in it: (metric, label in the legend)."""

    label: str
    series: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sheet:
    """What the page of a method shows.

    Attributes:
        step: What its steps are called.
        frontier: Of reward against KL: (label, metric of the reward); none where no reward is.
        kl_name: Of a record's KL; nothing is drawn of those without it.
        kl: Returns the KL of a response, in nats, from a record that has it.
        pairs: Responses are of start and end, one after the other for each prompt.
    """

    title: str
    step: str
    curves: tuple[Curve, ...]
    frontier: tuple[tuple[str, str], ...] = ()
    kl_name: str = "objective/kl"
    kl: Callable[[Record], float] = lambda record: float(record["objective/kl"])
    pairs: bool = False


def _one(name: str, label: str) -> Curve:
    return Curve(label, ((name, "training"),))


def _kl_of_group(record: Record) -> float:
    """TRL logs the KL of a token, where beta is above 0."""
    return float(record["kl"] * record["completions/mean_length"])


PPO_CURVES = (
    Curve("score", (("objective/scores", "rollouts"), ("eval/reward", "evaluation"))),
    _one("objective/kl", "KL of a response (nats)"),
    _one("response/length_mean", "tokens of a response"),
    _one("objective/entropy", "entropy of a response (nats)"),
    _one("score/eos_rate", "share that ends by itself"),
    _one("val/explained_var", "explained variance of the value"),
    _one("policy/clipfrac_avg", "share of clipped tokens"),
    _one("objective/kl_coef", "KL coefficient"),
)
GROUP_CURVES = (
    Curve("reward", (("reward", "rollouts"), ("eval/reward", "evaluation"))),
    _one("kl", "KL of a token (nats)"),
    Curve(
        "tokens of a response",
        (("completions/mean_length", "rollouts"), ("eval/length_mean", "evaluation")),
    ),
    _one("train_entropy", "entropy of a token (nats)"),
    _one("completions/clipped_ratio", "share that does not end by itself"),
    _one("frac_reward_zero_std", "share of groups with one reward"),
    _one("grad_norm", "norm of the gradient"),
)
LOSS = Curve("loss", (("train_loss", "training"), ("valid_loss", "held out")))
MARGINS = Curve(
    "margin of the implicit rewards",
    (("rewards/margins", "training"), ("eval_rewards/margins", "held out")),
)
REWARDS = Curve(
    "implicit rewards of held-out answers",
    (("eval_rewards/chosen", "better"), ("eval_rewards/rejected", "worse")),
)
ACCURACY = Curve(
    "share of pairs ordered rightly",
    (("rewards/accuracies", "training"), ("eval_rewards/accuracies", "held out")),
)
OF_GROUPS = ("step", GROUP_CURVES, (("reward", "reward"),), "kl", _kl_of_group)
SHEETS: dict[type[RunConfig], Sheet] = {
    PpoConfig: Sheet(
        *("PPO run", "update", PPO_CURVES),
        (("reward", "objective/raw_scores"), ("gold", "objective/gold_score")),
    ),
    RlooConfig: Sheet("RLOO run", *OF_GROUPS),
    GrpoConfig: Sheet("GRPO run", *OF_GROUPS),
    DpoConfig: Sheet("DPO run", "step", (LOSS, ACCURACY, MARGINS, REWARDS), pairs=True),
    KtoConfig: Sheet(
        *("KTO run", "step", (LOSS, MARGINS, REWARDS, _one("kl", "KL of a batch"))), pairs=True
    ),
}


def write_report(run: RunFolder, config: RunConfig, outcome: Record) -> None:
    """Write `report.html` into a run's folder."""
    records, events = run.read(run.metrics), run.read(run.events)
    sheet = SHEETS[type(config)]
    parts = [
        table("Outcome", flat(outcome)),
        _alarms(events),
        "<h2>Curves</h2>",
        *(_curve(records, curve, sheet.step) for curve in sheet.curves if _is_in(records, curve)),
    ]
    if sheet.frontier and any(sheet.kl_name in record for record in records):
        parts += ["<h2>Reward against KL</h2>", _frontier(records, sheet)]
    if any(f"time/{name}" in record for record in records for name in TIMES):
        parts += ["<h2>Where the time went</h2>", _times(records)]
    parts += [
        "<h2>Responses over time</h2>",
        _completions(_thinned(run.read(run.completions), sheet.pairs), sheet.step),
        table("Settings", flat(config.model_dump(mode="json"))),
    ]
    replace_text(run.report, page(sheet.title, parts))


def _alarms(events: Sequence[Record]) -> str:
    rows = [
        f'<p class="warn">step {event["step"]}: {html.escape(event["message"])}</p>'
        for event in events
        if event["level"] == "warn"
    ]
    return "<h2>Warnings</h2>" + ("".join(rows) or "<p>None.</p>")


def _curve(records: Sequence[Record], curve: Curve, step: str) -> str:
    drawn = [
        ([(r["step"], r[name]) for r in records if _is_number(r.get(name))], label)
        for name, label in curve.series
    ]
    series = [(points, label, "o-" if len(points) < FEW else "-") for points, label in drawn]
    return draw(series, step, curve.label)


def _is_in(records: Sequence[Record], curve: Curve) -> bool:
    return any(name in record for record in records for name, _ in curve.series)


def _frontier(records: Sequence[Record], sheet: Sheet) -> str:
    known = [record for record in records if sheet.kl_name in record]
    drawn = [
        ([(sheet.kl(r), r[name]) for r in known if _is_number(r.get(name))], label, style)
        for (label, name), style in zip(sheet.frontier, (".", "x"), strict=False)
    ]
    return draw(drawn, "KL of a response (nats)", "mean score")


def _times(records: Sequence[Record]) -> str:
    sums = {n: sum(r.get(f"time/{n}", 0.0) for r in records) for n in TIMES}
    total = sum(sums.values()) or 1.0
    rows = {name: f"{value:.1f} s ({value / total:.0%})" for name, value in sums.items()}
    return table("", rows)


def _thinned(rows: Sequence[Record], pairs: bool) -> Sequence[Record]:
    return rows[:SHOWN] if pairs else rows[:: max(1, len(rows) // SHOWN)]


def _completions(rows: Sequence[Record], step_name: str) -> str:
    body = "".join(
        f"<tr><td>{row['step']}</td><td>{html.escape(row['kind'])}</td>"
        f"<td><pre>{html.escape(row['prompt'])}</pre></td>"
        f"<td><pre>{html.escape(row['response'])}</pre></td><td>{_score(row['score'])}</td>"
        f"<td>{_score(row['kl']) if 'kl' in row else ''}</td></tr>"
        for row in rows
    )
    names = (step_name, "kind", "prompt", "response", "score", "KL")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{body}</table>"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value

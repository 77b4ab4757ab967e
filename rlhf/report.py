"""A PPO run on one page: curves, the frontier of reward against KL, responses over time, alarms.

The page holds all it shows; it reads no network and runs no script. Model text is only ever text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from train.config import RunConfig
from train.pages import draw, flat, page, table
from train.run import RunFolder, replace_text

CURVES = (
    ("objective/scores", "score"),
    ("objective/kl", "KL of a response (nats)"),
    ("response/length_mean", "tokens of a response"),
    ("objective/entropy", "entropy of a response (nats)"),
    ("score/eos_rate", "share that ends by itself"),
    ("val/explained_var", "explained variance of the value"),
    ("policy/clipfrac_avg", "share of clipped tokens"),
    ("objective/kl_coef", "KL coefficient"),
)
SHOWN = 60  # rows of the table of completions


def write_report(run: RunFolder, config: RunConfig, outcome: Mapping[str, Any]) -> None:
    """Write `report.html` into a run's folder."""
    records, events = run.read(run.metrics), run.read(run.events)
    parts = [
        table("Outcome", flat(outcome)),
        _alarms(events),
        "<h2>Curves</h2>",
        *(_curve(records, name, label) for name, label in CURVES),
        "<h2>Reward against KL</h2>",
        _frontier(records),
        "<h2>Where the time went</h2>",
        _times(records),
        "<h2>Responses over time</h2>",
        _completions(run.read(run.completions)),
        table("Settings", flat(config.model_dump(mode="json"))),
    ]
    replace_text(run.report, page("PPO run", parts))


def _alarms(events: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f'<p class="warn">step {event["step"]}: {html.escape(event["message"])}</p>'
        for event in events
        if event["level"] == "warn"
    ]
    return "<h2>Warnings</h2>" + ("".join(rows) or "<p>None.</p>")


def _curve(records: Sequence[Mapping[str, Any]], name: str, label: str) -> str:
    points = [(r["step"], r[name]) for r in records if _is_number(r.get(name))]
    extra = []
    if name == "objective/scores":
        extra = [(r["step"], r["eval/reward"]) for r in records if _is_number(r.get("eval/reward"))]
    return draw([(points, "rollouts", "-"), (extra, "evaluation", "o-")], "update", label)


def _frontier(records: Sequence[Mapping[str, Any]]) -> str:
    points = [(r["objective/kl"], r["objective/raw_scores"]) for r in records]
    name = "objective/gold_score"
    gold = [(r["objective/kl"], r[name]) for r in records if _is_number(r.get(name))]
    return draw(
        [(points, "reward", "."), (gold, "gold", "x")], "KL of a response (nats)", "mean score"
    )


def _times(records: Sequence[Mapping[str, Any]]) -> str:
    names = ("rollout", "score", "train")
    sums = {n: sum(r.get(f"time/{n}", 0.0) for r in records) for n in names}
    total = sum(sums.values()) or 1.0
    rows = {name: f"{value:.1f} s ({value / total:.0%})" for name, value in sums.items()}
    return table("", rows)


def _completions(rows: Sequence[Mapping[str, Any]]) -> str:
    step = max(1, len(rows) // SHOWN)
    body = "".join(
        f"<tr><td>{row['step']}</td><td>{html.escape(row['kind'])}</td>"
        f"<td><pre>{html.escape(row['prompt'])}</pre></td>"
        f"<td><pre>{html.escape(row['response'])}</pre></td><td>{_score(row['score'])}</td>"
        f"<td>{_score(row['kl']) if 'kl' in row else ''}</td></tr>"
        for row in rows[::step]
    )
    names = ("update", "kind", "prompt", "response", "score", "KL")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{body}</table>"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value

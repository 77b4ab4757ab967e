"""A supervised run on one page: curves, data, examples won and lost, resources, lineage.

The page holds all it shows; it reads no network and runs no script. Rows of the data are only ever
text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.render import IGNORED, Example
from train.batches import Rendered
from train.pages import draw, flat, page, table
from train.prepare import TrainingJob
from train.regression import Regression
from train.run import RunFolder, replace_text

CURVES = (
    (("train_loss", "valid_loss"), "loss (nats a token)"),
    (("train_mean_token_accuracy", "valid_mean_token_accuracy"), "share of tokens right"),
    (("lr",), "learning rate"),
    (("grad_norm",), "length of the gradient"),
    (("tokens_per_s",), "real tokens a second"),
)
SHOWN = 10  # examples of a table
LONGEST_TEXT = 600  # characters of an example


def write_report(
    run: RunFolder, job: TrainingJob, outcome: Mapping[str, Any], regression: Regression | None
) -> None:
    """Write `report.html` into a run's folder."""
    records = run.read(run.metrics)
    resolved = json.loads(run.resolved.read_text("utf-8")) if run.resolved.exists() else {}
    parts = [
        table("Outcome", _outcome(outcome)),
        _warnings(job, run.read(run.events)),
        "<h2>Curves</h2>",
        *(_curve(records, names, label) for names, label in CURVES),
        table("Training data", _facts(job.train)),
        *([table("Validation data", _facts(job.valid))] if job.valid else []),
        _lengths(job),
        *(_won_and_lost(job, regression) if regression else []),
        *_suspicious(run, job),
        table("Resources", _resources(job, outcome)),
        table("Settings", flat({**job.config.model_dump(mode="json"), "by auto": _plan(job)})),
        table("Lineage", _lineage(job, resolved)),
    ]
    replace_text(run.report, page("Supervised fine-tuning", parts))


def _outcome(outcome: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in outcome.items() if value is not None}
    return {name: _short(value) for name, value in flat(known).items()}


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _warnings(job: TrainingJob, events: Sequence[Mapping[str, Any]]) -> str:
    told = [event["message"] for event in events if event["level"] == "warn"]
    messages = list(dict.fromkeys([*job.warnings, *told]))
    rows = [f'<p class="warn">{html.escape(message)}</p>' for message in messages]
    return "<h2>Warnings</h2>" + ("".join(rows) or "<p>None.</p>")


def _curve(records: Sequence[Mapping[str, Any]], names: Sequence[str], label: str) -> str:
    series = []
    for name in names:
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        kind = "validation" if name.startswith("valid") else "training"
        series.append((points, kind, "o-" if kind == "validation" else "-"))
    return draw(series, "step", label) if any(points for points, _, _ in series) else ""


def _facts(rendered: Rendered) -> dict[str, Any]:
    learned = rendered.examples.num_learned
    lengths = np.sort(rendered.examples.lengths)
    return {
        "file": rendered.path.name,
        "kind": rendered.kind,
        "rows": len(lengths),
        "tokens": rendered.num_tokens,
        "tokens that are learned": f"{learned} ({learned / rendered.num_tokens:.0%})",
        "tokens of a row": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}",
        "rows that repeat another": rendered.examples.num_repeated,
        "rows over the length limit": len(rendered.long),
        "SHA-256": rendered.digest,
    }


def _lengths(job: TrainingJob) -> str:
    lengths = job.train.examples.lengths
    width = max(1, (int(lengths.max()) + 29) // 30)
    counts = np.bincount(lengths // width).tolist()
    points = [(bin_ * width, float(count)) for bin_, count in enumerate(counts)]
    return draw([(points, "rows", "-")], "tokens of a row", "training rows")


def _won_and_lost(job: TrainingJob, regression: Regression) -> list[str]:
    rendered = job.valid
    if rendered is None:
        return []
    gains = [a - b for a, b in zip(regression.before, regression.after, strict=True)]
    order = sorted(range(len(gains)), key=gains.__getitem__)
    won = [index for index in reversed(order) if gains[index] > 0][:SHOWN]
    lost = [index for index in order if gains[index] < 0][:SHOWN]
    against = html.escape(regression.against)
    parts = [f"<h2>Validation rows against {against}</h2>"]
    for title, chosen in (("Won most", won), ("Lost most", lost)):
        numbers = [(regression.before[i], regression.after[i]) for i in chosen]
        rows = [regression.rows[i] for i in chosen]
        parts.append(f"<h3>{title}</h3>" + _examples(job, rendered, rows, numbers))
    return parts


def _suspicious(run: RunFolder, job: TrainingJob) -> list[str]:
    """Show the training rows that the finished model still finds least likely."""
    scored = run.read(run.losses)
    if not scored:
        return []
    order = sorted(range(len(scored)), key=lambda index: -scored[index]["loss"])[:SHOWN]
    numbers = [(scored[index]["loss"],) for index in order]
    return [
        "<h2>Training rows to look at</h2><p>The finished model finds these least likely: a wrong "
        "label, a broken text, or a rare case.</p>",
        _examples(job, job.train, order, numbers),
    ]


def _examples(
    job: TrainingJob,
    rendered: Rendered,
    chosen: Sequence[int],
    numbers: Sequence[tuple[float, ...]],
) -> str:
    if not chosen:
        return "<p>None.</p>"
    heads = ["loss"] if len(numbers[0]) == 1 else ["loss before", "loss after"]
    head = "".join(f"<th>{name}</th>" for name in ("line", *heads, "context", "learned"))
    body = []
    for index, losses in zip(chosen, numbers, strict=True):
        cells = [str(rendered.lines[index]), *(f"{loss:.3f}" for loss in losses)]
        context, learned = _texts(job, rendered.examples[index])
        cells += [f"<pre>{html.escape(text)}</pre>" for text in (context, learned)]
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _texts(job: TrainingJob, example: Example) -> tuple[str, str]:
    """Return what a row gives and what it teaches, shortened."""
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    texts = []
    for wanted in (False, True):
        ids = [token for token, label in pairs if (label != IGNORED) == wanted]
        text = str(job.base.tokenizer.decode(ids))
        texts.append(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…")
    return texts[0], texts[1]


def _resources(job: TrainingJob, outcome: Mapping[str, Any]) -> dict[str, Any]:
    device = job.base.model.device
    rows = {
        "device": f"{device}, {job.base.model.dtype}".replace("torch.", ""),
        "processes": job.num_processes,
        "seconds of training": outcome["training_s"],
        "peak memory": f"{outcome['peak_memory_bytes'] / 1e9:.2f} GB",
    }
    return rows


def _plan(job: TrainingJob) -> dict[str, Any]:
    return job.plan.model_dump()


def _lineage(job: TrainingJob, resolved: Mapping[str, Any]) -> dict[str, Any]:
    start = job.config.start_adapter
    return {
        "base": f"{job.base.name} ({job.base.fingerprint})",
        "start adapter": start.name if start else "none: a fresh one",
        "hone": resolved.get("git_commit") or "unknown",
        **{f"version of {name}": text for name, text in resolved.get("versions", {}).items()},
    }

"""Judgements as rows to train on: preferences, judged answers, corrections, or all that is known.

`preference`: TRL's prompt, chosen, rejected, with `label_prob` where labelers differ or tie and
`margin` from strengths. A ranking gives its strictly ordered pairs as one row of `completions` and
`ranks`. `unpaired`: TRL's prompt, completion, label, of thumbs, ratings and the answers that won or
lost. `sft`: prompt and completion, of edits and corrections. `raw`: every judgement.

What a reviewer settled stands in place of the votes; gold and training tasks are never exported but
in `raw`. A frozen export is a file of the account that says where it came from.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import audit
from data.db import Database
from data.errors import InvalidInput
from data.feedback import projects
from data.feedback.rankings import comparisons
from data.feedback.tasks import candidates_of
from data.files import FileStore
from data.tables import File
from data.tables_feedback import Candidate, Judgement, LabelProject, LabelTask

Export = Literal["preference", "unpaired", "sft", "raw"]
EXPORTS: tuple[Export, ...] = get_args(Export)
VOTES = ("majority", "each")
FITTING = {
    "preference": ("pairwise", "ranking", "edit"),
    "unpaired": ("pairwise", "likert", "thumbs"),
    "sft": ("edit",),
    "raw": ("pairwise", "ranking", "likert", "thumbs", "edit"),
}
MARGIN = {1: 0.0, 2: 0.33, 3: 0.67, 4: 1.0}  # of a strength, as TRL's `margin`
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Exported:
    """Rows, and how much was left out: ties, both bad, tasks without a judgement."""

    rows: Rows
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Judged:
    task: LabelTask
    candidates: list[Candidate]
    votes: list[Judgement]
    answers: list[dict[str, Any]]  # of the votes, or the one that a reviewer settled on
    labelers: list[str | None]  # whose answers they are; None: the reviewer's


def rows(
    database: Database,
    project_id: str,
    label_project_id: str,
    kind: str,
    votes: str = "majority",
) -> Exported:
    """Return a project's judgements as rows.

    Args:
        kind: Of `EXPORTS`.
        votes: Of several labelers' answers to one task: "majority" makes one row with the share of
            the votes as `label_prob`, "each" a row a vote.

    Raises:
        NotFound: No such project.
        InvalidInput: The project's tasks are not of a kind that makes such rows.
    """
    with database.read() as session:
        project = projects.find(session, project_id, label_project_id)
        _check(project, kind, votes)
        judged = list(_judged(session, project))
    left: Counter[str] = Counter()
    made: Rows = []
    for entry in judged:
        if kind == "raw":
            made += _raw(entry)
        elif entry.task.gold is None:
            if not entry.answers:
                left["without a judgement"] += 1
                continue
            maker = {"preference": _preferences, "unpaired": _unpaired, "sft": _edits}[kind]
            made += maker(project, entry, votes, left)
    return Exported(made, dict(left))


def freeze(
    database: Database,
    files: FileStore,
    project_id: str,
    label_project_id: str,
    kind: str,
    votes: str = "majority",
) -> File:
    """Write an export as a file of the account; its name tells the project and the kind.

    Raises:
        InvalidInput: There is nothing to export.
    """
    exported = rows(database, project_id, label_project_id, kind, votes)
    if not exported.rows:
        told = ", ".join(f"{count} {what}" for what, count in exported.left_out.items())
        raise InvalidInput(
            f"{label_project_id} has no judgements to export as {kind}"
            + (f" (left out: {told})." if told else "."),
            param="label_project_id",
        )
    purpose = "feedback" if kind == "raw" else "fine-tune"
    name = f"{label_project_id}-{kind}.jsonl"
    record = files.create(project_id, lines(exported.rows), name, purpose)
    with database.write() as session:
        audit.record(
            session,
            "label_project.exported",
            label_project_id,
            project_id,
            file_id=record.id,
            kind=kind,
            votes=votes,
            rows=len(exported.rows),
            left_out=exported.left_out,
        )
    return record


def lines(made: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Yield rows as lines of JSON."""
    for row in made:
        yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _check(project: LabelProject, kind: str, votes: str) -> None:
    if kind not in EXPORTS:
        raise InvalidInput(
            f"Invalid 'kind': '{kind}'. Supported values are: {', '.join(map(repr, EXPORTS))}.",
            param="kind",
        )
    if votes not in VOTES:
        raise InvalidInput(f"Invalid 'votes': '{votes}'; give majority or each.", param="votes")
    if project.kind not in FITTING[kind]:
        fitting = [name for name, kinds in FITTING.items() if project.kind in kinds]
        raise InvalidInput(
            f"A {project.kind} project makes no {kind} rows; export {' or '.join(fitting)}.",
            param="kind",
        )


def _judged(session: Session, project: LabelProject) -> Iterator[_Judged]:
    query = select(LabelTask).where(
        LabelTask.label_project_id == project.id, LabelTask.status != "dropped"
    )
    tasks = list(session.scalars(query.order_by(LabelTask.number)))
    candidates = candidates_of(session, [task.id for task in tasks])
    votes: dict[str, list[Judgement]] = defaultdict(list)
    found = select(Judgement).where(Judgement.label_project_id == project.id)
    for judgement in session.scalars(found.order_by(Judgement.created_at, Judgement.id)):
        votes[judgement.task_id].append(judgement)
    for task in tasks:
        counted = [v for v in votes[task.id] if v.counts and v.kind == "answer"]
        answers = [judgement.answer for judgement in counted]
        labelers: list[str | None] = [judgement.labeler for judgement in counted]
        if task.settled is not None:
            answers, labelers = [task.settled["answer"]], [None]
        yield _Judged(task, candidates[task.id], votes[task.id], answers, labelers)


def _preferences(project: LabelProject, entry: _Judged, votes: str, left: Counter[str]) -> Rows:
    signed = _signed(entry, votes)
    if project.kind == "edit":
        original = entry.candidates[0].text
        changed = [(a["text"], whose) for a, whose in signed if a["text"] != original]
        return [_pair(entry, text, original) | whose for text, whose in changed]
    if project.kind == "ranking":
        return [row | whose for answer, whose in signed if (row := _ranking(entry, answer, left))]
    judged = [(answer, whose) for answer, whose in signed if answer["choice"] != "both_bad"]
    choices = [answer for answer, _ in judged]
    left["both bad"] += len(entry.answers) - len(choices)
    if votes == "each":
        made = []
        for answer, whose in judged:
            if answer["choice"] == "tie":
                made.append(_pair(entry, *_texts(entry, 0)) | {"label_prob": 0.5} | whose)
            else:
                pair = _pair(entry, *_texts(entry, answer["choice"]))
                made.append(pair | _margin([answer]) | whose)
        return made
    if not choices:
        return []
    wins = sum(w for a in choices for _, _, w in comparisons("pairwise", a)) / len(choices)
    best = 0 if wins >= 0.5 else 1
    share = max(wins, 1 - wins)
    if len(choices) == 1 and share == 0.5:
        left["tie"] += 1
        return []
    agreed = [answer for answer in choices if answer["choice"] == best]
    prob = {} if share == 1 else {"label_prob": round(share, 4)}
    return [_pair(entry, *_texts(entry, best)) | prob | _margin(agreed)]


def _signed(entry: _Judged, votes: str) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return answers with what a row says of whose they are, where each vote is a row."""
    return [
        (answer, {"labeler": labeler} if votes == "each" and labeler is not None else {})
        for answer, labeler in zip(entry.answers, entry.labelers, strict=True)
    ]


def _ranking(entry: _Judged, answer: dict[str, Any], left: Counter[str]) -> dict[str, Any] | None:
    if len(set(answer["ranks"])) == 1:
        left["tie"] += 1
        return None
    return {
        "prompt": entry.task.prompt,
        "completions": [_as_answer(entry, candidate.text) for candidate in entry.candidates],
        "ranks": answer["ranks"],
    }


def _margin(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    known = [MARGIN[answer["strength"]] for answer in answers if "strength" in answer]
    return {"margin": round(sum(known) / len(known), 4)} if known else {}


def _texts(entry: _Judged, best: int) -> tuple[str, str]:
    return entry.candidates[best].text, entry.candidates[1 - best].text


def _pair(entry: _Judged, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": entry.task.prompt,
        "chosen": _as_answer(entry, chosen),
        "rejected": _as_answer(entry, rejected),
    }


def _as_answer(entry: _Judged, text: str) -> Any:
    """Return an answer in the form of its prompt: text, or one message."""
    if isinstance(entry.task.prompt, str):
        return text
    return [{"role": "assistant", "content": text}]


def _unpaired(project: LabelProject, entry: _Judged, votes: str, left: Counter[str]) -> Rows:
    judged: list[tuple[str, bool | int, dict[str, str]]] = []
    for answer, whose in _signed(entry, votes):
        if project.kind == "thumbs":
            judged.append((entry.candidates[0].text, answer["thumb"], whose))
        elif project.kind == "likert":
            first = project.label["axes"][0]
            top = project.label["scale"]
            rating = 1 + round((answer["axes"][first] - 1) * 4 / (top - 1))
            judged.append((entry.candidates[0].text, rating, whose))
        elif answer["choice"] == "both_bad":
            judged += [(candidate.text, False, whose) for candidate in entry.candidates]
        elif answer["choice"] == "tie":
            left["tie"] += 1
        else:
            better, worse = _texts(entry, answer["choice"])
            judged += [(better, True, whose), (worse, False, whose)]
    if votes == "majority":
        judged = [(text, label, {}) for text, label in _by_majority(judged)]
    return [
        {
            "prompt": entry.task.prompt,
            "completion": _as_answer(entry, text),
            "label": label,
            **whose,
        }
        for text, label, whose in judged
    ]


def _by_majority(
    judged: Sequence[tuple[str, bool | int, dict[str, str]]],
) -> Iterator[tuple[str, bool | int]]:
    by_text: dict[str, list[bool | int]] = defaultdict(list)
    for text, label, _ in judged:
        by_text[text].append(label)
    for text, labels in by_text.items():
        if all(isinstance(label, bool) for label in labels):
            good = sum(labels)
            if 2 * good != len(labels):
                yield text, 2 * good > len(labels)
        else:
            yield text, round(sum(labels) / len(labels))


def _edits(project: LabelProject, entry: _Judged, votes: str, left: Counter[str]) -> Rows:
    return [
        {"prompt": entry.task.prompt, "completion": _as_answer(entry, answer["text"])}
        for answer in entry.answers
    ]


def _raw(entry: _Judged) -> Rows:
    candidates = [
        {"id": c.id, "text": c.text, "model": c.model, "origin": c.origin} for c in entry.candidates
    ]
    return [
        {
            "id": judgement.id,
            "task_id": entry.task.id,
            "prompt": entry.task.prompt,
            "candidates": candidates,
            "labeler": judgement.labeler,
            "kind": judgement.kind,
            "answer": judgement.answer,
            "shown_first": judgement.shown_first,
            "timings": judgement.timings,
            "guidelines_version": judgement.guidelines_version,
            "counts": judgement.counts,
            "superseded_by": judgement.superseded_by,
            "gold": entry.task.gold,
            "settled": entry.task.settled,
            "created_at": judgement.created_at,
        }
        for judgement in entry.votes
    ]

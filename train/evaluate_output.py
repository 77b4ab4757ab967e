"""What `train.evaluate` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from data.errors import InvalidInput

if TYPE_CHECKING:
    from train.evaluate import Asked


def make_room(path: Path) -> None:
    """Make sure that answers can be written, before hours of asking; their folder is created.

    Raises:
        InvalidInput: They cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InvalidInput(
            f"--answers {path} cannot be written ({error.strerror}); give another path"
        ) from error


def write_answers(path: Path, asked: Asked, against: Asked | None, names: Sequence[str]) -> None:
    """Write one line a question: line, right answers, what was said, and the scores by `names`."""
    with path.open("w", encoding="utf-8") as stream:
        for index, question in enumerate(asked.questions):
            record: dict[str, Any] = {
                "line": question.line,
                "answers": question.answers,
                "said": question.said,
                "scores": {name: asked.scores[name][index] for name in names},
            }
            if against is not None:
                record["against_said"] = against.questions[index].said
                record["against_scores"] = {n: against.scores[n][index] for n in names}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def show(result: dict[str, Any]) -> None:
    """Print a result as tables and lines."""
    console = Console()
    table = result.pop("by_answer", [])
    if table:
        shown = Table("right answer", "right", "asked", title="By right answer, worst first")
        for answer, right, count in table:
            shown.add_row(answer, str(right), str(count))
        console.print(shown)
    classes = result.pop("classes", {})
    if classes:
        shown = Table("class", "precision", "recall", "f1", "asked", title="By class")
        for label, found in classes.items():
            numbers = [f"{found[name]:.3f}" for name in ("precision", "recall", "f1")]
            shown.add_row(label, *numbers, f"{found['support']:.0f}")
        console.print(shown)
    against = result.pop("against", None)
    for name, value in result.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"{name:14} {text}", highlight=False, markup=False)
    if against is None:
        return
    for name, found in against["differences"].items():
        low, high = found["interval"]
        console.print(
            f"{name} against {against['adapter']} ({against[name]:.4f}): {found['of']} by question "
            f"{found['mean']:+.4f} ({low:+.4f} to {high:+.4f}), p = {found['p_value']:.4f}: "
            f"{found['better']} better, {found['worse']} worse, {found['same']} the same, win rate "
            f"{found['win_rate']:.1%}",
            highlight=False,
            markup=False,
        )

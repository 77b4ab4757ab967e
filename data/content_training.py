"""Training files under a content policy: which rows break it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.content import Policy, judge
from data.jsonl import read_numbered_rows
from data.moderation.classifier import Classifier
from data.rows import Content, Format, Row

MAX_LINES = 100


@dataclass
class Screened:
    """What was found in a file.

    Attributes:
        rows: How many were judged.
        lines: Of the rows that break the policy, in order.
        matched: How many rows each rule or category matched.
    """

    rows: int = 0
    lines: list[int] = field(default_factory=list)
    matched: Counter[str] = field(default_factory=Counter)

    def message(self, name: str) -> str:
        """Return what the job's events say."""
        shown = ", ".join(map(str, self.lines[:20])) + (", ..." if len(self.lines) > 20 else "")
        by_rule = ", ".join(f"{rule} {count}" for rule, count in self.matched.most_common())
        return (
            f"{len(self.lines)} of {self.rows} rows of {name} break the account's content policy "
            f"({by_rule}): lines {shown}"
        )

    def data(self) -> dict[str, object]:
        """Return the same for programs."""
        return {
            "content_policy": {
                "rows": self.rows,
                "count": len(self.lines),
                "matched": dict(self.matched),
                "lines": self.lines[:MAX_LINES],
            }
        }


def screen(path: Path, kind: Format | None, policy: Policy, classifier: Classifier) -> Screened:
    """Judge every row of a file that was validated."""
    found = Screened()
    for line, row in read_numbered_rows(path, kind):
        found.rows += 1
        verdicts = [judge(text, policy, classifier) for text in texts_of(row) if text.strip()]
        matched = {name for verdict in verdicts for name in verdict.matched}
        if matched:
            found.lines.append(line)
            found.matched.update(matched)
    return found


def texts_of(row: Row) -> Iterator[str]:
    """Yield what people or models wrote in a row."""
    for name in ("prompt", "completion", "messages", "chosen", "rejected", "text"):
        content: Content | None = getattr(row, name, None)
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (message.content for message in content if message.content)

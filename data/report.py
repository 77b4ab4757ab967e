"""What validation found, and how it is told: to a person, as JSON, and as an upload error.

Problems stop a file from being used; warnings do not. Each is kept in full up to `KEEP` and counted
by code without limit, so a report of a file with a million bad lines stays small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from data.rows import Format

KEEP = 100
SYNTAX_CODES = frozenset({"invalid_json", "not_an_object", "invalid_utf8", "line_too_long"})
_EXPECTED = "Expected file to have JSONL format, where every line is a JSON dictionary."


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. Line and column count from 1, in characters; None means the file as a whole."""

    line: int | None
    column: int | None
    code: str
    message: str
    fix: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "line": self.line,
            "column": self.column,
            "code": self.code,
            "message": self.message,
            "fix": self.fix,
        }

    def render(self, name: str) -> str:
        where = name if self.line is None else f"{name}:{self.line}:{self.column}"
        return f"{where}: {self.code}: {self.message}"


@dataclass(slots=True)
class Tally:
    """The first problems in full, and the number of all by code."""

    first: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, code: str, make: Callable[[], Problem]) -> None:
        """Count one; `make` is called only while there is room, as columns cost time to find."""
        self.counts[code] += 1
        if len(self.first) < KEEP:
            self.first.append(make())

    def extend(self, code: str, problems: Iterable[Problem], total: int) -> None:
        """Count `total` of one code, of which `problems` are the first."""
        if total:
            self.counts[code] += total
            self.first.extend(list(problems)[: KEEP - len(self.first)])


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of validating one file."""

    name: str
    format: Format | None
    num_lines: int
    num_blank: int
    num_examples: int
    num_bad_lines: int
    bytes: int
    sha256: str
    errors: Tally
    cautions: Tally

    @property
    def ok(self) -> bool:
        return not self.errors.counts

    @property
    def problems(self) -> list[Problem]:
        """The first problems, in the order of the file."""
        return self.errors.first

    @property
    def counts(self) -> dict[str, int]:
        """The number of all problems, by code."""
        return dict(self.errors.counts)

    @property
    def warnings(self) -> list[Problem]:
        return self.cautions.first

    @property
    def warning_counts(self) -> dict[str, int]:
        return dict(self.cautions.counts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "name": self.name,
            "ok": self.ok,
            "format": None if self.format is None else self.format.value,
            "num_lines": self.num_lines,
            "num_blank": self.num_blank,
            "num_examples": self.num_examples,
            "num_bad_lines": self.num_bad_lines,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "problems": [problem.to_dict() for problem in self.problems],
            "counts": self.counts,
            "warnings": [warning.to_dict() for warning in self.warnings],
            "warning_counts": self.warning_counts,
        }

    def summary(self, max_lines: int = 20) -> str:
        """The report for a person: one line a finding, each fix under the first that it mends."""
        told = [
            *_render(self.name, self.errors, ""),
            *_render(self.name, self.cautions, "warning: "),
        ]
        shown = told[:max_lines]
        hidden = self.errors.total + self.cautions.total - len(shown)
        lines = []
        explained: set[str] = set()
        for problem, text in shown:
            lines.append(text)
            if problem.fix not in explained:
                explained.add(problem.fix)
                lines.append(f"    fix: {problem.fix}")
        if hidden > 0:
            lines.append(f"... and {hidden} more ({_by_code(self.errors, self.cautions)})")
        lines.append(self._verdict())
        return "\n".join(lines)

    def _verdict(self) -> str:
        kind = f"{self.format} " if self.format else ""
        found = (
            f"{self.num_examples} good {kind}examples in {self.num_lines} lines, "
            f"{self.num_bad_lines} bad lines, {self.cautions.total} warnings"
        )
        return f"{self.name}: {'ok' if self.ok else 'not usable'}: {found}"


def _render(name: str, tally: Tally, prefix: str) -> list[tuple[Problem, str]]:
    return [(problem, prefix + problem.render(name)) for problem in tally.first]


def _by_code(*tallies: Tally) -> str:
    return ", ".join(f"{code}: {n}" for tally in tallies for code, n in tally.counts.items())


def upload_error_message(report: Report) -> str | None:
    """The message of a refused upload, or None when every line is a JSON object.

    Only what is wrong with the lines as JSON counts here; what the rows say is checked by the job.
    """
    if report.counts.get("empty_file"):
        return f"{_EXPECTED} The file has no lines but blank ones."
    broken = [problem for problem in report.problems if problem.code in SYNTAX_CODES]
    if not broken:
        return None
    total = sum(report.counts.get(code, 0) for code in SYNTAX_CODES)
    lines = ", ".join(str(problem.line) for problem in broken[:20])
    more = ", ..." if total > 20 else ""
    first = broken[0]
    return (
        f"{_EXPECTED} Line {lines}{more} ({total} of {report.num_lines}) "
        f"{'is' if total == 1 else 'are'} not. "
        f"Line {first.line}, column {first.column}: {first.message}. {first.fix}"
    )

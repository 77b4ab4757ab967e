"""Content policies: what is done about an account's texts, and the rules that judge them.

A policy has a mode for each side (what goes in, what comes out, what is trained on): `off`, `score`
(judged and noted) or `block`. Its rules are words, regular expressions, and thresholds of the
moderation classifier; a category without a threshold of its own has the classifier's.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import regex

from data import audit
from data.db import Database
from data.errors import InvalidInput, NotFound
from data.moderation.classifier import CATEGORIES, Classifier
from data.tables import Project, now
from data.tables_content import ContentPolicy

Mode = Literal["off", "score", "block"]
Side = Literal["input", "output", "training"]
MODES: tuple[Mode, ...] = ("off", "score", "block")  # each tighter than the one before
SIDES: tuple[Side, ...] = ("input", "output", "training")
MAX_RULES = 100
MAX_VALUE = 512
REGEX_LIMIT_S = 0.05  # a text takes a regular expression at most this long


@dataclass(frozen=True, slots=True)
class Rule:
    """What a text must not hold.

    Attributes:
        type: word, regex or classifier.
        value: The word or phrase, the expression, or the classifier's category.
        threshold: Of a category: the score from which it counts.
        name: What messages and events call it.
    """

    type: Literal["word", "regex", "classifier"]
    value: str
    threshold: float | None = None
    name: str = ""

    @property
    def shown(self) -> str:
        """Return what messages call it."""
        return self.name or self.value

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as the API shows it."""
        key = "category" if self.type == "classifier" else "value"
        shown: dict[str, Any] = {"type": self.type, key: self.value, "name": self.name or None}
        return shown | ({"threshold": self.threshold} if self.type == "classifier" else {})


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about the texts of one account."""

    input: Mode = "off"
    output: Mode = "off"
    training: Mode = "off"
    rules: tuple[Rule, ...] = ()
    case_after: int | None = None
    block_user_after: int | None = None

    def mode(self, side: Side) -> Mode:
        """Return the mode of a side."""
        found: Mode = getattr(self, side)
        return found

    def tightened(self, **modes: Mode | None) -> Policy:
        """Return the policy with modes that are at least these."""
        kept: dict[str, Any] = {
            side: max(self.mode(side), mode, key=MODES.index)  # type: ignore[arg-type]
            for side, mode in modes.items()
            if mode is not None
        }
        return replace(self, **kept)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a text: the categories' scores, those flagged, and all that matched."""

    scores: Mapping[str, float]
    flagged: tuple[str, ...]
    matched: tuple[str, ...]


def judge(text: str, policy: Policy, classifier: Classifier) -> Verdict:
    """Judge a text by a policy's rules and the classifier."""
    scores = classifier.judge(text)
    own = {rule.value: rule for rule in policy.rules if rule.type == "classifier"}
    official = [name for name in classifier.categories if name in CATEGORIES]
    flagged = [
        name
        for name in {**dict.fromkeys(official), **dict.fromkeys(own)}
        if name in scores and scores[name] >= _threshold(name, own, classifier)
    ]
    matched = [own[name].shown if name in own else name for name in flagged]
    folded = _fold(text)
    matched += [rule.shown for rule in policy.rules if _matches(rule, text, folded)]
    return Verdict(scores, tuple(flagged), tuple(matched))


def read_rules(values: Sequence[Mapping[str, Any]], classifier: Classifier) -> tuple[Rule, ...]:
    """Read rules as the API takes them.

    Raises:
        InvalidInput: A rule is of no known kind, empty, too long, or cannot be compiled.
    """
    if len(values) > MAX_RULES:
        raise InvalidInput(
            f"Invalid 'rules': expected at most {MAX_RULES}, but got {len(values)}.", param="rules"
        )
    return tuple(_read(value, f"rules[{i}]", classifier) for i, value in enumerate(values))


def get(database: Database, project_id: str) -> Policy:
    """Return an account's policy, or the one that does nothing; raises NotFound."""
    with database.read() as session:
        if session.get(Project, project_id) is None:
            raise NotFound(f"No such project: {project_id}", param="project_id")
        row = session.get(ContentPolicy, project_id)
    return Policy() if row is None else _of(row)


def all_policies(database: Database) -> dict[str, Policy]:
    """Return every account's own policy, by account."""
    with database.read() as session:
        return {row.project_id: _of(row) for row in session.query(ContentPolicy)}


def replace_policy(database: Database, project_id: str, policy: Policy) -> None:
    """Give an account a policy; it holds within a second. Raises NotFound."""
    with database.write() as session:
        if session.get(Project, project_id) is None:
            raise NotFound(f"No such project: {project_id}", param="project_id")
        values: dict[str, Any] = {side: policy.mode(side) for side in SIDES}
        values |= {"case_after": policy.case_after, "block_user_after": policy.block_user_after}
        rules = [rule.to_dict() for rule in policy.rules]
        session.merge(ContentPolicy(project_id=project_id, rules=rules, updated_at=now(), **values))
        audit.record(
            session, "content_policy.updated", project_id, project_id, rules=len(rules), **values
        )


def _of(row: ContentPolicy) -> Policy:
    rules = tuple(
        Rule(
            rule["type"],
            rule.get("category") or rule["value"],
            rule.get("threshold"),
            rule.get("name") or "",
        )
        for rule in row.rules
    )
    modes: dict[str, Any] = {side: getattr(row, side) for side in SIDES}
    return Policy(
        **modes, rules=rules, case_after=row.case_after, block_user_after=row.block_user_after
    )


def _threshold(name: str, own: Mapping[str, Rule], classifier: Classifier) -> float:
    threshold = own[name].threshold if name in own else None
    return classifier.threshold(name) if threshold is None else threshold


def _matches(rule: Rule, text: str, folded: str) -> bool:
    """Tell whether a rule matches; an expression that takes too long counts as a match."""
    if rule.type == "classifier":
        return False
    try:
        if rule.type == "word":
            word = regex.escape(_fold(rule.value))
            return bool(regex.search(rf"(?<!\w){word}(?!\w)", folded, timeout=REGEX_LIMIT_S))
        return bool(regex.search(rule.value, text, timeout=REGEX_LIMIT_S))
    except TimeoutError:
        return True


def _fold(text: str) -> str:
    """Return the text without case and compatible forms, its white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read(value: Mapping[str, Any], at: str, classifier: Classifier) -> Rule:
    kind = value.get("type")
    key = "category" if kind == "classifier" else "value"
    known = {"type", key, "name"} | ({"threshold"} if kind == "classifier" else set())
    if kind not in ("word", "regex", "classifier"):
        raise InvalidInput(
            f"Invalid '{at}.type': {kind!r}. Expected 'word', 'regex' or 'classifier'.",
            param=f"{at}.type",
        )
    wrong = sorted(set(value) - known)
    if wrong:
        raise InvalidInput(
            f"Unknown parameter: '{at}.{wrong[0]}'. A rule of the type {kind} has: "
            f"{', '.join(sorted(known))}.",
            param=f"{at}.{wrong[0]}",
            code="unknown_parameter",
        )
    text, name = value.get(key), value.get("name") or ""
    for field, given in ((key, text), ("name", name)):
        if not isinstance(given, str) or len(given) > MAX_VALUE or (field == key and not given):
            raise InvalidInput(
                f"Invalid '{at}.{field}': expected a string of 1 to {MAX_VALUE} characters.",
                param=f"{at}.{field}",
            )
    if kind == "regex":
        _check_regex(str(text), f"{at}.value")
    elif kind == "word" and not _fold(str(text)):
        raise InvalidInput(f"Invalid '{at}.value': it is blank.", param=f"{at}.value")
    elif kind == "classifier" and text not in classifier.categories:
        raise InvalidInput(
            f"Invalid '{at}.category': the classifier {classifier.name} was not trained for "
            f"'{text}', only for: {', '.join(classifier.categories)}.",
            param=f"{at}.category",
        )
    return Rule(kind, str(text), _read_threshold(value, at), name)


def _read_threshold(value: Mapping[str, Any], at: str) -> float | None:
    threshold = value.get("threshold")
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        threshold = -1
    if not 0 < threshold <= 1:
        raise InvalidInput(
            f"Invalid '{at}.threshold': expected a number above 0 and at most 1.",
            param=f"{at}.threshold",
        )
    return float(threshold)


def _check_regex(pattern: str, param: str) -> None:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise InvalidInput(
            f"Invalid '{param}': not a regular expression: {error}.", param=param
        ) from error

"""Human comparisons as a reward model learns them: the answers of a prompt, and who beat whom.

Pairs of one prompt stay together, so that an answer that is in several is read once, and no prompt
is on both sides of a split. The same two answers judged several times become one pair whose
probability is the share of judgements, which is how disagreement among labelers is told.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError, ToolkitError
from data.jsonl import read_numbered_rows
from data.render import IGNORED, render_answer
from data.rows import TAGS, Content, Format, Preference, Ranking, Row
from data.validate import validate


@dataclass(frozen=True)
class Vote:
    """One judgement of a pair: how probable it is that `better` is better, and the row's tags."""

    prob: float
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Pair:
    """Indices of two answers of a group, and the probability that `better` is the better one.

    Attributes:
        margin: By how much it should score higher at least.
        judgements: How often the two were compared.
        votes: Each of the judgements, where there are several, or a row tells whose it is, of which
            batch or how sure.
    """

    better: int
    worse: int
    prob: float
    margin: float
    line: int
    judgements: int = 1
    votes: tuple[Vote, ...] = ()


@dataclass
class Group:
    """A prompt's answers, rendered with their prompt, and the pairs among them.

    Attributes:
        prompt: Ids of the prompt.
        answers: Ids of prompt, answer, and the EOS that ends it.
        lengths: Characters of each answer.
    """

    prompt: tuple[int, ...]
    answers: list[tuple[int, ...]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))


@dataclass
class Comparisons:
    """A file's groups; `long` are lines that were longer than the limit."""

    path: Path
    groups: list[Group]
    long: list[int] = field(default_factory=list)

    @property
    def num_pairs(self) -> int:
        return sum(len(group.pairs) for group in self.groups)


def load_comparisons(path: Path, tokenizer: Any, min_examples: int) -> Comparisons:
    """Check and render a file of preferences or rankings.

    Raises:
        DataError: The file is absent or has problems, or nothing can be learned from it.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is not a file; give the path of a JSONL file of comparisons",
            code="file_not_found",
        )
    report = validate(path, min_examples=min_examples)
    if not report.ok:
        raise DataError(f"{path} cannot be used.\n{report.summary()}", code="invalid_file")
    if report.format not in (Format.PREFERENCE, Format.RANKING):
        raise DataError(
            f"{path} holds {report.format} rows; comparisons are preference rows (prompt, "
            "chosen, rejected) or rankings (prompt, completions, ranks)",
            code="wrong_format",
        )
    groups = _group(tokenizer, read_numbered_rows(path, report.format))
    found = Comparisons(path, groups)
    if all(pair.prob == 0.5 for group in groups for pair in group.pairs):
        raise DataError(
            f"{path}: every comparison is a tie, so there is nothing to prefer", code="only_ties"
        )
    return found


def limit_length(comparisons: Comparisons, max_length: int, on_long: str) -> None:
    """Cut, drop or refuse answers of more than `max_length` tokens, prompt included.

    Cutting takes the same part of the prompt's start from all its answers, down to half of
    `max_length`; what is longer then loses its own end. Dropping takes the pairs of such answers.

    Raises:
        DataError: Some are longer and `on_long` is "error", or all are dropped.
    """
    kept = []
    for group in comparisons.groups:
        long = {index for index, ids in enumerate(group.answers) if len(ids) > max_length}
        if long:
            rest = [pair for pair in group.pairs if not long & {pair.better, pair.worse}]
            comparisons.long += sorted({p.line for p in group.pairs if p not in rest})
            if on_long == "drop":
                group = _only(group, rest)
            else:
                _cut(group, max_length)
        if group.pairs:
            kept.append(group)
    if comparisons.long and on_long == "error":
        lines = ", ".join(map(str, comparisons.long[:20]))
        raise DataError(
            f"{comparisons.path}: lines {lines} have more than max_length {max_length} tokens",
            code="example_too_long",
        )
    if not kept:
        raise DataError(
            f"{comparisons.path}: every comparison has more than {max_length} tokens; raise "
            "max_length, or set on_long to truncate",
            code="example_too_long",
        )
    comparisons.groups = kept


def split_prompts(
    comparisons: Comparisons, fraction: float, seed: int
) -> tuple[Comparisons, Comparisons]:
    """Hold a share of the prompts out, all their pairs with them; one at least stays on each side.

    Raises:
        DataError: There is a single prompt.
    """
    count = len(comparisons.groups)
    if count < 2:
        raise DataError(
            f"{comparisons.path} compares answers to a single prompt, so none can be held out; set "
            "validation_fraction to 0 or give a validation_file",
            code="single_prompt",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: min(count - 1, max(1, round(fraction * count)))])
    parts: list[list[Group]] = [[], []]
    for index, group in enumerate(comparisons.groups):
        parts[index in held].append(group)
    return Comparisons(comparisons.path, parts[0]), Comparisons(comparisons.path, parts[1])


def noise_ceiling(groups: Iterable[Group]) -> tuple[float | None, str | None]:
    """Return the accuracy that no model can exceed, or None and why it is not known.

    Of pairs with a probability p it is the mean of max(p, 1 - p); ties, which accuracy leaves out,
    are left out here too.
    """
    pairs = [pair for group in groups for pair in group.pairs if pair.prob != 0.5]
    if not pairs:
        return None, "every pair is a tie"
    if all(pair.prob in (0, 1) and pair.judgements == 1 for pair in pairs):
        return None, "every pair was judged once, with certainty"
    return sum(max(pair.prob, 1 - pair.prob) for pair in pairs) / len(pairs), None


def agreement(groups: Iterable[Group]) -> tuple[float | None, str | None]:
    """Return how often two decided judgements of one pair agree, or None and why it is not known.

    Two that prefer an answer with probabilities p and q agree with p q + (1 - p) (1 - q).
    """
    agreeing, chances = 0.0, 0
    for pair in (pair for group in groups for pair in group.pairs):
        probs = [vote.prob for vote in pair.votes if vote.prob != 0.5]
        for p, q in itertools.permutations(probs, 2):
            agreeing += p * q + (1 - p) * (1 - q)
            chances += 1
    if not chances:
        return None, "no pair was decided twice"
    return agreeing / chances, None


_Judgement = tuple[float, float, int, dict[str, str]]  # probability and margin of the first


def _group(tokenizer: Any, rows: Iterable[tuple[int, Row]]) -> list[Group]:
    groups: dict[tuple[int, ...], Group] = {}
    judged: dict[tuple[tuple[int, ...], int, int], list[_Judgement]] = defaultdict(list)
    for line, row in rows:
        pairs = row.pairs() if isinstance(row, Ranking) else [row]
        for pair in pairs:
            if not isinstance(pair, Preference):
                continue
            try:
                prompt, places = _answers(tokenizer, pair, groups)
            except ToolkitError as error:
                raise DataError(f"line {line}: {error.message}", code=error.code) from error
            prob = 1.0 if pair.label_prob is None else pair.label_prob
            margin = pair.margin or 0.0
            first, second = places
            if first > second:  # the order in which they were first seen
                first, second, prob, margin = second, first, 1 - prob, -margin
            tags = {name: str(tag) for name in TAGS if (tag := getattr(pair, name)) is not None}
            judged[prompt, first, second].append((prob, margin, line, tags))
    for (prompt, first, second), votes in judged.items():
        prob = sum(vote[0] for vote in votes) / len(votes)
        margin = sum(vote[1] for vote in votes) / len(votes)
        better, worse, margin = (first, second, margin) if prob >= 0.5 else (second, first, -margin)
        margin = max(margin, 0.0) if prob != 0.5 else 0.0  # those of opposite judgements cancel
        told: tuple[Vote, ...] = ()
        if len(votes) > 1 or votes[0][3]:
            told = tuple(Vote(v[0] if prob >= 0.5 else 1 - v[0], v[3]) for v in votes)
        groups[prompt].pairs.append(
            Pair(better, worse, max(prob, 1 - prob), margin, votes[0][2], len(votes), told)
        )
    return list(groups.values())


def _answers(
    tokenizer: Any, pair: Preference, groups: dict[tuple[int, ...], Group]
) -> tuple[tuple[int, ...], list[int]]:
    """Add a pair's answers to its group; returns the group's key and the answers' places."""
    places = []
    prompt: tuple[int, ...] = ()
    for answer in (pair.chosen, pair.rejected):
        example = render_answer(tokenizer, pair.prompt, answer, pair.tools)
        start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        prompt = example.input_ids[:start]
        group = groups.setdefault(prompt, Group(prompt))
        if example.input_ids not in group.answers:
            group.answers.append(example.input_ids)
            group.lengths.append(_num_chars(answer))
        places.append(group.answers.index(example.input_ids))
    return prompt, places


def _cut(group: Group, max_length: int) -> None:
    """Take the prompt's start away, its first token aside; then the end of answers, EOS aside."""
    prompt, size = group.prompt, len(group.prompt)
    bodies = [ids[size:] for ids in group.answers]
    keep = max(max_length - max(map(len, bodies)), min(size, max_length // 2))
    if keep < size:
        group.prompt = (prompt[0], *prompt[size - keep + 1 :])
    room = max_length - len(group.prompt)
    group.answers = [
        (*group.prompt, *(body if len(body) <= room else (*body[: room - 1], body[-1])))
        for body in bodies
    ]


def _only(group: Group, pairs: Sequence[Pair]) -> Group:
    """Return a group of some of its pairs, without the answers that are in none of them."""
    used = sorted({index for pair in pairs for index in (pair.better, pair.worse)})
    places = {index: place for place, index in enumerate(used)}
    return Group(
        group.prompt,
        [group.answers[index] for index in used],
        [group.lengths[index] for index in used],
        [replace(p, better=places[p.better], worse=places[p.worse]) for p in pairs],
    )


def _num_chars(answer: Content) -> int:
    if isinstance(answer, str):
        return len(answer)
    return sum(len(message.content or "") for message in answer)


def batches_of(groups: Sequence[Group], max_tokens: int) -> list[list[Group]]:
    """Put groups of similar length together, up to `max_tokens` with padding; one at least."""
    order = sorted(groups, key=lambda group: max(map(len, group.answers)))
    found: list[list[Group]] = []
    rows = math.inf
    for group in order:
        longest = max(map(len, group.answers))
        if found and (rows + len(group.answers)) * longest <= max_tokens:
            found[-1].append(group)
            rows += len(group.answers)
        else:
            found.append([group])
            rows = len(group.answers)
    return found

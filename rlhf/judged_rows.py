"""Rows of people's judgements as DPO and KTO learn them: prompts and answers as token ids.

A DPO row has `prompt_ids`, `chosen_ids` and `rejected_ids`; a KTO row `prompt_ids`,
`completion_ids` and `label`; `line` is where the file has it. Prompts are rendered as hone serves
them, and answers end with EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.jsonl import read_numbered_rows
from data.render import IGNORED, render_answer
from data.rows import Format, Unpaired
from data.validate import validate
from rlhf.comparisons import Comparisons, Group, limit_length, load_comparisons, split_prompts
from rlhf.config import resolve_length
from rlhf.shared_prompts import Asked, of_groups, warn_of_shared
from rlhf.trl_config import DpoConfig, KtoConfig, OfflineConfig
from train.base_model import Base
from train.batches import name_lines

_HELD_OUT = (
    ", as others are held out, cut or dropped: give more rows, a smaller validation_fraction, or a "
    "validation_file"
)
Row = dict[str, Any]
Rows = list[Row]


def read_pairs(config: DpoConfig, base: Base) -> tuple[Rows, Rows, list[str]]:
    """Return the decided pairs to learn and those held out, and what to warn of.

    Raises:
        DataError: The files have problems, or no decided pair is left to learn.
    """
    parts, warnings = _read_comparisons(config, base)
    train, valid = ([] if part is None else _pair_rows(part.groups) for part in parts)
    if not train:
        raise DataError(
            f"{config.train_file}: no decided comparison is left to learn{_HELD_OUT}",
            code="only_ties",
        )
    return train, valid, warnings


def read_judged(config: KtoConfig, base: Base) -> tuple[Rows, Rows, list[str]]:
    """Return single judged answers: those of a file, or the sides of its pairs.

    Raises:
        DataError: All are good, all are bad, or all are too long.
    """
    if not config.train_file.is_file():
        raise DataError(f"train_file {config.train_file} is not a file", code="file_not_found")
    report = validate(config.train_file, min_examples=config.min_examples)
    if report.ok and report.format is Format.UNPAIRED:
        rows, asked, warnings = _judged_rows(config, config.train_file, base)
        if config.validation_file is not None:
            valid, judged, more = _judged_rows(config, config.validation_file, base)
            warnings += more + warn_of_shared(asked, judged, "validation_file")
        else:
            rows, valid = _hold_out(rows, [prompt for _, prompt in asked], config)
    else:
        parts, warnings = _read_comparisons(config, base)
        rows, valid = ([] if part is None else _side_rows(part.groups) for part in parts)
    _check_labels(config, rows, valid)
    return rows, valid, warnings


def _check_labels(config: KtoConfig, rows: Rows, valid: Rows) -> None:
    labels = {row["label"] for row in rows}
    if len(labels) == 2:
        return
    held_out = set() if config.validation_file else {row["label"] for row in valid} - labels
    told = "no decided answer is left to learn"
    if rows:
        left = " left to learn" if held_out else ""
        told = f"every answer{left} is {'good' if True in labels else 'bad'}"
    why = _HELD_OUT if held_out or not rows else ""
    raise DataError(
        f"{config.train_file}: {told}{why}; KTO learns from good and bad ones", code="one_label"
    )


def _read_comparisons(
    config: OfflineConfig, base: Base
) -> tuple[tuple[Comparisons, Comparisons | None], list[str]]:
    longest = resolve_length(config.max_length, base.name, base.context_length)
    train = load_comparisons(config.train_file, base.tokenizer, config.min_examples)
    valid, warnings = None, _warn_of_strengths(train)
    if config.validation_file is not None:
        valid = load_comparisons(config.validation_file, base.tokenizer, 1)
        asked = of_groups(train.groups), of_groups(valid.groups)
        warnings += warn_of_shared(*asked, "validation_file")
    elif config.validation_fraction and len(train.groups) > 1:
        train, valid = split_prompts(train, config.validation_fraction, config.seed)
    for part in (train, valid):
        if part is not None:
            limit_length(part, longest, config.on_long)
            if part.long:
                did = "dropped" if config.on_long == "drop" else "cut"
                lines = name_lines(part.long)
                warnings.append(f"rows of more than {longest} tokens {did}: {lines}")
    ties = sum(pair.prob == 0.5 for group in train.groups for pair in group.pairs)
    if ties:
        warnings.append(f"{ties} ties are left out: this method learns from decided pairs")
    return (train, valid), warnings


def _warn_of_strengths(found: Comparisons) -> list[str]:
    """Tell how many comparisons say how sure or by how much, which only a reward model learns."""
    pairs = [pair for group in found.groups for pair in group.pairs]
    unsure = sum(0.5 < pair.prob < 1 for pair in pairs)
    margins = sum(pair.margin != 0 for pair in pairs)
    if not unsure + margins:
        return []
    return [
        f"{found.path.name}: {unsure} comparisons are less than certain (label_prob, or judged "
        f"both ways) and {margins} have a margin; this method learns only which answer won, as "
        "though all were certain. A reward model (rlhf.reward) learns how strongly"
    ]


def _pair_rows(groups: Sequence[Group]) -> Rows:
    rows = []
    for group in groups:
        for pair in group.pairs:
            if pair.prob > 0.5:
                better, worse = group.answers[pair.better], group.answers[pair.worse]
                start = len(group.prompt)
                rows.append(
                    {
                        "prompt_ids": list(better[:start]),
                        "chosen_ids": list(better[start:]),
                        "rejected_ids": list(worse[start:]),
                        "line": pair.line,
                    }
                )
    return rows


def _side_rows(groups: Sequence[Group]) -> Rows:
    rows = []
    for row in _pair_rows(groups):
        for name, label in (("chosen_ids", True), ("rejected_ids", False)):
            ids = {"prompt_ids": row["prompt_ids"], "completion_ids": row[name]}
            rows.append({**ids, "label": label, "line": row["line"]})
    return rows


def _judged_rows(config: KtoConfig, path: Path, base: Base) -> tuple[Rows, Asked, list[str]]:
    """Return the rows of a file of judged answers, what they ask, and what to warn of.

    Raises:
        DataError: The file has problems, some rows are too long and `on_long` is "error", or
            none is short enough.
    """
    report = validate(path, min_examples=1)
    if not report.ok:
        raise DataError(f"{path} cannot be used.\n{report.summary()}", code="invalid_file")
    longest = resolve_length(config.max_length, base.name, base.context_length)
    rows: Rows = []
    asked: list[tuple[int, tuple[int, ...]]] = []
    cut, dropped = [], []
    for line, row in read_numbered_rows(path, Format.UNPAIRED):
        if not isinstance(row, Unpaired):
            continue
        good = row.label if isinstance(row.label, bool) else row.label >= config.good_rating
        example = render_answer(base.tokenizer, row.prompt, row.completion)
        start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        prompt, answer = list(example.input_ids[:start]), list(example.input_ids[start:])
        excess = len(example) - longest
        if excess > 0 and (config.on_long == "drop" or len(answer) + 1 > longest):
            dropped.append(line)
            continue
        asked.append((line, tuple(prompt)))
        if excess > 0:
            cut.append(line)
            prompt = [prompt[0], *prompt[1 + excess :]]
        ids = {"prompt_ids": prompt, "completion_ids": answer}
        rows.append({**ids, "label": good, "line": line})
    if config.on_long == "error" and cut + dropped:
        raise DataError(
            f"{path}: {name_lines(sorted(cut + dropped))} have more than max_length {longest} "
            "tokens",
            code="example_too_long",
        )
    why = f"more than {longest} tokens"
    if config.on_long == "truncate":
        why = f"an answer of more than {longest - 1} tokens, which is never cut,"
    if not rows:
        raise DataError(
            f"{path}: every row has {why.rstrip(',')}; raise max_length, or shorten the rows",
            code="example_too_long",
        )
    told = [f"rows of more than {longest} tokens cut: {name_lines(cut)}"] if cut else []
    if dropped:
        told.append(f"{len(dropped)} rows with {why} dropped: {name_lines(dropped)}")
    return rows, asked, told


def _hold_out(
    rows: Rows, asked: Sequence[tuple[int, ...]], config: OfflineConfig
) -> tuple[Rows, Rows]:
    """Hold a share of the prompts out, all their answers with them.

    Args:
        asked: The prompt of each row before it was cut: answers of different lengths cut a prompt
            differently.
    """
    prompts = list(dict.fromkeys(asked))
    count = round(config.validation_fraction * len(prompts))
    if not count or len(prompts) < 2:
        return rows, []
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed))
    held = {prompts[index] for index in order[: min(count, len(prompts) - 1)].tolist()}
    parts: tuple[Rows, Rows] = ([], [])
    for row, prompt in zip(rows, asked, strict=True):
        parts[prompt in held].append(row)
    return parts


def mean_tokens(row: Row) -> float:
    """Return the tokens of a row's prompt with one of its answers, on average."""
    prompt = len(row["prompt_ids"])
    if "label" in row:
        return prompt + len(row["completion_ids"])
    return prompt + (len(row["chosen_ids"]) + len(row["rejected_ids"])) / 2

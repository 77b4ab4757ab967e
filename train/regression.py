"""The gate of supervised fine-tuning: a tuned model must not be worse than what it would replace.

Both models score the validation rows; the rows pair up, so that a paired test (`significance`) can
tell a fall from chance. What is compared is each row's loss: mean nats over its learned tokens. An
adapter of another base may cut the same text into other tokens, so there it is nats a byte of the
learned text, which no tokenizer changes; rows whose learned text is too long for either side are
left out. Where a loss is not finite there is nothing to compare, and nothing is promoted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head

from data.errors import DataError
from data.render import IGNORED, Example
from train.base_model import load_base
from train.batches import Rendered, load_file
from train.example_losses import score
from train.loss_head import use_compact_head
from train.prepare import TrainingJob
from train.significance import Difference, compare
from train.start import read_shape

FEWEST = 6  # rows whose exact two-sided test can fall below 0.05: 2 / 2^6
OTHER = "compared"
BASE = "the base model"


@dataclass(frozen=True)
class Regression:
    """Losses of the validation rows before and after.

    Attributes:
        against: What the tuned model is compared with.
        unit: "token" or "byte": nats by what.
        before, after: [rows].
        difference: Of the negated losses, so that more is better.
        rows: Which of the validation rows they are: [rows].
    """

    against: str
    before: list[float]
    after: list[float]
    difference: Difference
    rows: list[int]
    unit: str = "token"

    def summary(self) -> dict[str, Any]:
        """Return what a run's result keeps; a number that is not finite is null there."""
        count = len(self.after)
        means = [sum(losses) / count for losses in (self.before, self.after)]
        before, after = (mean if math.isfinite(mean) else None for mean in means)
        is_finite = before is not None and after is not None
        return {
            "against": self.against,
            "rows": count,
            "unit": f"nats a {self.unit}",
            "loss_before": before,
            "loss_after": after,
            "difference": self.difference.as_dict() if is_finite else None,
        }

    def gate(self) -> dict[str, Any]:
        """Refuse promotion where the rows' losses rose, and not by chance, or are not finite.

        Of fewer than FEWEST rows that differ no outcome is beyond chance; there their mean decides.
        """
        found, total = self.difference, len(self.after)
        broken = [sum(not math.isfinite(x) for x in losses) for losses in (self.before, self.after)]
        if any(broken):
            reason = (
                f"validation loss is not finite on {broken[0]} of {total} rows with {self.against} "
                f"and on {broken[1]} now, so they cannot be compared"
            )
            return {"promote": False, "reasons": [reason]}
        few = found.better + found.worse < FEWEST
        fell = found.mean < 0 and (found.is_significant or few)
        summary = self.summary()
        reason = (
            f"validation loss by row {summary['loss_before']:.4f} with {self.against}, "
            f"{summary['loss_after']:.4f} now: {found.better} of {total} rows better, "
            f"{found.worse} worse (p = {found.p_value:.3g}"
            + (", which so few rows cannot make small: their mean decides)" if few else ")")
        )
        return {"promote": not fell, "reasons": [reason]}


def compare_with(job: TrainingJob, model: Any) -> Regression | None:
    """Score the validation rows with and without the training; None without such rows.

    The other side is `compare_with` of the settings, an adapter of the same base, else the base.

    Raises:
        AdapterRefused: `compare_with` is no adapter of its base.
        DataError: With another base: no row is short enough for both.
    """
    if job.valid is None:
        return None
    if job.config.compare_base is not None:
        return _compare_bases(job, job.valid, model, job.config.compare_base)
    after = [row["loss"] for row in score(model, job.valid)]
    other = job.config.compare_with
    if other is None:
        with model.disable_adapter():
            before = [row["loss"] for row in score(model, job.valid)]
    else:
        before = _losses_with(job, model, other)
    against = BASE if other is None else "the adapter in use"
    return _regression(against, before, after, range(len(after)))


def _regression(
    against: str,
    before: list[float],
    after: list[float],
    rows: Sequence[int],
    unit: str = "token",
) -> Regression:
    negated = [[-loss for loss in losses] for losses in (before, after)]
    return Regression(against, before, after, compare(*negated), list(rows), unit)


def _losses_with(job: TrainingJob, model: Any, folder: Path) -> list[float]:
    read_shape(folder, job.base, dropout=0.0, setting="compare_with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: the adapter names a base by its name
        model.load_adapter(str(folder), OTHER)
    torch.nn.Module.train(model, False)  # its dropout too, which no list of modules has yet
    model.set_adapter(OTHER)
    try:
        return [row["loss"] for row in score(model, job.valid)]  # type: ignore[arg-type]
    finally:
        model.set_adapter("default")
        model.delete_adapter(OTHER)


def _compare_bases(job: TrainingJob, valid: Rendered, model: Any, old_base: str) -> Regression:
    """Score the same rows with the tuned model, and with an adapter of another base.

    A row's nats are divided by the bytes of its learned text on either side, the smaller number:
    what one template adds to an answer costs that side its nats, and earns no bytes.
    """
    old = load_base(job.config.model_copy(update={"base_model": old_base}))
    read_shape(job.config.compare_with, old, dropout=0.0, setting="compare_with")  # type: ignore[arg-type]
    file = load_file(valid.path, old.tokenizer, min_examples=1)
    same = file.examples.select(np.searchsorted(file.lines, valid.lines))
    theirs = same.cut(old.context_length)
    kept = np.flatnonzero(~(valid.examples.lost_learned | theirs.lost_learned))
    if not len(kept):
        raise DataError(
            f"{valid.path}: the learned text of every validation row is longer than one of "
            f"{job.base.name} ({job.plan.max_length} tokens) and {old.name} ({old.context_length}) "
            "reads, so they cannot be compared; give a validation file with shorter answers",
            code="example_too_long",
        )
    sides = [replace(valid, examples=rows.select(kept)) for rows in (theirs, valid.examples)]
    sizes = [
        max(
            1,
            min(
                _learned_bytes(base.tokenizer, one)
                for base, one in zip((old, job.base), pair, strict=True)
            ),
        )
        for pair in zip(*(side.examples for side in sides), strict=True)
    ]
    add_fused_lm_head(old.model, outputs=("log_probs", "entropy", "is_top1"))
    use_compact_head(old.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: the adapter names a base by its name
        tuned = PeftModel.from_pretrained(old.model, str(job.config.compare_with))
    before, after = (
        [
            row["loss"] * row["learned_tokens"] / size
            for row, size in zip(score(scored, side), sizes, strict=True)
        ]
        for scored, side in zip((tuned, model), sides, strict=True)
    )
    against = f"the adapter in use, on {old.name}"
    return _regression(against, before, after, kept.tolist(), unit="byte")


def _learned_bytes(tokenizer: Any, example: Example) -> int:
    ids = [label for label in example.labels if label != IGNORED]
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())

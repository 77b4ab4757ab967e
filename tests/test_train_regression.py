"""The comparison before a promotion: which rows count, by which bytes, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from data.errors import DataError
from train import regression
from train.batches import Rendered, limit_length, load_file
from train.significance import compare

ANSWERS = (" ok", " a longer one", " ok again", " short")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run on a base whose model, as the old one's, gives every token 1 nat."""
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "question:", "completion": answer} for answer in ANSWERS]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    valid = load_file(path, tokenizer, 1)

    def score(model: Any, rows: Rendered) -> list[dict[str, float]]:
        return [{"loss": 1.0, "learned_tokens": one.num_trained} for one in rows.examples]

    old = SimpleNamespace(name="old", tokenizer=tokenizer, context_length=64, model=None)
    monkeypatch.setattr(regression, "load_base", lambda _: old)
    monkeypatch.setattr(regression, "score", score)
    monkeypatch.setattr(regression.PeftModel, "from_pretrained", lambda *_: None)
    for name in ("read_shape", "add_fused_lm_head", "use_compact_head"):
        monkeypatch.setattr(regression, name, lambda *_, **__: None)
    config = SimpleNamespace(
        compare_base="old", compare_with=tmp_path, model_copy=lambda update: None
    )
    base = SimpleNamespace(name="new", tokenizer=tokenizer)
    plan = SimpleNamespace(max_length=64)
    return SimpleNamespace(config=config, base=base, plan=plan, valid=valid, old=old)


@pytest.mark.parametrize(("cut", "context"), [(64, 64), (12, 64), (64, 12), (12, 10)])
def test_rows_that_either_side_cuts_are_left_out(job: Any, cut: int, context: int) -> None:
    job.valid = limit_length(job.valid, cut, "truncate")
    job.old.context_length = context
    found = regression.compare_with(job, None)
    assert found is not None
    room = min(cut, context) - 1  # bytes and EOS, after one token of context
    kept = [i for i, text in enumerate(ANSWERS) if len(text) + 1 <= room]
    assert found.rows == kept
    by_hand = [(len(ANSWERS[i]) + 1) / len(ANSWERS[i]) for i in kept]  # a token is a byte here
    assert found.before == found.after == pytest.approx(by_hand)
    assert found.gate()["promote"]


def test_rows_that_no_base_reads_whole_are_told(job: Any) -> None:
    job.old.context_length = 3
    with pytest.raises(DataError, match=r"longer than one of new \(64 tokens\) and old \(3\)"):
        regression.compare_with(job, None)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_loss_that_is_not_finite_never_promotes(broken: float, side: int) -> None:
    losses = [[1.0, 2.0], [0.5, 1.0]]
    losses[side][1] = broken
    negated = [[-x for x in one] for one in losses]
    found = regression.Regression("x", *losses, compare(*negated), [0, 1])
    assert found.summary()["difference"] is None
    gate = found.gate()
    assert not gate["promote"]
    assert "not finite on" in gate["reasons"][0]


@pytest.mark.parametrize(("rows", "promoted"), [(1, False), (5, False), (6, True), (40, False)])
def test_where_no_test_can_tell_the_mean_decides(rows: int, promoted: bool) -> None:
    """Every row is worse but one of six; 2 / 2^5 is above 0.05, so five say nothing by a test."""
    before = [1.0] * rows
    after = [1.5] * rows
    if rows == 6:
        after[0] = 0.5
    negated = [[-x for x in one] for one in (before, after)]
    found = regression.Regression("x", before, after, compare(*negated), list(range(rows)))
    assert found.gate()["promote"] is promoted
    better = regression.Regression("x", after, before, compare(*negated[::-1]), list(range(rows)))
    assert better.gate()["promote"]

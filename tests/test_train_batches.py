"""Datasets as batches: order, length limits, held-out rows, and cutting a step into parts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from train_runs import write_rows

from data.errors import DataError
from data.render import Example
from train.batches import (
    META,
    LengthGroupedSampler,
    Rendered,
    limit_length,
    load_file,
    name_lines,
    split,
)
from train.sft_trainer import ROUND, cut_batch
from train.token_store import ROWS, TOKENS, open_rows
from train.token_store import write_rows as store_rows


def rendered(lengths: list[int]) -> Rendered:
    examples = [Example(tuple(range(n)), (-100, *range(1, n))) for n in lengths]
    with tempfile.TemporaryDirectory() as folder:
        store_rows(Path(folder), enumerate(examples, 1))
        return Rendered(Path("rows.jsonl"), "digest", open_rows(Path(folder)))


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 5)
)
def test_an_epoch_has_every_row_once(lengths: list[int], batch_size: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, seed=3)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert list(sampler) == order  # of seed and epoch alone


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(40))
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = LengthGroupedSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 3


def test_neighbours_have_similar_lengths() -> None:
    lengths = [5, 50] * 40
    order = list(LengthGroupedSampler(lengths, 8, 0))
    batches = [{lengths[row] for row in order[at : at + 8]} for at in range(0, 80, 8)]
    assert all(len(batch) == 1 for batch in batches)


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    longest = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    ids = torch.arange(1, len(lengths) + 1)[:, None] * mask  # a row's number on its tokens
    return {"input_ids": ids, "attention_mask": mask}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 99))
def test_parts_of_a_step_hold_all_its_tokens(
    lengths: list[int], max_rows: int, max_tokens: int
) -> None:
    found = []
    for part in cut_batch(batch_of(lengths), max_rows, max_tokens):
        rows, columns = part["input_ids"].shape
        assert rows <= max_rows
        assert rows == 1 or rows * columns <= max_tokens
        longest = int(part["attention_mask"].sum(1).max())
        assert columns == min(longest + -longest % ROUND, max(lengths))
        found += [tuple(row[row > 0].tolist()) for row in part["input_ids"]]
    assert sorted(found) == sorted((i + 1,) * n for i, n in enumerate(lengths))


def test_long_rows_are_truncated_with_their_lines() -> None:
    rows = limit_length(rendered([5, 20, 8, 30]), 10, "truncate")
    assert rows.long.tolist() == [2, 4]
    assert rows.examples.lengths.tolist() == [5, 10, 8, 10]
    assert [len(example) for example in rows.examples] == [5, 10, 8, 10]


def test_long_rows_are_dropped_if_asked() -> None:
    rows = limit_length(rendered([5, 20, 8]), 10, "drop")
    assert (rows.lines.tolist(), rows.long.tolist()) == ([1, 3], [2])
    with pytest.raises(DataError, match="every example is longer than 10 tokens"):
        limit_length(rendered([20, 30]), 10, "drop")


def test_long_rows_are_an_error_if_asked() -> None:
    with pytest.raises(DataError, match="lines 2, 3") as caught:
        limit_length(rendered([5, 20, 30]), 10, "error")
    assert caught.value.code == "example_too_long"


def test_lines_are_named_up_to_a_point() -> None:
    assert name_lines([7]) == "line 7"
    assert name_lines(list(range(1, 23))).endswith("19, 20 and 2 more")
    assert name_lines([1, 2], 500) == "lines 1, 2 and 498 more"


def test_held_out_rows_keep_their_lines() -> None:
    train, valid = split(rendered(list(range(2, 22))), 0.2, seed=0)
    assert (len(train.examples), len(valid.examples)) == (16, 4)
    assert sorted([*train.lines, *valid.lines]) == list(range(1, 21))
    assert all(len(e) == line + 1 for e, line in zip(valid.examples, valid.lines, strict=True))


def test_equal_rows_are_held_out_together() -> None:
    lengths = [2, 3, 4, 5, 6] * 6 + list(range(7, 37)) + [40] * 40  # equal in length: equal rows
    for seed in range(20):
        train, valid = split(rendered(lengths), 0.2, seed)
        kinds = [set(part.examples.lengths.tolist()) for part in (train, valid)]
        assert not kinds[0] & kinds[1]
        assert kinds[0] | kinds[1] == set(lengths)
        assert 14 <= len(valid.examples) <= 20  # a group of 6 may not fit in
        assert 40 in kinds[0]
    with pytest.raises(DataError, match="all 12 examples are equal"):
        split(rendered([5] * 12), 0.5, 0)


def test_files_are_checked_before_they_are_rendered(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    assert len(load_file(path, tiny_tokenizer(), 10).examples) == 24
    path.write_text('{"prompt": "a", "completion": ""}\n' * 12)
    with pytest.raises(DataError, match="empty_completion"):
        load_file(path, tiny_tokenizer(), 10)


def test_rows_are_on_disk_before_their_store_counts_as_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, list[str]()

    def note(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    load_file(write_rows(tmp_path / "rows.jsonl"), tiny_tokenizer(), 10, tmp_path / "store")
    assert synced[:2] == [TOKENS, ROWS]
    assert synced[2].startswith(f".{META}")


@pytest.mark.parametrize("name", [TOKENS, ROWS])
def test_a_store_that_was_cut_short_is_rendered_again(tmp_path: Path, name: str) -> None:
    path, store = write_rows(tmp_path / "rows.jsonl"), tmp_path / "store"
    wanted = list(load_file(path, tiny_tokenizer(), 10, store).examples)
    cut = store / name
    os.truncate(cut, cut.stat().st_size // 2)
    assert list(load_file(path, tiny_tokenizer(), 10, store).examples) == wanted
    os.truncate(store / TOKENS, 8)
    with pytest.raises(DataError, match=r"tokens\.bin was cut short"):
        list(open_rows(store))


def test_special_tokens_in_rows_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + '{"prompt": "a", "completion": "b<|im_end|>"}\n')
    with pytest.raises(DataError, match="forbidden_special_token"):
        load_file(path, tiny_tokenizer(), 10)


def test_rows_that_cannot_be_rendered_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    path.write_text(f"{good}\n" * 10 + '{"messages": [{"role": "assistant", "content": "b"}]}\n')
    with pytest.raises(DataError, match=r"chat\.jsonl:11: The conversation starts with"):
        load_file(path, tiny_tokenizer(), 10)

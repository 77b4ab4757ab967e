"""What a run says of its files: prompts on both sides, strengths not learned, long rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_rlhf_reward import vowel_rows, write
from tiny_models import save_tiny_base, tiny_tokenizer

from data.errors import DataError
from rlhf import reward_run
from rlhf.config import RewardConfig
from rlhf.judged_rows import read_judged, read_pairs
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_setup import read_prompts
from rlhf.trl_config import DpoConfig, GrpoConfig, KtoConfig

BASE: Any = SimpleNamespace(tokenizer=tiny_tokenizer(), name="tiny", context_length=64)
PAIRS = vowel_rows(4)
TOLD = "2 rows of {} have a prompt that the training file has too"


def config(kind: type[Any], folder: Path, **values: Any) -> Any:
    return kind.model_validate({"output_dir": folder / "out", **values})


def judged(count: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + count)
    return [{"prompt": f"say {n}:", "completion": "aa", "label": n % 2 == 0} for n in numbers]


def test_comparisons_on_both_sides_are_told_with_their_lines(tmp_path: Path) -> None:
    rows = vowel_rows(20)
    save_tiny_base(tmp_path / "tiny-base", "llama")
    files = {
        "train_file": write(tmp_path / "train.jsonl", rows[:12]),
        "validation_file": write(tmp_path / "valid.jsonl", [rows[15], rows[3], rows[16], rows[0]]),
    }
    apart = files | {"validation_file": write(tmp_path / "apart.jsonl", rows[14:])}
    found = {
        "dpo": read_pairs(config(DpoConfig, tmp_path, **files), BASE)[2],
        "kto": read_judged(config(KtoConfig, tmp_path, **files), BASE)[2],
    }
    base = {"base_model": str(tmp_path / "tiny-base"), "device": "cpu", "threads": 1}
    told = reward_run.set_up(config(RewardConfig, tmp_path, **files, **base)).warnings
    for warnings in (*found.values(), told):
        assert len(warnings) == 1
        assert TOLD.format("validation_file") in warnings[0]
        assert warnings[0].endswith("lines 2, 4")
    assert read_pairs(config(DpoConfig, tmp_path, **apart), BASE)[2] == []
    assert reward_run.set_up(config(RewardConfig, tmp_path, **apart, **base)).warnings == []


def test_judged_answers_on_both_sides_are_told_even_where_prompts_are_cut(tmp_path: Path) -> None:
    files = {
        "train_file": write(tmp_path / "train.jsonl", judged(12)),
        "validation_file": write(tmp_path / "valid.jsonl", judged(4, start=10)),
    }
    for max_length, more in ((64, 0), (8, 2)):  # cut prompts are alike
        given = config(KtoConfig, tmp_path, **files, max_length=max_length)
        *_, warnings = read_judged(given, BASE)
        assert len(warnings) == 1 + more
        assert TOLD.format("validation_file") in warnings[-1]
        assert warnings[-1].endswith("lines 1, 2")


@pytest.mark.parametrize("kind", [PpoConfig, GrpoConfig])
def test_evaluations_on_what_is_learned_are_told(tmp_path: Path, kind: type[Any]) -> None:
    asked = [{"prompt": f"say {n}", "answer": "a"} for n in range(20)]
    files = {
        "prompts_file": write(tmp_path / "train.jsonl", asked[:12]),
        "eval_prompts_file": write(tmp_path / "eval.jsonl", [asked[n] for n in (14, 2, 15, 5, 1)]),
    }
    given = config(kind, tmp_path, **files, reward={"function": "m:f"}, eval_prompts=4)
    *_, warnings = read_prompts(given, BASE, 40)
    assert len(warnings) == 1
    assert TOLD.format("eval_prompts_file") in warnings[0]
    assert warnings[0].endswith("lines 2, 4")  # the fifth is not used


@pytest.mark.parametrize(("kind", "reader"), [(DpoConfig, read_pairs), (KtoConfig, read_judged)])
def test_strengths_that_are_not_learned_are_told_once(
    tmp_path: Path, kind: type[Any], reader: Any
) -> None:
    rows = vowel_rows(20)
    for n in range(3):
        rows[n] |= {"label_prob": (0.7, 0.2, 0.5)[n]}
    for n in range(3, 7):
        rows[n] |= {"margin": 2.0}
    path = write(
        tmp_path / "rows.jsonl",
        [*rows, {**rows[8], "chosen": rows[8]["rejected"], "rejected": rows[8]["chosen"]}, rows[8]],
    )
    *_, warnings = reader(config(kind, tmp_path, train_file=path, validation_fraction=0), BASE)
    assert len(warnings) == 2
    assert "rows.jsonl: 3 comparisons are less than certain" in warnings[0]
    assert "4 have a margin" in warnings[0]
    assert "1 ties are left out" in warnings[1]
    plain = write(tmp_path / "plain.jsonl", vowel_rows(20))
    *_, warnings = reader(config(kind, tmp_path, train_file=plain, validation_fraction=0), BASE)
    assert warnings == []


def test_rows_that_are_cut_and_rows_that_are_dropped_are_told_apart(tmp_path: Path) -> None:
    rows = judged(12)
    rows[2] |= {"prompt": "x" * 30}
    rows[5] |= {"completion": "y" * 40}
    rows[7] |= {"completion": "y" * 50}
    path = write(tmp_path / "rows.jsonl", rows)
    given = {"train_file": path, "validation_fraction": 0, "max_length": 24}
    learned, _, warnings = read_judged(config(KtoConfig, tmp_path, **given), BASE)
    assert len(learned) == 10
    assert max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in learned) == 24
    assert warnings == [
        "rows of more than 24 tokens cut: line 3",
        "2 rows with an answer of more than 23 tokens, which is never cut, dropped: lines 6, 8",
    ]
    learned, _, warnings = read_judged(config(KtoConfig, tmp_path, **given, on_long="drop"), BASE)
    assert len(learned) == 9
    assert warnings == ["3 rows with more than 24 tokens dropped: lines 3, 6, 8"]
    with pytest.raises(DataError, match="lines 3, 6, 8 have more than max_length 24 tokens"):
        read_judged(config(KtoConfig, tmp_path, **given, on_long="error"), BASE)


def test_a_prompt_that_is_cut_differently_is_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n:02}" + "x" * 12, "completion": "y" * size, "label": size == 1}
        for n in range(20)
        for size in (1, 6)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    given = {"train_file": path, "validation_fraction": 0.5, "max_length": 18}
    learned, held, _ = read_judged(config(KtoConfig, tmp_path, **given), BASE)
    sides = [{(row["line"] - 1) // 2 for row in part} for part in (learned, held)]
    assert sides[0] | sides[1] == set(range(20))
    assert not sides[0] & sides[1]
    assert len({len(row["prompt_ids"]) for row in learned}) == 2


@pytest.mark.parametrize("side", ["train_file", "validation_file"])
@pytest.mark.parametrize(
    ("on_long", "told"),
    [
        ("truncate", "every row has an answer of more than 7 tokens, which is never cut; raise"),
        ("drop", "every row has more than 8 tokens; raise max_length"),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused_for_that(
    tmp_path: Path, side: str, on_long: str, told: str
) -> None:
    long = write(tmp_path / "long.jsonl", [row | {"completion": "y" * 9} for row in judged(12)])
    short = [{"prompt": f"{n}", "completion": "a", "label": n > 4} for n in range(12)]
    files = {"train_file": write(tmp_path / "short.jsonl", short), side: long}
    given = config(KtoConfig, tmp_path, **files, max_length=8, on_long=on_long)
    with pytest.raises(DataError, match=told) as caught:
        read_judged(given, BASE)
    assert "long.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reader", "rows", "told"),
    [
        (DpoConfig, read_pairs, "pairs", "no decided comparison is left to learn, as others are"),
        (KtoConfig, read_judged, "pairs", "no decided answer is left to learn, as others are"),
        (KtoConfig, read_judged, "answers", "every answer left to learn is good, as others are"),
    ],
)
def test_what_is_held_out_is_not_missed_elsewhere(
    tmp_path: Path, kind: type[Any], reader: Any, rows: str, told: str
) -> None:
    """One of four prompts is held out: whichever it is, what only it has is not elsewhere."""
    found = []
    for odd in range(4):
        if rows == "pairs":
            given = [row | {"prompt": f"{n}", "label_prob": 0.5} for n, row in enumerate(PAIRS)]
            given[odd] |= {"label_prob": 1.0}
        else:
            given = [{"prompt": f"{n}", "completion": "a", "label": n != odd} for n in range(4)]
        path = write(tmp_path / f"{odd}.jsonl", given)
        settings = config(kind, tmp_path, train_file=path, validation_fraction=0.25, min_examples=1)
        found.append(_refusal(reader, settings))
    [refusal] = filter(None, found)
    assert told in refusal


def _refusal(reader: Any, settings: Any) -> str | None:
    try:
        reader(settings, BASE)
    except DataError as error:
        return str(error)
    return None

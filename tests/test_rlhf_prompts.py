"""The prompts of a run: what of their rows reaches graders, and which rows are one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from data.errors import ConfigError, DataError
from rlhf.ppo_config import PpoConfig
from rlhf.ppo_setup import prompt_room, read_prompts
from rlhf.prompts import load_prompts
from rlhf.trl_config import GrpoConfig, RlooConfig

ASKED = [{"role": "user", "content": "say a"}]
SAID = [{"role": "assistant", "content": "a"}]
JUDGED = {"chosen": "a", "rejected": "b", "label_prob": 0.9, "margin": 1.0}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # blank lines are no rows
    return path


def base(context_length: int = 64) -> Any:
    return SimpleNamespace(tokenizer=tiny_tokenizer(), name="tiny", context_length=context_length)


def config(kind: type[Any], path: Path, **values: Any) -> Any:
    given = {"prompts_file": path, "output_dir": "o", "reward": {"function": "m:f"}}
    return kind.model_validate(given | values)


@pytest.mark.parametrize(
    ("row", "own"),
    [
        ({"prompt": "say a"}, {}),
        ({"messages": ASKED}, {}),
        ({"prompt": "say a", "completion": "a"}, {"completion": "a"}),
        ({"messages": [*ASKED, *SAID]}, {"completion": "a"}),
        ({"prompt": "say a", "completion": "a", "label": True, "labeler": "x"}, {}),
        ({"prompt": "say a", **JUDGED}, {}),
        ({"chosen": [*ASKED, *SAID], "rejected": [*ASKED, {**SAID[0], "content": "b"}]}, {}),
        (
            {
                "input": {"messages": ASKED},
                "preferred_output": SAID,
                "non_preferred_output": [{**SAID[0], "content": "b"}],
            },
            {},
        ),
        ({"prompt": "say a", "completions": ["a", "b"], "ranks": [1, 2]}, {}),
    ],
)
def test_other_keys_of_rows_of_every_kind_reach_graders(
    tmp_path: Path, row: dict[str, Any], own: dict[str, Any]
) -> None:
    others = [
        {"answer": "α", "n": 2**70, "tags": ["x", {"y": 1}], "batch": 3},
        {"answer": "b", "nothing": None},
    ]
    path = write(tmp_path / "rows.jsonl", [row | other for other in others])
    found = load_prompts(path, tiny_tokenizer(), 100).rows
    assert [dict(prompt.item) for prompt in found] == [own | others[0], own | {"answer": "b"}]
    assert [prompt.line for prompt in found] == [1, 3]
    assert len({prompt.ids for prompt in found}) == 1


def test_a_row_said_twice_is_one_prompt_and_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n % 6}", "answer": n // 12, "x": [1]} for n in range(24)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = load_prompts(path, tiny_tokenizer(), 100)
    assert len(found.rows) == 12
    assert found.repeated == [2 * n + 1 for n in (*range(6, 12), *range(18, 24))]
    _, _, warnings = read_prompts(config(PpoConfig, path, eval_prompts=2), base(), 40)
    assert any("12 prompts left out, as they say what an earlier line" in told for told in warnings)


def test_no_prompt_is_both_learned_and_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n % 20}", "answer": n} for n in range(60)]
    path = write(tmp_path / "rows.jsonl", rows)
    for kind in (PpoConfig, RlooConfig, GrpoConfig):
        learned, held, _ = read_prompts(config(kind, path, eval_prompts=7), base(), 40)
        assert len(held) == 7
        assert len(learned) == 60 - 9  # the third prompt's rows are held out whole
        assert not {prompt.ids for prompt in learned} & {prompt.ids for prompt in held}
    same = write(tmp_path / "same.jsonl", [{"prompt": "say", "answer": n} for n in range(20)])
    learned, held, warnings = read_prompts(config(PpoConfig, same, eval_prompts=3), base(), 40)
    assert (len(learned), len(held)) == (20, 3)
    assert any("only 1 different prompts: the 3 of the eval" in told for told in warnings)


@pytest.mark.parametrize("kind", [PpoConfig, RlooConfig, GrpoConfig])
def test_advice_names_the_limit_that_a_prompt_is_over(tmp_path: Path, kind: type[Any]) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x" * 60}] * 3)
    small = config(kind, path, max_prompt_length=8)
    with pytest.raises(DataError, match="more than 8 tokens; raise max_prompt_length"):
        read_prompts(small, base(128), prompt_room(small, base(128)))
    wide = config(kind, path, max_new_tokens=60)
    with pytest.raises(DataError, match="reads 64 tokens, of which max_new_tokens takes 60: lower"):
        read_prompts(wide, base(64), prompt_room(wide, base(64)))
    with pytest.raises(ConfigError, match="max_new_tokens is 60, but tiny reads 60 tokens"):
        prompt_room(wide, base(60))

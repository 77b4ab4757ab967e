"""Row types: which format keys speak of, and what a checked object becomes."""

from __future__ import annotations

from typing import Any

import pytest

from data.rows import (
    Chat,
    Format,
    Message,
    Preference,
    PromptCompletion,
    Reinforcement,
    Text,
    Unpaired,
    detect,
    fingerprint,
    to_row,
)

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}
OTHER = {"role": "assistant", "content": "no"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "a", "completion": "b"}, Format.PROMPT_COMPLETION),
        ({"prompt": "a"}, Format.PROMPT_COMPLETION),
        ({"prompt": "a", "completion": "b", "label": True}, Format.UNPAIRED),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Format.PREFERENCE),
        ({"input": {}, "preferred_output": []}, Format.PREFERENCE),
        ({"input": {}, "non_preferred_completion": []}, Format.PREFERENCE),
        ({"messages": [USER, ASSISTANT]}, Format.CHAT),
        ({"messages": [USER, ASSISTANT], "id": 1}, Format.CHAT),
        ({"messages": [USER]}, Format.CHAT),
        ({"messages": [USER], "answer": "4"}, Format.REINFORCEMENT),
        ({"text": "a"}, Format.TEXT),
        ({"label": True}, None),
        ({}, None),
    ],
)
def test_format_is_told_from_keys(row: dict[str, Any], format: Format | None) -> None:
    assert detect(row) == format


def test_openai_and_trl_preferences_become_the_same_row() -> None:
    expected = Preference(
        prompt=(Message("user", "hi"),),
        chosen=(Message("assistant", "yes"),),
        rejected=(Message("assistant", "no"),),
    )
    trl = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}
    openai = {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [OTHER],
    }
    older = {
        "input": {"messages": [USER]},
        "preferred_completion": [ASSISTANT],
        "non_preferred_completion": [OTHER],
    }
    rows = [to_row(row, Format.PREFERENCE) for row in (trl, openai, older)]
    assert rows == [expected] * 3
    assert len({fingerprint(row) for row in rows}) == 1


def test_text_parts_are_joined_and_unused_keys_left_out() -> None:
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    row = to_row(
        {"messages": [USER, {"role": "assistant", "content": parts, "mood": "good"}], "id": 4},
        Format.CHAT,
    )
    assert row == Chat(messages=(Message("user", "hi"), Message("assistant", "yes")))


def test_every_format_has_its_row() -> None:
    assert to_row({"prompt": "a", "completion": "b"}, Format.PROMPT_COMPLETION) == PromptCompletion(
        "a", "b"
    )
    unpaired = {"prompt": "a", "completion": "b", "label": 4, "labeler": "kim"}
    assert to_row(unpaired, Format.UNPAIRED) == Unpaired("a", "b", 4, "kim")
    assert to_row({"text": "a"}, Format.TEXT) == Text("a")
    graded = {"messages": [USER], "answer": {"value": 4}, "tools": [TOOL]}
    assert to_row(graded, Format.REINFORCEMENT) == Reinforcement(
        (Message("user", "hi"),), [TOOL], {"answer": {"value": 4}}
    )


def test_rows_with_tools_have_fingerprints() -> None:
    row = {"messages": [USER, ASSISTANT], "tools": [TOOL]}
    again = {"tools": [dict(reversed(TOOL.items()))], "messages": [USER, ASSISTANT]}
    without = {"messages": [USER, ASSISTANT]}
    first, second, third = (fingerprint(to_row(r, Format.CHAT)) for r in (row, again, without))
    assert first == second != third


def test_weight_zero_keeps_a_turn_out_of_training() -> None:
    assert Message("assistant", "a").trains
    assert Message("assistant", "a", weight=1).trains
    assert not Message("assistant", "a", weight=0).trains
    assert not Message("user", "a").trains

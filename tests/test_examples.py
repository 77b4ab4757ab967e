"""The datasets in `examples/` are what their README says, and a held-out row is really held out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.validate import validate

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.rglob("*.jsonl"))
SPLIT = ("support_intents", "product_blurbs")
ONES = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen",
)
TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")


def name(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower()))


def in_words(number: int) -> str:
    """A number below 1,000 as British English says it."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_is_valid_without_a_warning(path: Path) -> None:
    report = validate(path)
    assert report.ok, report.summary()
    assert not report.warnings, report.summary()


def test_the_readme_counts_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    told = dict(re.findall(r"^\| `(\S+\.jsonl)` \| (\d+) \|", text, re.MULTILINE))
    assert told == {name(path): str(len(rows(path))) for path in FILES}


@pytest.mark.parametrize("folder", SPLIT)
def test_no_held_out_prompt_resembles_a_training_prompt(folder: str) -> None:
    seen = [row["prompt"] for row in rows(EXAMPLES / folder / "train.jsonl")]
    held_out = [row["prompt"] for row in rows(EXAMPLES / folder / "test.jsonl")]
    everything = [prompt.casefold() for prompt in seen + held_out]
    assert len(set(everything)) == len(everything)
    assert max(len(prompt.split()) for prompt in everything) < 80
    if folder == "support_intents":  # the words of blurb prompts are mostly field names
        copies = [
            (ours, theirs)
            for ours in held_out
            for theirs in seen
            if len(words(ours) & words(theirs)) > 0.5 * len(words(ours) | words(theirs))
        ]
        assert copies == []


def test_intents_are_balanced_and_documented() -> None:
    folder = EXAMPLES / "support_intents"
    train, test = (
        Counter(row["completion"] for row in rows(folder / f"{half}.jsonl"))
        for half in ("train", "test")
    )
    assert set(train.values()) == {20}
    assert set(test.values()) == {5}
    assert train.keys() == test.keys()
    documented = re.findall(
        r"^\| `(\w+)` \|", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert documented == sorted(label.strip() for label in train)


def test_blurbs_follow_the_house_style() -> None:
    pattern = (
        r"name\[(.+?)\], type\[(.+?)\], material\[(.+?)\],(?: feature\[.+?\],)? price\[£(\d+)\]"
    )
    names: list[str] = []
    for half in ("train", "test"):
        for row in rows(EXAMPLES / "product_blurbs" / f"{half}.jsonl"):
            facts = re.fullmatch(pattern + "\n\nBlurb:", row["prompt"])
            assert facts, row["prompt"]
            product, kind, material, price = facts.groups()
            blurb = row["completion"]
            names.append(product)
            assert re.fullmatch(r" [A-Z][^.!?]+\.", blurb), blurb
            assert f", the {product} " in blurb, blurb
            assert words(kind) <= words(blurb), blurb
            assert words(material) <= words(blurb), blurb
            assert blurb.endswith(f" for {in_words(int(price))} pounds."), blurb
            assert not words(blurb) & {"you", "your", "best", "perfect", "ultimate"}, blurb
    assert len(set(names)) == len(names)


def test_the_assistant_signs_every_answer() -> None:
    conversations = [row["messages"] for row in rows(EXAMPLES / "chat_tone" / "train.jsonl")]
    assert len({messages[0]["content"] for messages in conversations}) == 1
    for messages in conversations:
        roles = [message["role"] for message in messages]
        assert roles == ["system"] + ["user", "assistant"] * (len(messages) // 2)
        for message in messages[2::2]:
            assert message["content"].endswith("\nFern")


def test_preferences_do_not_give_the_answer_away_by_length() -> None:
    pairs = rows(EXAMPLES / "preferences" / "train.jsonl")
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    assert len(pairs) / 4 <= longer <= len(pairs) * 3 / 4

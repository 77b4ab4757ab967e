"""The kinds of row that a dataset may hold, as typed, frozen and hashable values.

Field names are TRL's (`prompt`, `completion`, `messages`, `chosen`, `rejected`, `label`, `text`);
OpenAI's names for preference rows are accepted on the way in and turned into these. A prompt, a
completion and an answer are each a plain string or a conversation, which is a tuple of messages.
`to_row` turns a checked JSON object into its row; `data/checks.py` does the checking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import combinations, takewhile
from typing import Any, Literal

import msgspec

ROLES = ("system", "developer", "user", "assistant", "tool")
Role = Literal["system", "developer", "user", "assistant", "tool"]
TURN = re.compile(r"\n\nAssistant:")  # where an answer begins in a transcript
PREFERENCE_ALIASES = {
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
    "preferred_completion": "chosen",
    "non_preferred_completion": "rejected",
}


class Format(StrEnum):
    """The kind of all rows of a file."""

    PROMPT_COMPLETION = "prompt_completion"
    CHAT = "chat"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"
    TEXT = "text"
    REINFORCEMENT = "reinforcement"
    RANKING = "ranking"
    PROMPT_ONLY = "prompt_only"  # never told from a row's keys: a reader has to ask for it


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One turn of a conversation; `weight` 0 keeps an assistant turn out of the loss."""

    role: Role
    content: str | None = None
    weight: Literal[0, 1] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def trains(self) -> bool:
        """Whether this turn is one that the model learns to write."""
        return self.role == "assistant" and self.weight != 0


Messages = tuple[Message, ...]
Content = str | Messages
Tag = str | int | float
TAGS = ("labeler", "batch", "confidence")  # of comparisons


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What all row types share."""


class PromptCompletion(_Row, frozen=True):
    """A prompt (may be empty) and the completion to learn."""

    prompt: Content
    completion: Content


class Chat(_Row, frozen=True):
    """A conversation of which the assistant's turns are learned."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None


class Preference(_Row, frozen=True):
    """Two answers to one prompt, the better one first.

    `label_prob` is how probable it is that `chosen` is the better one: 0.5 is a tie, None is 1.
    `margin` is how much better it should score at least. Whose judgement it is, of which batch, and
    how sure, divides a reward model's report card.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    tools: list[dict[str, Any]] | None = None
    label_prob: float | None = None
    margin: float | None = None
    labeler: Tag | None = None
    batch: Tag | None = None
    confidence: Tag | None = None


class Ranking(_Row, frozen=True):
    """Two to nine answers to one prompt; `ranks` holds 1 for the best, equal numbers for ties."""

    prompt: Content
    completions: tuple[Content, ...]
    ranks: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    labeler: Tag | None = None
    batch: Tag | None = None
    confidence: Tag | None = None

    def pairs(self) -> list[Preference]:
        """Return every two answers as a preference; tied ones with `label_prob` 0.5."""
        found = []
        for first, second in combinations(range(len(self.ranks)), 2):
            better, worse = sorted((first, second), key=self.ranks.__getitem__)
            tied = self.ranks[better] == self.ranks[worse]
            chosen, rejected = self.completions[better], self.completions[worse]
            prob = 0.5 if tied else None
            tags = {name: getattr(self, name) for name in TAGS}
            found.append(Preference(self.prompt, chosen, rejected, self.tools, prob, **tags))
        return found


class Unpaired(_Row, frozen=True):
    """One judged answer: good or bad, or a rating of 1 (worst) to 5."""

    prompt: Content
    completion: Content
    label: bool | Literal[1, 2, 3, 4, 5]
    labeler: str | None = None


class Text(_Row, frozen=True):
    """Plain text, all of it learned."""

    text: str


class Reinforcement(_Row, frozen=True):
    """A conversation for the model to answer; a grader reads `fields` as `{{item.NAME}}`."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    fields: dict[str, Any] = {}


class PromptOnly(_Row, frozen=True):
    """A prompt for the model to answer; a grader reads `fields` as `{{item.NAME}}`."""

    prompt: Content
    fields: dict[str, Any] = {}


Row = PromptCompletion | Chat | Preference | Unpaired | Text | Reinforcement | Ranking | PromptOnly

ROW_TYPES: dict[Format, type[Row]] = {
    Format.PROMPT_COMPLETION: PromptCompletion,
    Format.CHAT: Chat,
    Format.PREFERENCE: Preference,
    Format.UNPAIRED: Unpaired,
    Format.TEXT: Text,
    Format.REINFORCEMENT: Reinforcement,
    Format.RANKING: Ranking,
    Format.PROMPT_ONLY: PromptOnly,
}


def detect(row: Mapping[str, Any]) -> Format | None:
    """Name the format that the keys of a JSON object speak of; None when no key is known."""
    if "messages" in row:
        return Format.REINFORCEMENT if _awaits_answer(row) else Format.CHAT
    if "completions" in row:
        return Format.RANKING
    if "chosen" in row or "rejected" in row or any(key in row for key in PREFERENCE_ALIASES):
        return Format.PREFERENCE
    if "prompt" in row and "completion" in row and "label" in row:
        return Format.UNPAIRED
    if "prompt" in row or "completion" in row:
        return Format.PROMPT_COMPLETION
    return Format.TEXT if "text" in row else None


def _awaits_answer(row: Mapping[str, Any]) -> bool:
    """A conversation with no assistant turn and with fields for a grader is for reinforcement."""
    messages = row["messages"]
    return (
        bool(row.keys() - {"messages", "tools"})
        and isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and m.get("role") != "assistant" for m in messages)
    )


def to_row(row: Mapping[str, Any], format: Format) -> Row:
    """Turn a JSON object that passed its checks into a typed row; unused keys are left out."""
    if format is Format.PREFERENCE:
        row = canonical_preference(row)
    row_type = ROW_TYPES[format]
    values: dict[str, Any] = {
        name: _plain(row[name]) if name in _CONTENT_KEYS else row[name]
        for name in row_type.__struct_fields__
        if row.get(name) is not None and name != "fields"
    }
    if format is Format.RANKING:
        values["completions"] = [_plain(completion) for completion in row["completions"]]
    if format in (Format.REINFORCEMENT, Format.PROMPT_ONLY):
        own = row_type.__struct_fields__
        values["fields"] = {k: v for k, v in row.items() if k not in own or k == "fields"}
    return msgspec.convert(values, row_type)


_CONTENT_KEYS = frozenset({"prompt", "completion", "messages", "chosen", "rejected"})


def _plain(value: Any) -> Any:
    """Reduce messages to the keys of `Message`, and their text parts to one string."""
    if not isinstance(value, list):
        return value
    return [
        {
            key: content_text(message[key]) if key == "content" else message[key]
            for key in Message.__struct_fields__
            if message.get(key) is not None
        }
        for message in value
    ]


def content_text(content: str | list[dict[str, Any]]) -> str:
    """Join the text parts of a message's content; a plain string is its own text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def canonical_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of OpenAI's preference rows to `prompt`, `chosen`, `rejected`, `tools`."""
    renamed = {PREFERENCE_ALIASES.get(key, key): value for key, value in row.items()}
    conversation = renamed.pop("input", None)
    if isinstance(conversation, dict):
        renamed.setdefault("prompt", conversation.get("messages"))
        renamed.setdefault("tools", conversation.get("tools"))
    return split_common_prompt(renamed)


def split_common_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Give a preference without a prompt the part that both answers begin with, as TRL does.

    Of conversations that is their first messages; of transcripts with turns such as
    "Assistant:", what comes before the last turn; of other texts, whole words.
    """
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if row.get("prompt") is not None or type(chosen) is not type(rejected):
        return row
    if isinstance(chosen, list):
        same = sum(
            1
            for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        )
        same = min(same, len(chosen) - 1, len(rejected) - 1)
    elif isinstance(chosen, str):
        same = _common_start(chosen, rejected)
    else:
        return row
    if same <= 0:
        return row
    return row | {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _num_common(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _common_start(first: str, second: str) -> int:
    same = _num_common(first, second)
    turns = [found.end() for found in TURN.finditer(first) if found.end() <= same]
    return turns[-1] if turns else first.rfind(" ", 0, same)


def fingerprint(row: Row) -> int:
    """A 64-bit hash of what the row says; equal rows agree within one process, not across."""
    try:
        return hash(row)
    except TypeError:  # tools and grader fields are lists and dicts
        return hash(msgspec.json.encode(row, order="sorted"))

"""What a row must hold, checked exactly: every finding names its key and says how to mend it.

`check_row` looks at one JSON object, already parsed, whose format is known. It is the slow and
complete reading; `data/parse.py` accepts most good rows by a faster one and comes here for the
rest. A key whose value is null counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data.check_parts import (
    Finding,
    Object,
    Path,
    check_filled,
    check_has_assistant,
    check_messages,
    check_tools,
    dotted,
    missing_key,
    role_of,
    show,
    wrong_end,
    wrong_type,
)
from data.rows import (
    PREFERENCE_ALIASES,
    ROLES,
    TAGS,
    Format,
    Message,
    split_common_prompt,
)

Extra = tuple[str, Path]  # an unused key: the name to tell, and where it is

KNOWN_KEYS: dict[Format, frozenset[str]] = {
    Format.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
    Format.CHAT: frozenset({"messages", "tools", "parallel_tool_calls"}),
    Format.PREFERENCE: frozenset(
        {"prompt", "chosen", "rejected", "tools", "input", "label_prob", "margin", *TAGS}
        | PREFERENCE_ALIASES.keys()
    ),
    Format.UNPAIRED: frozenset({"prompt", "completion", "label", "labeler"}),
    Format.TEXT: frozenset({"text"}),
    Format.RANKING: frozenset({"prompt", "completions", "ranks", "tools", *TAGS}),
}
MAX_RANKED = 9  # answers of one ranking
MESSAGE_KEYS = frozenset(Message.__struct_fields__)
_CONTENT_KEYS = ("prompt", "completion", "messages", "chosen", "rejected", *PREFERENCE_ALIASES)


def check_row(row: Object, format: Format) -> list[Finding]:
    """Everything wrong with a JSON object as a row of `format`; an empty list if it is good."""
    return list(_CHECKS[format](row))


def extra_keys(row: Object, format: Format) -> list[Extra]:
    """The keys that training would not use, each once."""
    if format not in KNOWN_KEYS:
        return []  # a grader may read any of them
    extras: dict[str, Path] = {key: (key,) for key in row if key not in KNOWN_KEYS[format]}
    for path, messages in _conversations(row):
        for index, message in enumerate(messages):
            if isinstance(message, dict) and not message.keys() <= MESSAGE_KEYS:
                for key in message.keys() - MESSAGE_KEYS:
                    extras.setdefault(f"{dotted(path)}[].{key}", (*path, index, key))
    return list(extras.items())


def _conversations(row: Object) -> Iterator[tuple[Path, list[Any]]]:
    for key in _CONTENT_KEYS:
        if isinstance(row.get(key), list):
            yield (key,), row[key]
    if isinstance(row.get("input"), dict) and isinstance(row["input"].get("messages"), list):
        yield ("input", "messages"), row["input"]["messages"]


def _check_prompt_completion(row: Object) -> Iterator[Finding]:
    prompt, completion = row.get("prompt"), row.get("completion")
    for key, value in (("prompt", prompt), ("completion", completion)):
        if value is None:
            yield missing_key(row, key)
        elif not isinstance(value, str | list):
            yield wrong_type(value, (key,), "a string or a list of messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from check_messages(prompt, ("prompt",))
        yield from check_messages(completion, ("completion",))
        yield from check_has_assistant(completion, ("completion",))
    elif isinstance(prompt, list) and isinstance(completion, str):
        yield wrong_type(completion, ("completion",), "a list of messages, as the prompt is one")
    elif isinstance(prompt, str) and isinstance(completion, list):
        yield wrong_type(completion, ("completion",), "a string, as the prompt is one")
    elif isinstance(completion, str):
        yield from check_filled(completion, ("completion",))


def _check_chat(row: Object) -> Iterator[Finding]:
    messages = row.get("messages")
    if messages is None:
        yield missing_key(row, "messages")
        return
    yield from check_tools(row.get("tools"), ("tools",))
    yield from check_messages(messages, ("messages",))
    yield from check_has_assistant(messages, ("messages",))


def _check_preference(row: Object) -> Iterator[Finding]:
    for number_key, low, high in (("label_prob", 0.0, 1.0), ("margin", 0.0, 1e6)):
        value = row.get(number_key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high):
            yield wrong_type(value, (number_key,), f"a number from {low:g} to {high:g}")
    yield from _check_tags(row)
    row = split_common_prompt(dict(row)) if "input" not in row else row
    given = {name: (alias,) for alias, name in PREFERENCE_ALIASES.items() if alias in row}
    paths: dict[str, Path] = {"prompt": ("prompt",), "chosen": ("chosen",)}
    paths |= {"rejected": ("rejected",), **given}
    values: dict[str, Any] = {name: row.get(str(path[0])) for name, path in paths.items()}
    conversation = row.get("input")
    if conversation is not None:
        paths["prompt"] = ("input", "messages")
        if not isinstance(conversation, dict):
            yield wrong_type(conversation, ("input",), 'an object with "messages"')
            return
        values["prompt"] = conversation.get("messages")
    for name, value in values.items():
        if value is None:
            parent: Object = row if len(paths[name]) == 1 else row["input"]
            key = (
                "input" if name == "prompt" and given and conversation is None else paths[name][-1]
            )
            yield missing_key(parent, str(key), paths[name][:-1])
    yield from check_tools(row.get("tools"), ("tools",))
    if None in values.values():
        return
    if all(isinstance(value, list) for value in values.values()):
        yield from _check_preference_messages(values, paths, single=bool(given))
    elif all(isinstance(value, str) for value in values.values()):
        for name in ("chosen", "rejected"):
            yield from check_filled(values[name], paths[name])
    else:
        odd = next(name for name in values if not isinstance(values[name], str))
        expected = "a string, as other parts of the row are; or let all be lists of messages"
        yield wrong_type(values[odd], paths[odd], expected)
        return
    if values["chosen"] == values["rejected"]:
        yield Finding(
            "identical_outputs",
            f'"{dotted(paths["chosen"])}" and "{dotted(paths["rejected"])}" are the same',
            "Remove the row, or give two different answers.",
            paths["rejected"],
        )


def _check_tags(row: Object) -> Iterator[Finding]:
    for name in TAGS:
        value = row.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, str | float | int)
        ):
            yield wrong_type(value, (name,), "a string or a number")


def _check_ranking(row: Object) -> Iterator[Finding]:
    yield from _check_tags(row)
    prompt, answers, ranks = row.get("prompt"), row.get("completions"), row.get("ranks")
    for key in ("prompt", "completions", "ranks"):
        if row.get(key) is None:
            yield missing_key(row, key)
    if prompt is None or answers is None or ranks is None:
        return
    if not (isinstance(answers, list) and 2 <= len(answers) <= MAX_RANKED):
        yield wrong_type(answers, ("completions",), f"a list of 2 to {MAX_RANKED} answers")
        return
    good = isinstance(ranks, list) and all(type(rank) is int and rank >= 1 for rank in ranks)
    if not good or len(ranks) != len(answers):
        expected = f"{len(answers)} whole numbers, 1 for the best completion, equal ones for ties"
        yield wrong_type(ranks, ("ranks",), expected)
        return
    for index, answer in enumerate(answers):
        for finding in _check_prompt_completion({"prompt": prompt, "completion": answer}):
            path = finding.path
            if path[:1] == ("completion",):
                path = ("completions", index, *path[1:])
            elif index:
                continue  # the prompt's faults, told with the first answer
            yield finding._replace(path=path)
    first: dict[str, int] = {}
    for index, answer in enumerate(answers):
        earlier = first.setdefault(json.dumps(answer, sort_keys=True), index)
        if earlier != index:
            yield Finding(
                "identical_outputs",
                f'"completions[{earlier}]" and "completions[{index}]" are the same',
                "Remove one of them, and its rank.",
                ("completions", index),
            )


def _check_prompt_only(row: Object) -> Iterator[Finding]:
    prompt = row.get("prompt")
    if prompt is None:
        yield missing_key(row, "prompt")
    elif isinstance(prompt, list):
        yield from check_messages(prompt, ("prompt",))
        if prompt and role_of(prompt, -1) == "assistant":
            yield wrong_end(prompt, ("prompt",), "the prompt ends before the answer")
    elif not isinstance(prompt, str):
        yield wrong_type(prompt, ("prompt",), "a string or a list of messages")


def _check_preference_messages(
    values: Mapping[str, Any], paths: Mapping[str, Path], single: bool
) -> Iterator[Finding]:
    for name, messages in values.items():
        yield from check_messages(messages, paths[name])
    if role_of(values["prompt"], -1) == "assistant":
        yield wrong_end(values["prompt"], paths["prompt"], "the prompt ends before the answer")
    for name in ("chosen", "rejected"):
        if single and len(values[name]) > 1:
            yield wrong_type(values[name], paths[name], "a list of exactly one assistant message")
        elif role_of(values[name], -1) in ROLES and role_of(values[name], -1) != "assistant":
            yield wrong_end(values[name], paths[name], "an answer ends with the assistant")


def _check_unpaired(row: Object) -> Iterator[Finding]:
    yield from _check_prompt_completion(row)
    label = row.get("label")
    if label is None:
        yield missing_key(row, "label")
    elif not (isinstance(label, bool) or (type(label) is int and 1 <= label <= 5)):
        yield Finding(
            "invalid_label",
            f'"label" is {show(label)}; expected true, false or a whole number from 1 to 5',
            "Use true for a good answer and false for a bad one, or a rating where 5 is best.",
            ("label",),
        )
    labeler = row.get("labeler")
    if labeler is not None and not isinstance(labeler, str):
        yield wrong_type(labeler, ("labeler",), "a string")


def _check_text(row: Object) -> Iterator[Finding]:
    text = row.get("text")
    if text is None:
        yield missing_key(row, "text")
    elif not isinstance(text, str):
        yield wrong_type(text, ("text",), "a string")
    else:
        yield from check_filled(text, ("text",))


def _check_reinforcement(row: Object) -> Iterator[Finding]:
    messages = row.get("messages")
    if messages is None:
        yield missing_key(row, "messages")
        return
    yield from check_tools(row.get("tools"), ("tools",))
    yield from check_messages(messages, ("messages",))
    if isinstance(messages, list) and role_of(messages, -1) in ("assistant", "system"):
        yield wrong_end(messages, ("messages",), "the model answers a user")


_CHECKS: dict[Format, Callable[[Object], Iterator[Finding]]] = {
    Format.PROMPT_COMPLETION: _check_prompt_completion,
    Format.CHAT: _check_chat,
    Format.PREFERENCE: _check_preference,
    Format.UNPAIRED: _check_unpaired,
    Format.TEXT: _check_text,
    Format.REINFORCEMENT: _check_reinforcement,
    Format.RANKING: _check_ranking,
    Format.PROMPT_ONLY: _check_prompt_only,
}

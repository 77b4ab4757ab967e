"""What a row must hold, checked exactly: every finding names its key and says how to mend it.

`check_row` looks at one JSON object, already parsed, whose format is known. It is the slow and
complete reading; `data/parse.py` accepts most good rows by a faster one and comes here for the
rest. A key whose value is null counts as absent.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from data.rows import PREFERENCE_ALIASES, ROLES, Format, Message, content_text

Path = tuple[str | int, ...]
Extra = tuple[str, Path]  # an unused key: the name to tell, and where it is
Object = Mapping[str, Any]

KNOWN_KEYS: dict[Format, frozenset[str]] = {
    Format.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
    Format.CHAT: frozenset({"messages", "tools", "parallel_tool_calls"}),
    Format.PREFERENCE: frozenset(
        {"prompt", "chosen", "rejected", "tools", "input", *PREFERENCE_ALIASES}
    ),
    Format.UNPAIRED: frozenset({"prompt", "completion", "label", "labeler"}),
    Format.TEXT: frozenset({"text"}),
}
MESSAGE_KEYS = frozenset(Message.__struct_fields__)
_CONTENT_KEYS = ("prompt", "completion", "messages", "chosen", "rejected", *PREFERENCE_ALIASES)


class Finding(NamedTuple):
    """Something wrong in one row, at `path`, or at `column` where no path can be told."""

    code: str
    message: str
    fix: str
    path: Path = ()
    column: int | None = None


def check_row(row: Object, format: Format) -> list[Finding]:
    """Everything wrong with a JSON object as a row of `format`; an empty list if it is good."""
    return list(_CHECKS[format](row))


def extra_keys(row: Object, format: Format) -> list[Extra]:
    """The keys that training would not use, each once."""
    if format is Format.REINFORCEMENT:
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


def dotted(path: Path) -> str:
    """Write a path as a person would: `messages[2].role`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def show(value: Any) -> str:
    """A value as short JSON, for messages."""
    text = json.dumps(value[:60] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def missing_key(row: Object, key: str, path: Path = ()) -> Finding:
    """A finding for an absent key, which names a present one that was probably meant."""
    where = f'"{dotted(path)}"' if path else "the row"
    names = tuple(name[:40] for name in islice(row, 8))
    message = f'"{key}" is missing from {where}; its keys are: {", ".join(names) or "none"}'
    return Finding("missing_key", message, _fix_missing(key, names), path)


@lru_cache(maxsize=256)  # a wrong name is usually wrong on every line
def _fix_missing(key: str, names: tuple[str, ...]) -> str:
    near = [name for name in names if name.lower().strip() == key]
    near = near or difflib.get_close_matches(key, names, n=1)
    return f'Rename "{near[0]}" to "{key}".' if near else f'Add "{key}".'


def _wrong_type(value: Any, path: Path, expected: str) -> Finding:
    return Finding(
        "invalid_type",
        f'"{dotted(path)}" is {show(value)}; expected {expected}',
        f"Write {expected} here.",
        path,
    )


def _check_prompt_completion(row: Object) -> Iterator[Finding]:
    prompt, completion = row.get("prompt"), row.get("completion")
    for key, value in (("prompt", prompt), ("completion", completion)):
        if value is None:
            yield missing_key(row, key)
        elif not isinstance(value, str | list):
            yield _wrong_type(value, (key,), "a string or a list of messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from _check_messages(prompt, ("prompt",))
        yield from _check_messages(completion, ("completion",))
        yield from _check_has_assistant(completion, ("completion",))
    elif isinstance(prompt, list) and isinstance(completion, str):
        yield _wrong_type(completion, ("completion",), "a list of messages, as the prompt is one")
    elif isinstance(prompt, str) and isinstance(completion, list):
        yield _wrong_type(completion, ("completion",), "a string, as the prompt is one")
    elif isinstance(completion, str):
        yield from _check_filled(completion, ("completion",))


def _check_chat(row: Object) -> Iterator[Finding]:
    messages = row.get("messages")
    if messages is None:
        yield missing_key(row, "messages")
        return
    yield from _check_tools(row.get("tools"), ("tools",))
    yield from _check_messages(messages, ("messages",))
    yield from _check_has_assistant(messages, ("messages",))


def _check_preference(row: Object) -> Iterator[Finding]:
    given = {name: (alias,) for alias, name in PREFERENCE_ALIASES.items() if alias in row}
    paths: dict[str, Path] = {"prompt": ("prompt",), "chosen": ("chosen",)}
    paths |= {"rejected": ("rejected",), **given}
    values: dict[str, Any] = {name: row.get(str(path[0])) for name, path in paths.items()}
    conversation = row.get("input")
    if conversation is not None:
        paths["prompt"] = ("input", "messages")
        if not isinstance(conversation, dict):
            yield _wrong_type(conversation, ("input",), 'an object with "messages"')
            return
        values["prompt"] = conversation.get("messages")
    for name, value in values.items():
        if value is None:
            parent: Object = row if len(paths[name]) == 1 else row["input"]
            key = (
                "input" if name == "prompt" and given and conversation is None else paths[name][-1]
            )
            yield missing_key(parent, str(key), paths[name][:-1])
    yield from _check_tools(row.get("tools"), ("tools",))
    if None in values.values():
        return
    if all(isinstance(value, list) for value in values.values()):
        yield from _check_preference_messages(values, paths, single=bool(given))
    elif all(isinstance(value, str) for value in values.values()):
        for name in ("chosen", "rejected"):
            yield from _check_filled(values[name], paths[name])
    else:
        odd = next(name for name in values if not isinstance(values[name], str))
        expected = "a string, as other parts of the row are; or let all be lists of messages"
        yield _wrong_type(values[odd], paths[odd], expected)
        return
    if values["chosen"] == values["rejected"]:
        yield Finding(
            "identical_outputs",
            f'"{dotted(paths["chosen"])}" and "{dotted(paths["rejected"])}" are the same',
            "Remove the row, or give two different answers.",
            paths["rejected"],
        )


def _check_preference_messages(
    values: Mapping[str, Any], paths: Mapping[str, Path], single: bool
) -> Iterator[Finding]:
    for name, messages in values.items():
        yield from _check_messages(messages, paths[name])
    if _role(values["prompt"], -1) == "assistant":
        yield _wrong_end(values["prompt"], paths["prompt"], "the prompt ends before the answer")
    for name in ("chosen", "rejected"):
        if single and len(values[name]) > 1:
            yield _wrong_type(values[name], paths[name], "a list of exactly one assistant message")
        elif _role(values[name], -1) in ROLES and _role(values[name], -1) != "assistant":
            yield _wrong_end(values[name], paths[name], "an answer ends with the assistant")


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
        yield _wrong_type(labeler, ("labeler",), "a string")


def _check_text(row: Object) -> Iterator[Finding]:
    text = row.get("text")
    if text is None:
        yield missing_key(row, "text")
    elif not isinstance(text, str):
        yield _wrong_type(text, ("text",), "a string")
    else:
        yield from _check_filled(text, ("text",))


def _check_reinforcement(row: Object) -> Iterator[Finding]:
    messages = row.get("messages")
    if messages is None:
        yield missing_key(row, "messages")
        return
    yield from _check_tools(row.get("tools"), ("tools",))
    yield from _check_messages(messages, ("messages",))
    if isinstance(messages, list) and _role(messages, -1) in ("assistant", "system"):
        yield _wrong_end(messages, ("messages",), "the model answers a user")


def _check_filled(text: str, path: Path) -> Iterator[Finding]:
    if is_blank(text):
        yield Finding(
            "empty_completion",
            f'"{dotted(path)}" is {"empty" if not text else "only white space"}',
            "Write what the model should answer, or remove the row.",
            path,
        )


def _check_messages(messages: Any, path: Path) -> Iterator[Finding]:
    if not isinstance(messages, list) or not messages:
        yield _wrong_type(messages, path, "a list of at least one message")
        return
    for index, message in enumerate(messages):
        here = (*path, index)
        if isinstance(message, dict):
            yield from _check_message(message, here)
        else:
            yield _wrong_type(message, here, 'an object with "role" and "content"')


def _check_message(message: Object, path: Path) -> Iterator[Finding]:
    role, weight = message.get("role"), message.get("weight")
    if role is None:
        yield missing_key(message, "role", path)
    elif role not in ROLES:
        here = (*path, "role")
        expected = f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
        yield Finding(
            "invalid_role",
            f'"{dotted(here)}" is {show(role)}; expected {expected}',
            'Use "assistant" for what the model writes and "user" for what it reads.',
            here,
        )
    if weight is not None and not (type(weight) is int and weight in (0, 1)):
        here = (*path, "weight")
        yield Finding(
            "invalid_weight",
            f'"{dotted(here)}" is {show(weight)}; expected 0 or 1',
            "Use 0 to leave the turn out of the loss; leave the key out to learn it.",
            here,
        )
    yield from _check_tools(message.get("tool_calls"), (*path, "tool_calls"))
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None and not isinstance(message[key], str):
            yield _wrong_type(message[key], (*path, key), "a string")
    yield from _check_content(message, path)


def _check_content(message: Object, path: Path) -> Iterator[Finding]:
    content, here = message.get("content"), (*path, "content")
    if content is None:
        if not (message.get("role") == "assistant" and message.get("tool_calls")):
            yield missing_key(message, "content", path)
        return
    if isinstance(content, list):
        bad = next((i for i, part in enumerate(content) if not _is_text_part(part)), None)
        if bad is not None:
            yield _wrong_type(content[bad], (*here, bad), 'a part {"type": "text", "text": "..."}')
            return
    elif not isinstance(content, str):
        yield _wrong_type(content, here, "a string or a list of text parts")
        return
    learned = message.get("role") == "assistant" and message.get("weight") != 0
    if learned and not message.get("tool_calls"):
        yield from _check_filled(content_text(content), here)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _check_tools(tools: Any, path: Path) -> Iterator[Finding]:
    good = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not good:
        yield _wrong_type(tools, path, "a list of objects")


def _check_has_assistant(messages: Any, path: Path) -> Iterator[Finding]:
    whole = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not whole or not messages:  # told already
        return
    if any(m.get("role") == "assistant" and m.get("weight") != 0 for m in messages):
        return
    if all(m.get("role") in ROLES for m in messages):  # else the wrong role is the news
        yield Finding(
            "no_assistant_message",
            f'"{dotted(path)}" has no assistant message with a weight other than 0',
            "Add the answer that the model should learn as an assistant message.",
            path,
        )


def _role(messages: list[Any], index: int) -> Any:
    return messages[index].get("role") if messages and isinstance(messages[index], dict) else None


def _wrong_end(messages: list[Any], path: Path, rule: str) -> Finding:
    here = (*path, len(messages) - 1, "role")
    return Finding(
        "invalid_role",
        f'"{dotted(here)}" is {show(_role(messages, -1))}; {rule}',
        "Remove the last message, or add the one that is missing after it.",
        here,
    )


_CHECKS: dict[Format, Callable[[Object], Iterator[Finding]]] = {
    Format.PROMPT_COMPLETION: _check_prompt_completion,
    Format.CHAT: _check_chat,
    Format.PREFERENCE: _check_preference,
    Format.UNPAIRED: _check_unpaired,
    Format.TEXT: _check_text,
    Format.REINFORCEMENT: _check_reinforcement,
}

"""What the checks of rows are put together from: findings, and what texts and messages must be."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from data.rows import ROLES, content_text

Path = tuple[str | int, ...]
Object = Mapping[str, Any]


class Finding(NamedTuple):
    """Something wrong in one row, at `path`, or at `column` where no path can be told."""

    code: str
    message: str
    fix: str
    path: Path = ()
    column: int | None = None


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


def wrong_type(value: Any, path: Path, expected: str) -> Finding:
    return Finding(
        "invalid_type",
        f'"{dotted(path)}" is {show(value)}; expected {expected}',
        f"Write {expected} here.",
        path,
    )


def check_filled(text: str, path: Path) -> Iterator[Finding]:
    if is_blank(text):
        yield Finding(
            "empty_completion",
            f'"{dotted(path)}" is {"empty" if not text else "only white space"}',
            "Write what the model should answer, or remove the row.",
            path,
        )


def check_messages(messages: Any, path: Path) -> Iterator[Finding]:
    if not isinstance(messages, list) or not messages:
        yield wrong_type(messages, path, "a list of at least one message")
        return
    for index, message in enumerate(messages):
        here = (*path, index)
        if isinstance(message, dict):
            yield from _check_message(message, here)
        else:
            yield wrong_type(message, here, 'an object with "role" and "content"')


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
    yield from check_tools(message.get("tool_calls"), (*path, "tool_calls"))
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None and not isinstance(message[key], str):
            yield wrong_type(message[key], (*path, key), "a string")
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
            yield wrong_type(content[bad], (*here, bad), 'a part {"type": "text", "text": "..."}')
            return
    elif not isinstance(content, str):
        yield wrong_type(content, here, "a string or a list of text parts")
        return
    learned = message.get("role") == "assistant" and message.get("weight") != 0
    if learned and not message.get("tool_calls"):
        yield from check_filled(content_text(content), here)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def check_tools(tools: Any, path: Path) -> Iterator[Finding]:
    good = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    if tools is not None and not good:
        yield wrong_type(tools, path, "a list of objects")


def check_has_assistant(messages: Any, path: Path) -> Iterator[Finding]:
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


def role_of(messages: list[Any], index: int) -> Any:
    return messages[index].get("role") if messages and isinstance(messages[index], dict) else None


def wrong_end(messages: list[Any], path: Path, rule: str) -> Finding:
    here = (*path, len(messages) - 1, "role")
    return Finding(
        "invalid_role",
        f'"{dotted(here)}" is {show(role_of(messages, -1))}; {rule}',
        "Remove the last message, or add the one that is missing after it.",
        here,
    )

"""Rows to token ids and labels: exactly what a model sees, and what it learns from.

Prompt and completion are tokenized separately, because serving tokenizes the prompt alone: training
then sees the very ids that a request will bring. The loss falls on the completion and the EOS that
ends it, so that tuned completions stop. In a conversation it falls on the assistant's turns with
the template's end-of-turn. Masks are carried from here on and never inferred from ids: in some
tokenizers the padding token is EOS. The tokenizer is passed in; this module imports no model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from data.errors import DataError, InvalidInput
from data.rows import Chat, Message, PromptCompletion, Row, Text

IGNORED = -100  # the label of a position without loss


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered row: `input_ids` [T] and `labels` [T], IGNORED where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """The number of positions with loss."""
        return sum(label != IGNORED for label in self.labels)


def render(tokenizer: Any, row: Row) -> Example:
    """Render one row of a format that supervised fine-tuning takes.

    Raises:
        DataError: The row is of another format, or the chat template cannot render it.
        InvalidInput: The tokenizer has no EOS token or no chat template.
    """
    if isinstance(row, PromptCompletion):
        if isinstance(row.prompt, str) and isinstance(row.completion, str):
            return _render_pair(tokenizer, row.prompt, row.completion)
        return _render_chat(tokenizer, _as_messages(row), None, _turns(row.completion))
    if isinstance(row, Chat):
        return _render_chat(tokenizer, row.messages, row.tools)
    if isinstance(row, Text):
        return _render_pair(tokenizer, "", row.text)  # learned from its first token on
    raise DataError(
        f"Supervised fine-tuning takes prompt/completion, chat or text rows, not "
        f"{type(row).__name__}; preference and feedback rows are for other methods",
        code="wrong_format",
    )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenize a prompt as the server does; an empty one becomes the document's first token."""
    ids = _special(tokenizer, prompt)
    if not ids:
        start = tokenizer.bos_token_id
        ids = [_end_id(tokenizer) if start is None else start]
    return ids


def question(tokenizer: Any, row: Row) -> tuple[list[int], str]:
    """Return the prompt that the server would be sent for a row, as ids, and the right answer.

    Of a conversation that is its last learned turn.

    Raises:
        DataError: The row has no answer, or the chat template cannot render it.
        InvalidInput: The tokenizer has no chat template.
    """
    if not isinstance(row, PromptCompletion | Chat):
        raise DataError(
            f"A row of type {type(row).__name__} asks nothing that has a right answer; give "
            f"prompt/completion or chat rows",
            code="wrong_format",
        )
    if isinstance(row, Chat):
        messages, tools = row.messages, row.tools
    elif isinstance(row.prompt, str) and isinstance(row.completion, str):
        return prompt_ids(tokenizer, row.prompt), row.completion
    else:
        messages, tools = _as_messages(row), None
    last = max((i for i, message in enumerate(messages) if message.trains), default=0)
    plain = [_as_dict(message) for message in messages[:last]]
    if not plain:
        raise DataError("No message asks for the assistant's answer", code="no_prompt")
    return _template(tokenizer, plain, tools, True), messages[last].content or ""


def truncate(example: Example, max_length: int) -> Example:
    """Cut a row to `max_length` tokens where it hurts least.

    The front of the prompt goes first, as what stands next to the completion matters most; the
    first token stays, as it may be BOS. A completion that is too long by itself loses its middle,
    and keeps its start and its end, so that EOS is always learned.
    """
    if len(example) <= max_length:
        return example
    first = next((i for i, label in enumerate(example.labels) if label != IGNORED), 0)
    excess = len(example) - max_length
    if excess < first:
        keep = [0, *range(1 + excess, len(example))]
    else:
        start = max(0, first - 1)  # one token of context: the first label needs a position before
        keep = [*range(start, start + max_length - 1), len(example) - 1]
    return Example(
        tuple(example.input_ids[i] for i in keep), tuple(example.labels[i] for i in keep)
    )


def _render_pair(tokenizer: Any, prompt: str, completion: str) -> Example:
    return _with_end(tokenizer, prompt_ids(tokenizer, prompt), _continuation(tokenizer, completion))


def _with_end(tokenizer: Any, context: Sequence[int], learned: Sequence[int]) -> Example:
    learned = [*learned, _end_id(tokenizer)]
    return Example((*context, *learned), (*[IGNORED] * len(context), *learned))


def _render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    num_answers: int | None = None,
) -> Example:
    """Render turn by turn: what each assistant's turn adds to its generation prompt is learned.

    `num_answers` limits that to the last turns, those of a completion; None means all.
    """
    num_answers = len(messages) if num_answers is None else num_answers
    plain = [_as_dict(message) for message in messages]
    ids = _template(tokenizer, plain, tools)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if not message.trains or index < len(messages) - num_answers:
            continue
        if index == 0:
            raise DataError(
                "The conversation starts with an assistant's turn, which answers nothing; put a "
                "user's or system's message before it, or give it weight 0",
                code="no_prompt",
            )
        before = _template(tokenizer, plain[:index], tools, add_generation_prompt=True)
        after = _template(tokenizer, plain[: index + 1], tools)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"The chat template renders messages[{index}] differently when more messages "
                "follow, so its loss cannot be placed; give the base model another chat_template",
                code="chat_template_not_prefix",
            )
        end = _end_of_turn(tokenizer, after, len(before))
        labels[len(before) : end] = ids[len(before) : end]
    return Example(tuple(ids), tuple(labels))


def _end_of_turn(tokenizer: Any, ids: Sequence[int], start: int) -> int:
    """Return where a turn's loss ends: after its last EOS, or at the end if the turn has none."""
    end = tokenizer.eos_token_id
    last = max((i for i in range(start, len(ids)) if ids[i] == end), default=None)
    return len(ids) if last is None else last + 1


def _template(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool = False,
) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidInput(
            "The base model's tokenizer has no chat template, so chat rows cannot be rendered; "
            "use prompt/completion rows, or set chat_template in the model's YAML",
            code="chat_template_missing",
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(
            f"The base model's chat template refuses the messages: {error}",
            code="chat_template_refused",
        ) from error
    return _plain(tokenizer, text)


def _as_dict(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    values: dict[str, Any] = {"role": role, "content": message.content or ""}
    for name in ("name", "tool_calls", "tool_call_id"):
        if getattr(message, name) is not None:
            values[name] = getattr(message, name)
    return values


def _as_messages(row: PromptCompletion) -> tuple[Message, ...]:
    prompt = (Message("user", row.prompt),) if isinstance(row.prompt, str) else row.prompt
    answer = row.completion
    return (*prompt, *((Message("assistant", answer),) if isinstance(answer, str) else answer))


def _turns(content: str | tuple[Message, ...]) -> int:
    return 1 if isinstance(content, str) else len(content)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text that follows other text.

    Tokenizers of the SentencePiece kind put a space before any text they are given; a character
    set before it, and cut off again, takes that space, so a completion gains none.
    """
    if tokenizer.decode([*_plain(tokenizer, "a"), *_plain(tokenizer, "b")]) == "ab":
        return _plain(tokenizer, text)
    return _plain(tokenizer, "\n" + text)[len(_plain(tokenizer, "\n")) :]


def _special(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and _plain(tokenizer, text)[-1:] != ids[-1:]:
        ids.pop()  # a tokenizer that ends texts: a prompt must stay open
    return ids


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InvalidInput(
            "The base model's tokenizer has no EOS token, so completions could not learn to stop; "
            "set eos_tokens in the model's YAML",
            code="eos_token_missing",
        )
    return int(tokenizer.eos_token_id)

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
from functools import lru_cache
from typing import Any

import jinja2

from data.errors import DataError, InvalidInput
from data.rows import Chat, Content, Message, PromptCompletion, Row, Text

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


def render_pairs(tokenizer: Any, rows: Sequence[Row]) -> list[Example] | None:
    """Render rows as `render` does, tokenized together, which is many times faster.

    None where some row is a conversation, which is rendered by itself.

    Raises:
        InvalidInput: The tokenizer has no EOS token.
    """
    texts = []
    for row in rows:
        if isinstance(row, Text):
            texts.append(("", row.text))
        elif (
            isinstance(row, PromptCompletion)
            and isinstance(row.prompt, str)
            and isinstance(row.completion, str)
        ):
            texts.append((row.prompt, row.completion))
        else:
            return None
    if not texts:
        return []
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    lead = "\n" if _adds_space(tokenizer) else ""
    cut = len(_plain(tokenizer, lead)) if lead else 0
    answers = tokenizer([lead + answer for _, answer in texts], add_special_tokens=False)
    end, start = _end_id(tokenizer), _start_id(tokenizer)
    return [
        _pair(_open_prompt(tokenizer, prompt, ids, end) or [start], answer[cut:], end)
        for (prompt, _), ids, answer in zip(texts, prompts, answers["input_ids"], strict=True)
    ]


def render_answer(
    tokenizer: Any, prompt: Content, answer: Content, tools: list[dict[str, Any]] | None = None
) -> Example:
    """Render an answer to a prompt as it is trained and served; its labels are the answer's ids.

    Raises:
        DataError: The chat template cannot render it.
        InvalidInput: The tokenizer has no EOS token or no chat template.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return _render_pair(tokenizer, prompt, answer)
    row = PromptCompletion(prompt, answer)
    return _render_chat(tokenizer, _as_messages(row), tools, _turns(answer))


def render_prompt(
    tokenizer: Any, prompt: Content, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Render a prompt as the server reads it: text as it is, messages up to the answer's start.

    Raises:
        DataError: The chat template cannot render it.
        InvalidInput: The tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt)
    plain = [_as_dict(message) for message in prompt]
    return _plain(tokenizer, _template(tokenizer, plain, tools, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenize a prompt as the server does; an empty one becomes the document's first token."""
    ids = list(tokenizer(prompt)["input_ids"])
    return _open_prompt(tokenizer, prompt, ids, tokenizer.eos_token_id) or [_start_id(tokenizer)]


def _open_prompt(tokenizer: Any, prompt: str, ids: list[int], end: int | None) -> list[int]:
    """Return a prompt's ids without an end that the tokenizer added: a prompt must stay open."""
    if ids and ids[-1] == end and _plain(tokenizer, prompt)[-1:] != ids[-1:]:
        ids.pop()
    return ids


def _start_id(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id
    return _end_id(tokenizer) if start is None else int(start)


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
    prompt = _template(tokenizer, plain, tools, add_generation_prompt=True)
    return _plain(tokenizer, prompt), messages[last].content or ""


def truncate(example: Example, max_length: int) -> Example:
    """Cut a row to `max_length` tokens where it hurts least.

    What stands next to the last answer matters most, so the front goes first: of the prompt, or of
    a conversation's older turns. The very first token stays, as it may be BOS. A last answer that
    is too long by itself loses its end, save the EOS after it, which is always learned.
    """
    if len(example) <= max_length:
        return example
    excess = len(example) - max_length
    start = max(i for i, label in enumerate(example.labels) if label == IGNORED or i == 0) + 1
    if excess < start:
        keep = [0, *range(1 + excess, len(example))]
    else:  # one token of context: the first label needs a position before it
        keep = [*range(start - 1, start - 2 + max_length), len(example) - 1]
    return Example(
        tuple(example.input_ids[i] for i in keep), tuple(example.labels[i] for i in keep)
    )


def _render_pair(tokenizer: Any, prompt: str, completion: str) -> Example:
    return _with_end(tokenizer, prompt_ids(tokenizer, prompt), continuation(tokenizer, completion))


def _with_end(tokenizer: Any, context: Sequence[int], learned: Sequence[int]) -> Example:
    return _pair(context, learned, _end_id(tokenizer))


def _pair(context: Sequence[int], learned: Sequence[int], end: int) -> Example:
    learned = [*learned, end]
    return Example((*context, *learned), (*[IGNORED] * len(context), *learned))


def _render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    num_answers: int | None = None,
) -> Example:
    """Render turn by turn: what each assistant's turn adds to its generation prompt is learned.

    `num_answers` limits that to the last turns, those of a completion; None means all. What follows
    the last learned token is left out, as it would teach nothing.
    """
    eos = _end_id(tokenizer)
    first = 0 if num_answers is None else len(messages) - num_answers
    plain = [_as_dict(message) for message in messages]
    full = _template(tokenizer, plain, tools)
    ids: list[int] = []
    labels: list[int] = []
    length, done = 0, 0  # length: up to the last learned token; done: characters of `full`
    for index, message in enumerate(messages):
        if not message.trains or index < first:
            continue
        if index == 0:
            raise DataError(
                "The conversation starts with an assistant's turn, which answers nothing; put a "
                "user's or system's message before it, or give it weight 0",
                code="no_prompt",
            )
        before = _template(tokenizer, plain[:index], tools, add_generation_prompt=True)
        after = _template(tokenizer, plain[: index + 1], tools)
        if not (full.startswith(after) and after.startswith(before) and done <= len(before)):
            raise DataError(
                f"The chat template renders messages[{index}] differently when more messages "
                'follow, so its loss cannot be placed; learn one answer a row ("weight": 0 for the '
                "assistant's earlier turns), or give the base model another chat_template",
                code="chat_template_not_prefix",
            )
        context = _part(tokenizer, full[done : len(before)], is_first=done == 0)
        turn = _part(tokenizer, full[len(before) : len(after)])
        end = _end_of_turn(eos, turn)
        ids += [*context, *turn]
        labels += [*[IGNORED] * len(context), *turn[:end], *[IGNORED] * (len(turn) - end)]
        length, done = len(ids) - len(turn) + end, len(after)
    if not length:
        raise DataError(
            "No message of the assistant is to be learned; give one without weight 0",
            code="no_assistant_message",
        )
    return Example(tuple(ids[:length]), tuple(labels[:length]))


def _part(tokenizer: Any, text: str, is_first: bool = False) -> list[int]:
    """Tokenize a part of a rendered conversation, cut where serving cuts prompt from answer."""
    return _plain(tokenizer, text) if is_first else continuation(tokenizer, text)


def _end_of_turn(eos: int, turn: Sequence[int]) -> int:
    """Return where a turn's loss ends: after its last EOS, or at its end if it has none."""
    ends = [index for index, token in enumerate(turn) if token == eos]
    return ends[-1] + 1 if ends else len(turn)


def _template(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool = False,
) -> str:
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
    return str(text)


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


def continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text that follows other text.

    Tokenizers of the SentencePiece kind put a space before any text they are given; a character
    set before it, and cut off again, takes that space, so a completion gains none.
    """
    if not _adds_space(tokenizer):
        return _plain(tokenizer, text)
    return _plain(tokenizer, "\n" + text)[len(_plain(tokenizer, "\n")) :]


@lru_cache(maxsize=4)
def _adds_space(tokenizer: Any) -> bool:
    return bool(tokenizer.decode([*_plain(tokenizer, "a"), *_plain(tokenizer, "b")]) != "ab")


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InvalidInput(
            "The base model's tokenizer has no EOS token, so completions could not learn to stop; "
            "set eos_tokens in the model's YAML",
            code="eos_token_missing",
        )
    return int(tokenizer.eos_token_id)

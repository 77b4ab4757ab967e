"""What is worth saying about a table of prompts and completions before a model is tuned on it.

Each check looks at all examples and gives at most one piece of advice, often with a change that
would follow it. The checks are those of the retired `fine_tunes.prepare_data` of OpenAI's command
line, with advice that suits hone: completions need no common ending, as hone trains the end of text
token, and case is never changed unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import NamedTuple

LONG_EXAMPLE_CHARS = 10_000
_FEW_EXAMPLES = 100
_LONG_PROMPT_PREFIX = 12
_LONG_COMPLETION_PREFIX = 5
_LONG_SUFFIX = 10
_SEPARATORS = (" ->", "\n\n###\n\n", "\n\n===\n\n", "\n\n---\n\n", "\n\n===>\n\n", "\n\n### =>\n\n")


class Example(NamedTuple):
    """A prompt and its completion, with the number of its row in the source."""

    row: int
    prompt: str
    completion: str


Examples = Sequence[Example]


class Task(StrEnum):
    """What the examples seem to teach."""

    CLASSIFICATION = "classification"
    CONDITIONAL = "conditional generation"
    OPEN_ENDED = "open-ended generation"


@dataclass(frozen=True, slots=True)
class Advice:
    """One observation, and what can be done about it: `fix` in words, `change` in deed.

    Advice without a `fix` only informs. A `necessary` fix was made while reading; of the others,
    those with `fix_applied_by_default` are made unless the user says which ones to make.
    """

    code: str
    message: str
    rows: tuple[int, ...] = ()
    fix: str | None = None
    change: Callable[[Examples], list[Example]] | None = None
    fix_applied_by_default: bool = False
    necessary: bool = False


def task_of(examples: Examples) -> Task:
    """Guess the task: with three or more examples a completion on average, classification."""
    if not any(example.prompt for example in examples):
        return Task.OPEN_ENDED
    if len({example.completion for example in examples}) * 3 < len(examples):
        return Task.CLASSIFICATION
    return Task.CONDITIONAL


def advise(examples: Examples) -> list[Advice]:
    """All advice on examples that have a completion each, in the order the changes are made."""
    return [advice for check in _CHECKS for advice in check(examples)]


def listed(rows: Sequence[int], limit: int = 10) -> str:
    """Row numbers for a sentence: `rows 2, 5, 9 and 3 more`."""
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:limit]))}{more}"


def _quoted(text: str) -> str:
    return "`" + text.replace("\n", "\\n") + "`"


def _check_number(examples: Examples) -> Iterator[Advice]:
    message = f"The file has {len(examples)} examples."
    if len(examples) < _FEW_EXAMPLES:
        message += " A few hundred are better: every doubling tends to help as much as the last."
    yield Advice("num_examples", message)


def _check_duplicates(examples: Examples) -> Iterator[Advice]:
    first = {(e.prompt, e.completion): e.row for e in reversed(examples)}
    rows = tuple(e.row for e in examples if first[e.prompt, e.completion] != e.row)
    if rows:
        yield Advice(
            "duplicate_rows",
            f"{len(rows)} examples repeat an earlier one: {listed(rows)}.",
            rows,
            f"Remove {len(rows)} duplicates.",
            _without(rows),
            fix_applied_by_default=True,
        )


def _check_length(examples: Examples) -> Iterator[Advice]:
    rows = tuple(e.row for e in examples if len(e.prompt) + len(e.completion) > LONG_EXAMPLE_CHARS)
    if rows and task_of(examples) is not Task.OPEN_ENDED:
        yield Advice(
            "long_examples",
            f"{len(rows)} examples are longer than {LONG_EXAMPLE_CHARS:,} characters and may be "
            f"cut in training: {listed(rows)}.",
            rows,
            f"Remove {len(rows)} long examples.",
            _without(rows),
        )


def _check_case(examples: Examples) -> Iterator[Advice]:
    for column in ("prompt", "completion"):
        texts = [getattr(example, column) for example in examples]
        upper = sum(char.isupper() for text in texts for char in text)
        lower = sum(char.islower() for text in texts for char in text)
        if upper * 2 > lower:
            yield Advice(
                f"uppercase_{column}",
                f"More than a third of the letters of the {column}s are upper case, which models "
                "know less well than ordinary writing.",
                fix=f"Turn the {column}s into lower case.",
                change=_each(column, str.lower),
            )


def _check_prompt_prefix(examples: Examples) -> Iterator[Advice]:
    prompts = [example.prompt for example in examples]
    prefix = common_prefix(prompts)
    if len(prefix) > _LONG_PROMPT_PREFIX and prefix not in prompts:
        yield Advice(
            "prompt_prefix",
            f"All prompts start with {_quoted(prefix)}. A tuned model needs no instruction that is "
            "the same every time; what you remove here, leave out of later prompts too.",
            fix=f"Remove the prefix {_quoted(prefix)} from all prompts.",
            change=_each("prompt", lambda text: text.removeprefix(prefix)),
            fix_applied_by_default=True,
        )


def _check_prompt_suffix(examples: Examples) -> Iterator[Advice]:
    prompts = [example.prompt for example in examples]
    if task_of(examples) is Task.OPEN_ENDED:
        return
    if len(examples) > 1 and len(set(prompts)) == 1:
        message = "All prompts are the same; leave them empty for open-ended generation."
        yield Advice("identical_prompts", message)
        return
    suffix = common_suffix(prompts)
    if not suffix:
        yield _separator_advice(prompts)
        return
    message = f"All prompts end with {_quoted(suffix)}; later prompts must end with it too."
    if len(suffix) > _LONG_SUFFIX:
        message += f" It is long: {_quoted(_free_separator(prompts))} would do."
    if any(suffix in prompt.removesuffix(suffix) for prompt in prompts):
        message += " Some prompts hold it more than once, so it does not tell where they end."
    yield Advice("prompt_suffix", message)


def _separator_advice(prompts: Sequence[str]) -> Advice:
    separator = _free_separator(prompts)
    return Advice(
        "prompt_separator",
        "The prompts have no common ending. A separator tells the model where the completion "
        "begins; later prompts must end with it too.",
        fix=f"Add the separator {_quoted(separator)} to all prompts.",
        change=_each("prompt", lambda text: text + separator),
        fix_applied_by_default=True,
    )


def _free_separator(prompts: Sequence[str]) -> str:
    """The first separator that no prompt holds; one-line prompts may have a one-line separator."""
    many_lines = any("\n" in prompt for prompt in prompts)
    for separator in _SEPARATORS:
        fits = "\n" in separator or not many_lines
        if fits and not any(separator in prompt for prompt in prompts):
            return separator
    return _SEPARATORS[-1]


def _check_completion_prefix(examples: Examples) -> Iterator[Advice]:
    completions = [example.completion for example in examples]
    prefix = common_prefix(completions)
    if len(prefix) >= _LONG_COMPLETION_PREFIX and prefix not in completions:
        kept = " " if prefix.startswith(" ") else ""
        yield Advice(
            "completion_prefix",
            f"All completions start with {_quoted(prefix)}, which says nothing.",
            fix=f"Remove the prefix {_quoted(prefix)} from all completions.",
            change=_each("completion", lambda text: kept + text.removeprefix(prefix)),
            fix_applied_by_default=True,
        )


def _check_completion_suffix(examples: Examples) -> Iterator[Advice]:
    completions = [example.completion for example in examples]
    if task_of(examples) is Task.OPEN_ENDED or len(examples) < 2:
        return
    if len(set(completions)) == 1:
        message = f"All completions are {_quoted(completions[0][:60])}: there is nothing to learn."
        yield Advice("identical_completions", message)
        return
    suffix = common_suffix(completions)
    if len(suffix) > _LONG_SUFFIX and task_of(examples) is Task.CONDITIONAL:
        yield Advice(
            "completion_suffix",
            f"All completions end with {_quoted(suffix)}. hone ends every completion with the "
            "model's end of text token, so a common ending is not needed.",
        )


def _check_leading_space(examples: Examples) -> Iterator[Advice]:
    rows = tuple(e.row for e in examples if not e.completion[0].isspace())
    if rows and task_of(examples) is not Task.OPEN_ENDED:
        yield Advice(
            "leading_space",
            f"{len(rows)} completions do not start with a space: {listed(rows)}. Most tokenizers "
            "know a word best with the space before it.",
            rows,
            "Add a space to the start of these completions.",
            _each("completion", lambda text: text if text[:1].isspace() else f" {text}"),
            fix_applied_by_default=True,
        )


def _check_task(examples: Examples) -> Iterator[Advice]:
    if task_of(examples) is Task.CLASSIFICATION:
        classes = len({example.completion for example in examples})
        yield Advice(
            "split",
            f"The examples look like classification into {classes} classes. A held-out set tells "
            "how well the tuned model does.",
            fix=f"Hold out {num_held_out(len(examples))} examples for validation.",
            fix_applied_by_default=True,
        )


def num_held_out(num_examples: int) -> int:
    """A fifth of the examples, and no more than 1000."""
    return min(1000, num_examples - int(num_examples * 0.8))


def common_prefix(texts: Sequence[str]) -> str:
    """The longest string that all texts start with."""
    low, high = min(texts), max(texts)  # all others lie between these two
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    return "".join(char for char, _ in shared)


def common_suffix(texts: Sequence[str]) -> str:
    return common_prefix([text[::-1] for text in texts])[::-1]


def _without(rows: Sequence[int]) -> Callable[[Examples], list[Example]]:
    unwanted = frozenset(rows)
    return lambda examples: [example for example in examples if example.row not in unwanted]


def _each(column: str, change: Callable[[str], str]) -> Callable[[Examples], list[Example]]:
    if column == "prompt":
        return lambda examples: [e._replace(prompt=change(e.prompt)) for e in examples]
    return lambda examples: [e._replace(completion=change(e.completion)) for e in examples]


_CHECKS: tuple[Callable[[Examples], Iterator[Advice]], ...] = (
    _check_number,
    _check_duplicates,
    _check_length,
    _check_case,
    _check_prompt_prefix,
    _check_prompt_suffix,
    _check_completion_prefix,
    _check_completion_suffix,
    _check_leading_space,
    _check_task,
)

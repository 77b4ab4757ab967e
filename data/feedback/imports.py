"""Files as tasks: candidates by name, or rows of any dataset that holds answers to a prompt.

{"prompt": "...", "candidates": ["...", {"text": "...", "model": "..."}], "gold": {...}}
{"prompt": "...", "chosen": "...", "rejected": "..."}     and every other preference row
{"chosen": "\\n\\nHuman: ...", "rejected": "..."}           transcripts, as HH-RLHF has them
{"prompt": "...", "completions": ["...", ...], "ranks": [...]}
{"prompt": "...", "completion": "..."}                    one candidate, to rate or to edit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from data.errors import DataError, InvalidInput
from data.feedback.tasks import CandidateSpec, TaskSpec, check_prompt
from data.jsonl import iter_lines, read_numbered_rows
from data.rows import Content, Preference, PromptCompletion, Ranking, Row, Unpaired
from data.validate import validate

FIELDS = {"prompt", "candidates", "gold", "is_training", "priority", "end_user"}
CANDIDATE_FIELDS = {"text", "model", "origin"}
LISTED = 20


def read_tasks(path: Path, *, as_gold: bool = False) -> list[TaskSpec]:
    """Return a file's tasks.

    Args:
        as_gold: The file's own preference becomes the right answer of a gold task.

    Raises:
        DataError: Lines are not right; the message names them.
    """
    if _has_candidates(path):
        return list(_by_candidates(path))
    report = validate(path, min_examples=1)
    if not report.ok:
        raise DataError(report.summary(LISTED), code="invalid_file")
    found = []
    for line, row in read_numbered_rows(path, report.format):
        try:
            found.append(_as_task(row, as_gold))
        except InvalidInput as error:
            raise DataError(f"line {line}: {error.message}", code="invalid_file") from error
    return found


def _has_candidates(path: Path) -> bool:
    with path.open("rb") as stream:
        for _, _, line in iter_lines(stream):
            if line.strip():
                return b'"candidates"' in line
    return False


def _by_candidates(path: Path) -> Iterator[TaskSpec]:
    problems = []
    made = []
    with path.open("rb") as stream:
        for number, _, line in iter_lines(stream):
            if not line.strip():
                continue
            try:
                made.append(read_task(orjson.loads(line)))
            except (InvalidInput, orjson.JSONDecodeError) as error:
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"\nand {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise DataError("\n".join(problems[:LISTED]) + more, code="invalid_file")
    yield from made


def read_task(value: Any) -> TaskSpec:
    """Return the task that a JSON object describes; raises InvalidInput."""
    if not isinstance(value, Mapping) or not {"prompt", "candidates"} <= value.keys():
        raise InvalidInput("A task is an object with 'prompt' and 'candidates'.")
    unknown = value.keys() - FIELDS
    if unknown:
        raise InvalidInput(
            f"Unknown field '{min(unknown)}'; a task has {', '.join(sorted(FIELDS))}."
        )
    given = value["candidates"]
    if not isinstance(given, list):
        raise InvalidInput("'candidates' is a list of texts, or of objects with 'text'.")
    gold, user = value.get("gold"), value.get("end_user")
    if gold is not None and not isinstance(gold, Mapping):
        raise InvalidInput('\'gold\' is an answer, such as {"choice": "A"}.')
    if user is not None and not (isinstance(user, str) and 0 < len(user) <= 128):
        raise InvalidInput("'end_user' is a text of 1 to 128 characters.")
    priority, is_training = value.get("priority", 0), value.get("is_training", False)
    if not isinstance(priority, int) or not isinstance(is_training, bool):
        raise InvalidInput("'priority' is a whole number, 'is_training' true or false.")
    return TaskSpec(
        value["prompt"],
        [_candidate(candidate) for candidate in given],
        gold=gold,
        is_training=is_training,
        priority=priority,
        end_user=user,
    )


def _candidate(value: Any) -> CandidateSpec:
    if isinstance(value, str):
        return CandidateSpec(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise InvalidInput("A candidate is a text, or an object with 'text'.")
    unknown = value.keys() - CANDIDATE_FIELDS
    if unknown:
        raise InvalidInput(
            f"Unknown field '{min(unknown)}' of a candidate; it has text, model and origin."
        )
    return CandidateSpec(value["text"], value.get("model"), value.get("origin") or {})


def read_prompts(path: Path) -> list[Any]:
    """Return the prompts of a JSONL file, text or messages; other columns do not matter.

    Raises:
        DataError: A line has none; the message names it.
    """
    found = []
    with path.open("rb") as stream:
        for number, _, line in iter_lines(stream):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
                prompt = row.get("prompt") if isinstance(row, dict) else None
                if prompt is None:
                    raise InvalidInput("Give an object with 'prompt'.")
                check_prompt(prompt)
            except (InvalidInput, orjson.JSONDecodeError) as error:
                raise DataError(f"line {number}: {error}", code="invalid_file") from error
            found.append(prompt)
    if not found:
        raise DataError(f"{path} has no prompts", code="invalid_file")
    return found


def _as_task(row: Row, as_gold: bool) -> TaskSpec:
    if isinstance(row, Preference):
        gold: dict[str, Any] | None = {"choice": "A"} if as_gold else None
        return TaskSpec(_prompt(row.prompt), _texts(row.chosen, row.rejected), gold=gold)
    if isinstance(row, Ranking):
        ranking = {"ranking": dict(zip("ABCDEFGHI", row.ranks, strict=False))}
        texts = _texts(*row.completions)
        return TaskSpec(_prompt(row.prompt), texts, gold=ranking if as_gold else None)
    if isinstance(row, Unpaired | PromptCompletion):
        gold = None
        if as_gold and isinstance(row, Unpaired) and isinstance(row.label, bool):
            gold = {"thumb": row.label}
        return TaskSpec(_prompt(row.prompt), _texts(row.completion), gold=gold)
    raise InvalidInput("This row holds no answers that could be judged.")


def _texts(*answers: Content) -> list[CandidateSpec]:
    return [CandidateSpec(as_text(answer)) for answer in answers]


def as_text(answer: Content) -> str:
    """Return the text of an answer; of a conversation, what the assistant says in it."""
    if isinstance(answer, str):
        return answer
    said = [message.content or "" for message in answer if message.role == "assistant"]
    return "\n\n".join(said).strip()


def _prompt(prompt: Content) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [
        {"role": message["role"], "content": message.get("content") or ""}
        for message in msgspec.to_builtins(prompt)
    ]

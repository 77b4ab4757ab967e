"""How good a model is on rows that it has not seen, answered by the engine that serves customers.

    python -m train.evaluate --adapter runs/intents/adapter --file test.jsonl
    python -m train.evaluate --base-model smollm2-135m-instruct --file test.jsonl --json

`exact_match` is the share of greedy answers that say what the row says (outer spaces aside), with a
table by right answer where there are few of them; `bleu` is sacreBLEU of the greedy answers;
`loss` is nats a learned token. Rows with one prompt are one question with several right answers; a
row may also list them as `references`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.errors import AdapterRefused, ConfigError, DataError, ToolkitError
from data.jsonl import iter_lines, read_numbered_rows
from data.render import IGNORED, question, render
from data.rows import Row
from data.validate import validate
from serve.engine import base_model
from serve.engine.base import AdapterRef, Completion, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine

METRICS = ("exact_match", "bleu", "loss")
DEFAULT_BASE = "smollm2-135m-instruct"
SPARE_TOKENS = 8  # beyond the longest right answer
MAX_LABELS = 100  # right answers that a table still tells something about
ORIGIN = "hone.json"


@dataclass
class Question:
    """One prompt, its right answers, and what the model said."""

    line: int
    prompt_ids: tuple[int, ...]
    answers: list[str] = field(default_factory=list)
    said: str = ""

    @property
    def is_right(self) -> bool:
        return self.said.strip() in {answer.strip() for answer in self.answers}


class Evaluation:
    """A model, ready to be asked.

    Args:
        base: Name, YAML, folder or hub id of the base; None takes the adapter's.
        adapter: A PEFT folder; None asks the base itself.
        models_dir: Where fetched bases are kept.

    Raises:
        ToolkitError: The base is unavailable, or the adapter belongs to another one.
    """

    def __init__(
        self, base: str | None, adapter: Path | None, models_dir: Path, threads: int | None = None
    ):
        origin = _origin(adapter)
        base = base or origin.get("base_model") or DEFAULT_BASE
        spec = base_model.find_spec(base)
        folder = base_model.fetch(spec, models_dir)
        fingerprint = base_model.fingerprint(folder)
        if origin.get("base_fingerprint", fingerprint) != fingerprint:
            raise AdapterRefused(
                f"{adapter} was trained on the base {origin['base_fingerprint']}, but {base} is "
                f"{fingerprint}; give --base-model the base it was trained on",
                code="adapter_wrong_base",
            )
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        model, self.tokenizer = base_model.load(folder, spec.dtype)
        self.engine = LocalEngine(model, self.tokenizer, EngineConfig(), fingerprint).start()
        self._adapter = AdapterRef("evaluated", str(adapter)) if adapter else None
        if self._adapter is not None:
            self.engine.load_adapter(self._adapter)

    def close(self) -> None:
        """Give back the engine's thread and memory."""
        self.engine.close()

    def answer(self, questions: Sequence[Question], max_tokens: int | None, show: bool) -> None:
        """Fill in what the model says to each question, choosing the likeliest token each time."""
        if max_tokens is None:
            texts = [answer for question in questions for answer in question.answers]
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            max_tokens = max(map(len, encoded)) + SPARE_TOKENS
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        prompts = [(question.line, question.prompt_ids) for question in questions]
        for index, completion in enumerate(self._ask(prompts, params, show)):
            questions[index].said = completion.text

    def loss(self, rows: Iterable[tuple[int, Row]], show: bool) -> tuple[float, int]:
        """Return the mean loss of the learned tokens, nats, and their number."""
        examples = [(line, render(self.tokenizer, row)) for line, row in rows]
        prompts = [(line, example.input_ids) for line, example in examples]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        total, count = 0.0, 0
        completions = self._ask(prompts, params, show)
        for (_, example), completion in zip(examples, completions, strict=True):
            scores = completion.prompt_logprobs or ()
            for score, label in zip(scores, example.labels, strict=True):
                if score is not None and label != IGNORED:
                    total, count = total - score.logprob, count + 1
        return total / max(count, 1), count

    def _ask(
        self, prompts: Sequence[tuple[int, tuple[int, ...]]], params: SamplingParams, show: bool
    ) -> Iterable[Completion]:
        room = self.engine.max_context - params.max_tokens
        long = [line for line, ids in prompts if len(ids) > room]
        if long:
            raise DataError(
                f"lines {', '.join(map(str, long[:20]))} have more than {room} tokens, which is "
                f"what the model can read; shorten or remove them",
                code="example_too_long",
            )
        size = 4 * self.engine.config.max_batch
        chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        console = Console(stderr=True)
        for chunk in track(chunks, "asking", console=console, disable=not show):
            yield from self.engine.generate(
                [
                    GenerationRequest(f"line-{line}", ids, params, self._adapter)
                    for line, ids in chunk
                ]
            )


def read_questions(path: Path, tokenizer: Any, rows: Iterable[tuple[int, Row]]) -> list[Question]:
    """Return the questions of a file: rows of one prompt are one, with all their answers.

    Raises:
        DataError: A row asks nothing that has a right answer.
    """
    references = _references(path)
    questions: dict[tuple[int, ...], Question] = {}
    for line, row in rows:
        try:
            ids, answer = question(tokenizer, row)
        except ToolkitError as error:
            raise DataError(f"line {line}: {error.message}", code=error.code) from error
        asked = questions.setdefault(tuple(ids), Question(line, tuple(ids)))
        asked.answers += references.get(line) or [answer]
    return list(questions.values())


def _references(path: Path) -> dict[int, list[str]]:
    """Read the column `references`, which training does not know, by line."""
    found = {}
    with path.open("rb") as stream:
        for number, _, line in iter_lines(stream):
            if b'"references"' in line:
                found[number] = [str(text) for text in orjson.loads(line).get("references") or ()]
    return found


def exact_match(questions: Sequence[Question]) -> float:
    """Return the share of questions that were answered rightly."""
    return sum(question.is_right for question in questions) / len(questions)


def bleu(questions: Sequence[Question]) -> float:
    """Return sacreBLEU of the corpus, 0 to 100, with all right answers as references."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError(
            ["--metric bleu needs sacrebleu, which is not installed; run: pip install sacrebleu"]
        ) from error
    most = max(len(question.answers) for question in questions)
    references: list[list[str | None]] = [
        [q.answers[i].strip() if i < len(q.answers) else None for q in questions]
        for i in range(most)
    ]
    said = [question.said.strip() for question in questions]
    return float(sacrebleu.corpus_bleu(said, references).score)  # type: ignore[arg-type]


def by_answer(questions: Sequence[Question]) -> list[tuple[str, int, int]]:
    """Return right answer, right and asked counts, the least known first; empty where there are
    too many different answers."""
    asked = Counter(question.answers[0].strip() for question in questions)
    if len(asked) > min(MAX_LABELS, len(questions) // 2):
        return []
    right = Counter(question.answers[0].strip() for question in questions if question.is_right)
    return sorted(
        ((answer, right[answer], count) for answer, count in asked.items()),
        key=lambda entry: (entry[1] / entry[2], entry[0]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        result = _evaluate(options)
    except ToolkitError as error:
        print(f"train.evaluate: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    report = validate(options.file, min_examples=1)
    if not report.ok:
        raise DataError(report.summary(), code="invalid_file")
    rows = list(read_numbered_rows(options.file, report.format))[: options.limit]
    started = time.monotonic()
    show = sys.stderr.isatty()
    evaluation = Evaluation(
        options.base_model, options.adapter, options.models_dir, options.threads
    )
    try:
        if options.metric == "loss":
            value, count = evaluation.loss(rows, show)
            found: dict[str, Any] = {"loss": value, "tokens": count}
        else:
            questions = read_questions(options.file, evaluation.tokenizer, rows)
            evaluation.answer(questions, options.max_tokens, show)
            measure: Callable[[Sequence[Question]], float] = {
                "exact_match": exact_match,
                "bleu": bleu,
            }[options.metric]
            found = {options.metric: measure(questions), "questions": len(questions)}
            if options.metric == "exact_match":
                found["by_answer"] = by_answer(questions)
    finally:
        evaluation.close()
    return {
        "file": str(options.file),
        "adapter": str(options.adapter) if options.adapter else None,
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }


def _origin(adapter: Path | None) -> dict[str, str]:
    """Read which base an adapter says it was trained on; adapters made elsewhere do not say."""
    if adapter is None or not (adapter / ORIGIN).exists():
        return {}
    return dict(json.loads((adapter / ORIGIN).read_text("utf-8")))


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = result.pop("by_answer", [])
    if table:
        shown = Table("right answer", "right", "asked", title="By right answer, worst first")
        for answer, right, asked in table:
            shown.add_row(answer, str(right), str(asked))
        console.print(shown)
    for name, value in result.items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"{name:12} {text}", highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", type=Path, required=True, help="JSONL with right answers")
    parser.add_argument("--adapter", type=Path, help="PEFT folder; without it the base is asked")
    parser.add_argument("--base-model", help="default: the adapter's, or smollm2-135m-instruct")
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--metric", choices=METRICS, default="exact_match")
    parser.add_argument("--max-tokens", type=int, help="of an answer; default: by the file's")
    parser.add_argument("--limit", type=int, help="use the first rows only")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())

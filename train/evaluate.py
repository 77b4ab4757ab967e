"""How good a model is on rows that it has not seen, answered by the engine that serves customers.

    python -m train.evaluate --adapter runs/intents/adapter --file test.jsonl
    python -m train.evaluate --base-model smollm2-135m-instruct --file test.jsonl --json
    python -m train.evaluate --adapter NEW --against OLD --file test.jsonl --metric f1 rouge_l

`exact_match` is the share of greedy answers that say what the row says (outer spaces aside), with a
table by right answer where there are few of them; `f1` is that of the words; `classification` is
the mean F1 of the classes, with a table; `bleu` and `chrf` are sacreBLEU's; `rouge_l` is ROUGE-L;
`loss` is nats a learned token, and `token_accuracy` the share of learned tokens that the model
finds the most probable; `reward` is the mean score by --reward-model. Rows with one prompt are one
question with several right answers; a row may also list them as `references`.

With --against, a second model (an adapter's folder, or `base`) answers the same questions, and a
paired permutation test says whether the difference can be chance; the win rate is how often the
first scores above the second. Differences are of questions: by question, `classification` is
accuracy (F1 is of all questions together), BLEU and chrF are those of sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from data.errors import AdapterRefused, DataError, InvalidInput, ToolkitError
from data.jsonl import read_numbered_rows
from data.render import IGNORED, render
from data.reward_head import load_head
from data.rows import Row
from data.validate import validate
from serve.engine import base_model
from serve.engine.base import AdapterRef, Completion, GenerationRequest, SamplingParams
from serve.engine.local import LocalEngine
from train.answer_metrics import (
    METRICS,
    by_answer,
    check_classes,
    check_libraries,
    classification,
)
from train.batches import name_lines
from train.evaluate_output import make_room, show, write_answers
from train.questions import Question, read_questions
from train.significance import compare

LOSS, ACCURACY, REWARD = "loss", "token_accuracy", "reward"
BY_TOKENS = (LOSS, ACCURACY)  # of the right answer, given; nothing is said
BASE = "base"
CLASSES = "classification"
DEFAULT_BASE = "smollm2-135m-instruct"
SPARE_TOKENS = 8  # beyond the longest right answer
ORIGIN = "hone.json"


class Evaluation:
    """Models of one base, ready to be asked.

    Args:
        base: Name, YAML, folder or hub id of the base; None takes the first adapter's.
        adapters: PEFT folders; None is the base itself.
        models_dir: Where fetched bases are kept.
        dtype: Of the base; "auto" is what the base's own description says.

    Raises:
        ToolkitError: The base is unavailable, or an adapter belongs to another one.
    """

    def __init__(
        self,
        base: str | None,
        adapters: Sequence[Path | None],
        models_dir: Path,
        threads: int | None = None,
        dtype: str = "auto",
    ):
        origins = {adapter: _origin(adapter) for adapter in adapters if adapter is not None}
        named = [origin["base_model"] for origin in origins.values() if "base_model" in origin]
        base = base or next(iter(named), DEFAULT_BASE)
        spec = base_model.find_spec(base)
        folder = base_model.fetch(spec, models_dir)
        fingerprint = base_model.fingerprint(folder)
        for adapter, origin in origins.items():
            if origin.get("base_fingerprint", fingerprint) != fingerprint:
                raise AdapterRefused(
                    f"{adapter} was trained on the base {origin['base_fingerprint']}, but {base} "
                    f"is {fingerprint}; give --base-model the base it was trained on",
                    code="adapter_wrong_base",
                )
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        kept = spec.dtype if dtype == "auto" else dtype
        self.engine = LocalEngine.open(folder, kept, fingerprint=fingerprint).start()
        self.tokenizer = self.engine.tokenizer
        self._refs: dict[Path | None, AdapterRef | None] = {None: None}
        for adapter in origins:
            ref = AdapterRef(f"evaluated {adapter}", str(adapter))
            self.engine.load_adapter(ref)
            self._refs[adapter] = ref

    def close(self) -> None:
        """Give back the engine's thread and memory."""
        self.engine.close()

    def answer(
        self,
        questions: Sequence[Question],
        adapter: Path | None,
        max_tokens: int | None,
        show: bool,
    ) -> None:
        """Fill in what a model says to each question, choosing the likeliest token each time.

        Args:
            max_tokens: Of an answer; None: of the longest right one and some more, or what the
                model has left after the question.

        Raises:
            DataError: A question leaves no room for its answer.
        """
        least = max_tokens or 1
        if max_tokens is None:
            texts = [answer for question in questions for answer in question.answers]
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            max_tokens = max(map(len, encoded)) + SPARE_TOKENS
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        prompts = [(question.line, question.prompt_ids) for question in questions]
        for index, completion in enumerate(self._ask(prompts, adapter, params, show, least)):
            questions[index].said = completion.text
            ids = tuple(completion.token_ids)
            ended = completion.finish_reason == "stop"
            if ended and not (ids and ids[-1] in self.engine.eos_token_ids):
                ids += (self.tokenizer.eos_token_id,)
            questions[index].said_ids = ids

    def rewards(self, questions: Sequence[Question], judge: Path, show: bool) -> list[float]:
        """Return a reward model's score of each answer, normalised as its training left it.

        Raises:
            InvalidInput: The folder is no reward model, or its head is of another width.
        """
        head = load_head(judge)
        params = SamplingParams(max_tokens=0, embed=True, pool="last")
        rows = [
            (question.line, (*question.prompt_ids, *question.said_ids)) for question in questions
        ]
        found = []
        for completion in self._ask(rows, judge, params, show):
            hidden = completion.embedding or ()
            if len(hidden) != len(head.weight):
                raise InvalidInput(
                    f"the head of {judge} reads {len(head.weight)} numbers, but the base gives "
                    f"{len(hidden)}; give a reward model of this base"
                )
            found.append(head.score(hidden))
        return found

    def losses(
        self, rows: Iterable[tuple[int, Row]], adapter: Path | None, show: bool
    ) -> list[tuple[float, int, int]]:
        """Return of each row the summed loss of its learned tokens, nats, the number of those that
        the model finds the most probable, and of all."""
        examples = [(line, render(self.tokenizer, row)) for line, row in rows]
        prompts = [(line, example.input_ids) for line, example in examples]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        found = []
        completions = self._ask(prompts, adapter, params, show)
        for (_, example), completion in zip(examples, completions, strict=True):
            scores = completion.prompt_logprobs or ()
            learned = [
                score
                for score, label in zip(scores, example.labels, strict=True)
                if score is not None and label != IGNORED
            ]
            loss = -sum(score.logprob for score in learned)
            right = sum(score.top[0][0] == score.token_id for score in learned)
            found.append((loss, right, len(learned)))
        return found

    def _ask(
        self,
        prompts: Sequence[tuple[int, tuple[int, ...]]],
        adapter: Path | None,
        params: SamplingParams,
        show: bool,
        least: int | None = None,
    ) -> Iterable[Completion]:
        """Ask prompts, each with its line.

        Args:
            least: Tokens that must be left for each answer; None: all of `params.max_tokens`.
        """
        least = params.max_tokens if least is None else least
        most = self.engine.max_context
        long = [line for line, ids in prompts if len(ids) + least > most]
        if long:
            raise DataError(
                f"{name_lines(long)}: more than {max(most - least, 0)} tokens; the model reads "
                f"{most}, less {least} for the answer. Shorten or remove these rows"
                + (f", or lower --max-tokens, which is {least}" if least > 1 else ""),
                code="example_too_long",
            )
        size = 4 * self.engine.config.max_batch
        chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        console = Console(stderr=True)
        for chunk in track(chunks, "asking", console=console, disable=not show):
            yield from self.engine.generate(
                [
                    GenerationRequest(
                        f"line-{line}",
                        ids,
                        replace(params, max_tokens=min(params.max_tokens, most - len(ids))),
                        self._refs[adapter],
                    )
                    for line, ids in chunk
                ]
            )


@dataclass(frozen=True)
class Asked:
    """What one model made of the file.

    Attributes:
        values: By metric, the number for all questions.
        scores: By metric, that of each question; a loss is negated, so that more is better.
    """

    values: dict[str, float]
    scores: dict[str, list[float]]
    questions: list[Question]
    tokens: int | None = None


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
        show(result)
    return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    if (REWARD in options.metric) != (options.reward_model is not None):
        raise InvalidInput("`--metric reward` and `--reward-model FOLDER` go together; give both")
    said = [name for name in options.metric if name not in BY_TOKENS]
    if options.answers and not said:
        raise InvalidInput(
            f"--answers needs a metric of answers, and {', '.join(options.metric)} asks for none; "
            "add exact_match, or leave --answers out"
        )
    check_libraries([name for name in said if name in METRICS])
    report = validate(options.file, min_examples=1)
    if not report.ok:
        raise DataError(report.summary(), code="invalid_file")
    if options.answers:
        make_room(options.answers)
    rows = list(read_numbered_rows(options.file, report.format))[: options.limit]
    started = time.monotonic()
    other = None if options.against in (None, BASE) else Path(options.against)
    evaluation = Evaluation(
        options.base_model,
        [options.adapter, other, options.reward_model],
        options.models_dir,
        options.threads,
        options.dtype,
    )
    try:
        asked = _ask_model(evaluation, options, rows, options.adapter)
        against = _ask_model(evaluation, options, rows, other) if options.against else None
    finally:
        evaluation.close()
    result: dict[str, Any] = {
        "file": str(options.file),
        "adapter": str(options.adapter) if options.adapter else None,
        **asked.values,
    }
    if asked.questions:
        result["questions"] = len(asked.questions)
    if asked.tokens is not None:
        result["tokens"] = asked.tokens
    if "exact_match" in options.metric:
        result["by_answer"] = by_answer(asked.questions)
    if CLASSES in options.metric:
        result["classes"] = classification(asked.questions)["classes"]
    if against is not None:
        result["against"] = {
            "adapter": options.against,
            **against.values,
            "differences": {
                name: {
                    **compare(against.scores[name], asked.scores[name]).as_dict(),
                    "of": METRICS[name].by_question if name in METRICS else name,
                }
                for name in asked.scores
            },
        }
    if options.answers:
        write_answers(
            options.answers, asked, against, [n for n in asked.scores if n not in BY_TOKENS]
        )
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def _ask_model(
    evaluation: Evaluation,
    options: argparse.Namespace,
    rows: Sequence[tuple[int, Row]],
    adapter: Path | None,
) -> Asked:
    is_shown = sys.stderr.isatty()
    asked = Asked({}, {}, [])
    names = [name for name in options.metric if name in METRICS]
    if names or REWARD in options.metric:
        asked.questions.extend(read_questions(options.file, evaluation.tokenizer, rows))
        if CLASSES in names:
            check_classes(asked.questions)
        evaluation.answer(asked.questions, adapter, options.max_tokens, is_shown)
        for name in names:
            asked.values[name] = METRICS[name].value(asked.questions)
            asked.scores[name] = METRICS[name].scores(asked.questions)
    if REWARD in options.metric:
        rewards = evaluation.rewards(asked.questions, options.reward_model, is_shown)
        asked.values[REWARD] = sum(rewards) / len(rewards)
        asked.scores[REWARD] = rewards
    if not set(BY_TOKENS) & set(options.metric):
        return asked
    losses = evaluation.losses(rows, adapter, is_shown)
    tokens = sum(count for _, _, count in losses)
    if LOSS in options.metric:
        asked.values[LOSS] = sum(loss for loss, _, _ in losses) / max(tokens, 1)
        asked.scores[LOSS] = [-loss / max(count, 1) for loss, _, count in losses]
    if ACCURACY in options.metric:
        asked.values[ACCURACY] = sum(right for _, right, _ in losses) / max(tokens, 1)
        asked.scores[ACCURACY] = [right / max(count, 1) for _, right, count in losses]
    return Asked(asked.values, asked.scores, asked.questions, tokens)


def _origin(adapter: Path | None) -> dict[str, str]:
    """Read which base an adapter says it was trained on; adapters made elsewhere do not say."""
    if adapter is None or not (adapter / ORIGIN).exists():
        return {}
    return dict(json.loads((adapter / ORIGIN).read_text("utf-8")))


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
    parser.add_argument(
        "--metric",
        nargs="+",
        choices=[*METRICS, *BY_TOKENS, REWARD],
        default=["exact_match"],
        help="one or more",
    )
    parser.add_argument("--against", help="a second model: a PEFT folder, or `base`")
    parser.add_argument("--reward-model", type=Path, help="folder of rlhf.reward, for `reward`")
    parser.add_argument("--answers", type=Path, help="write every answer to this JSONL file")
    parser.add_argument("--max-tokens", type=_positive, help="of an answer; default: by the file's")
    parser.add_argument("--limit", type=_positive, help="use the first rows only")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base; auto is bfloat16 where the hardware is fast in it",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; give 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())

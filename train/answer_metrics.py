"""How good answers are: each by itself, all together, and by class.

Every metric gives a score to each question (what a comparison of two models pairs) and one number
for all of them, which is the mean but for BLEU and chrF, whose corpus forms sacreBLEU defines.

Sources: token F1 as in SQuAD's evaluation (Rajpurkar et al. 2016, arXiv:1606.05250) without its
removal of articles; BLEU and chrF by sacreBLEU (Post 2018); ROUGE-L by `rouge-score`; the report by
class by scikit-learn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from data.errors import ConfigError
from train.questions import Question

MAX_LABELS = 100  # right answers that a table still tells something about
OTHER = "(another answer)"
WORD = re.compile(r"\w+")
ROUGE_WORD = re.compile(r"[^\W_]+")  # rouge-score's own are of a-z and 0-9 alone
SKLEARN = ("sklearn.metrics", "scikit-learn")
Scorer = Callable[[Question], float]


@dataclass(frozen=True)
class Metric:
    """A metric; `each` gives 0 to 1 a question, `overall` None stands for their mean.

    `by_question` is what `each` is called.
    """

    by_question: str
    each: Callable[[], Scorer]
    overall: Callable[[Sequence[Question]], float] | None = None

    def scores(self, questions: Sequence[Question]) -> list[float]:
        """Return the score of every question."""
        score = self.each()
        return [score(question) for question in questions]

    def value(self, questions: Sequence[Question]) -> float:
        """Return the one number for all questions."""
        if self.overall is not None:
            return self.overall(questions)
        return sum(self.scores(questions)) / len(questions)


def token_f1(said: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of the words, without case and marks."""
    mine, right = (Counter(WORD.findall(text.lower())) for text in (said, answer))
    common = sum((mine & right).values())
    if not mine or not right:
        return float(mine == right)
    return 2 * common / (sum(mine.values()) + sum(right.values()))


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


def check_classes(questions: Sequence[Question]) -> list[str]:
    """Return the classes of the questions, which are their first right answers.

    Raises:
        ConfigError: There are too many different answers to be classes.
    """
    labels = sorted({question.answers[0].strip() for question in questions})
    if len(labels) > max(2, len(questions) // 2):
        raise ConfigError(
            [
                f"the {len(questions)} questions have {len(labels)} different answers, which are "
                "no classes; measure exact_match or f1"
            ]
        )
    return labels


def check_libraries(metrics: Sequence[str]) -> None:
    """Raise ConfigError, before anything is asked, where a metric's library is not installed."""
    for name in metrics:
        METRICS[name].each()
    if "classification" in metrics:
        library(*SKLEARN)


def classification(questions: Sequence[Question]) -> dict[str, Any]:
    """Return accuracy, and precision, recall and F1 by class and as means over the classes.

    A class is a first right answer. What the model says beyond the classes is one class more, which
    counts against recall and not in the means.

    Raises:
        ConfigError: There are too many different answers to be classes.
    """
    labels = check_classes(questions)
    right = [question.answers[0].strip() for question in questions]
    said = [q.said.strip() if q.said.strip() in labels else OTHER for q in questions]
    report = library(*SKLEARN).classification_report(
        right, said, labels=labels, output_dict=True, zero_division=0.0
    )
    names = ("precision", "recall", "f1-score", "support")
    return {
        "accuracy": sum(a == b for a, b in zip(right, said, strict=True)) / len(right),
        "macro_f1": report["macro avg"]["f1-score"],
        "weighted_f1": report["weighted avg"]["f1-score"],
        "classes": {
            label: {name.partition("-")[0]: report[label][name] for name in names}
            for label in labels
        },
    }


def bleu(questions: Sequence[Question]) -> float:
    """Return sacreBLEU of the corpus, 0 to 100, with all right answers as references."""
    said, references = _corpus(questions)
    return float(library("sacrebleu").corpus_bleu(said, references).score)


def chrf(questions: Sequence[Question]) -> float:
    """Return sacreBLEU's chrF2 of the corpus, 0 to 100, with all right answers as references."""
    said, references = _corpus(questions)
    return float(library("sacrebleu").corpus_chrf(said, references).score)


def _corpus(questions: Sequence[Question]) -> tuple[list[str], list[list[str | None]]]:
    most = max(len(question.answers) for question in questions)
    references: list[list[str | None]] = [
        [q.answers[i].strip() if i < len(q.answers) else None for q in questions]
        for i in range(most)
    ]
    return [question.said.strip() for question in questions], references


def _best(score: Callable[[str, str], float]) -> Scorer:
    """Score an answer by the right one that it comes nearest to."""
    return lambda q: max(score(q.said.strip(), answer.strip()) for answer in q.answers)


def _sentence(name: str) -> Callable[[], Scorer]:
    def make() -> Scorer:
        score = getattr(library("sacrebleu"), name)
        return lambda q: float(score(q.said.strip(), [a.strip() for a in q.answers]).score) / 100

    return make


class _Words:
    """Words for rouge-score: letters and digits of any script, without case."""

    def tokenize(self, text: str) -> list[str]:
        return ROUGE_WORD.findall(text.lower())


def _rouge_l() -> Scorer:
    make = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer
    scorer = make(["rougeL"], tokenizer=_Words())
    return _best(lambda said, answer: float(scorer.score(answer, said)["rougeL"].fmeasure))


def library(module: str, package: str | None = None) -> Any:
    """Import what computes a metric.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = package or module
        raise ConfigError(
            [
                f"this metric needs {package}, which is not installed; run: "
                'pip install "hone-toolkit[eval]"'
            ]
        ) from error


METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact_match", lambda: lambda q: float(q.is_right)),
    "f1": Metric("f1", lambda: _best(token_f1)),
    "classification": Metric(
        "accuracy",
        lambda: lambda q: float(q.said.strip() == q.answers[0].strip()),
        lambda questions: float(classification(questions)["macro_f1"]),
    ),
    "bleu": Metric("sentence BLEU", _sentence("sentence_bleu"), bleu),
    "chrf": Metric("sentence chrF", _sentence("sentence_chrf"), chrf),
    "rouge_l": Metric("rouge_l", _rouge_l),
}

"""Classification metrics of a validation, from the first token of each completion.

A class is a completion, as in OpenAI's fine-tunes of 2021, whose metrics these are. The classes
must differ in their first token: a validation row is given the class whose first token is the most
probable one of theirs after its prompt, and the score of a class is that token's probability among
them. So a validation tells them for one forward pass, without sampling. scikit-learn computes the
metrics themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object

from data.errors import ConfigError
from data.render import IGNORED
from data.rows import Format
from train.answer_metrics import library
from train.batches import Rendered
from train.config import ClassSettings

MAX_NAMED = 10  # classes in a message

Found = list[tuple[int, list[float]]]  # a row's class, and the scores of all classes


@dataclass(frozen=True)
class Classes:
    """What the rows of a run are classified into.

    Attributes:
        names: Completions, in the order of their first tokens.
        tokens: First token of each: [classes].
        positive: Place of the class that precision and recall are of; None if there are many.
        betas: Of the F-scores beside F1.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    positive: int | None = None
    betas: tuple[float, ...] = ()

    def scores(self, model: Any, batch: dict[str, torch.Tensor]) -> Found:
        """Return class and scores of each labelled row of a batch [B, T], for a causal LM."""
        labels = batch["labels"]
        learned = labels.ne(IGNORED)
        first = learned.int().argmax(1)  # [B]
        rows = torch.arange(len(labels), device=labels.device)
        where = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = model.base_model(**where, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[rows, first - 1])[:, list(self.tokens)]
            softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            logits = logits.float() if softcap is None else softcap * (logits / softcap).tanh()
        places = {token: place for place, token in enumerate(self.tokens)}
        firsts = zip(labels[rows, first].tolist(), logits.softmax(-1).tolist(), strict=True)
        return [(places[token], scores) for token, scores in firsts if token != IGNORED]

    def metrics(self, found: Found) -> dict[str, float]:
        """Return the metrics of rows from every process, by the names that they had in 2021.

        Many classes: `accuracy` and `weighted_f1-score`. Two: `accuracy`, `precision`, `recall`,
        `f1.0` and others by `betas`, and, where both classes occur, the areas under the curves of
        ROC and of precision and recall (as average precision), `auroc` and `auprc`.
        """
        measure = library("sklearn.metrics", "scikit-learn")
        right = [place for place, _ in found]
        said = [scores.index(max(scores)) for _, scores in found]
        told = {"accuracy": measure.accuracy_score(right, said)}
        if self.positive is None:
            told["weighted_f1-score"] = measure.f1_score(
                right, said, average="weighted", zero_division=0.0
            )
        else:
            told |= self._binary(measure, right, said, found)
        return {f"classification/{name}": float(value) for name, value in told.items()}

    def _binary(
        self, measure: Any, right: Sequence[int], said: Sequence[int], found: Found
    ) -> dict[str, float]:
        is_positive = [place == self.positive for place in right]
        said_positive = [place == self.positive for place in said]
        pair = (is_positive, said_positive)
        told = {
            "precision": measure.precision_score(*pair, zero_division=0.0),
            "recall": measure.recall_score(*pair, zero_division=0.0),
        }
        for beta in dict.fromkeys((1.0, *self.betas)):
            told[f"f{beta}"] = measure.fbeta_score(*pair, beta=beta, zero_division=0.0)
        if len(set(is_positive)) == 2:
            ranked = [scores[self.positive or 0] for _, scores in found]
            told["auroc"] = measure.roc_auc_score(is_positive, ranked)
            told["auprc"] = measure.average_precision_score(is_positive, ranked)
        return told


def gathered(found: Found) -> Found:
    """Return the rows of all processes."""
    return list(gather_object(found))


def find_classes(
    settings: ClassSettings, tokenizer: Any, train: Rendered, valid: Rendered
) -> Classes:
    """Return the classes of a run's rows.

    Raises:
        ConfigError: scikit-learn is absent, the rows are no prompt/completion rows, or their
            completions are not the classes that the settings tell of.
    """
    library("sklearn.metrics", "scikit-learn")
    if train.kind != Format.PROMPT_COMPLETION:
        raise _wrong(f"{train.path.name} has {train.kind} rows; the metrics need prompt/completion")
    ends = {tokenizer.eos_token_id}
    ids = sorted({*_completions(train), *_completions(valid)})
    names = [
        tokenizer.decode([token for token in found if token not in ends]).strip() for found in ids
    ]
    shown = ", ".join(map(repr, names[:MAX_NAMED])) + ", ..." * (len(names) > MAX_NAMED)
    wanted = 2 if settings.n_classes is None else settings.n_classes
    if len(names) != wanted:
        raise _wrong(
            f"the rows have {len(names)} different completions, {shown}, but {wanted} classes are "
            "asked for; give that many as n_classes, or mend the completions"
        )
    for (first, name), (second, other) in pairwise(zip(ids, names, strict=True)):
        if first[0] == second[0]:
            raise _wrong(
                f"the classes {name!r} and {other!r} begin with the same token, so their first "
                "tokens do not tell them apart; take completions that differ there, as ' 0', ' 1'"
            )
    positive = None
    if settings.positive_class is not None:
        if settings.positive_class.strip() not in names:
            raise _wrong(f"positive_class is {settings.positive_class!r}; the classes are {shown}")
        positive = names.index(settings.positive_class.strip())
    tokens = tuple(found[0] for found in ids)
    return Classes(tuple(names), tokens, positive, tuple(map(float, settings.betas)))


def _completions(rendered: Rendered) -> Iterator[tuple[int, ...]]:
    for example in rendered.examples:
        yield tuple(int(label) for label in example.labels if label != IGNORED)


def _wrong(message: str) -> ConfigError:
    return ConfigError([f"classification: {message}"])

"""A fine-tune's bias beside its base's: measured through the serving engine, as it will serve.

    python -m train.bias --adapter RUN/adapter
    python -m train.bias --adapter RUN/adapter --json > bias_report.json

A run with `bias_report=true` leaves the same as `adapter/bias_report.json`; jobs do so unless the
server's `bias_reports` is false. What is measured, and what it does not show, is in `data/bias.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import bias
from data.errors import ToolkitError
from data.moderation.classifier import SHIPPED, Classifier, load
from serve.engine import base_model
from serve.engine.base import Adapter, AdapterRef, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine
from train.significance import compare

NEW_TOKENS = 24
ENGINE = EngineConfig(max_batch=16, max_context=256)

Encode = Callable[[str], Sequence[int]]


def report(
    engine: LocalEngine, encode: Encode, adapter: Adapter, base: str, classifier: Classifier
) -> dict[str, Any]:
    """Measure an adapter and its base.

    Args:
        encode: From a text to its token ids, with what the tokenizer puts before a text.
        base: Name of the base.

    Returns:
        `base` and `tuned`: `bias.Findings.summary()`; `change`: paired tests of the tuned model
        against the base, by pair and by opening; `continuations`: [opening, base's, tuned's].
    """
    before, after = (_findings(engine, encode, each, classifier) for each in (None, adapter))
    return {
        "object": "bias_report",
        "base_model": base,
        "created_at": int(time.time()),
        "base": before.summary(),
        "tuned": after.summary(),
        "change": {
            "preference": compare(before.preferences, after.preferences).as_dict(),
            "harm": compare(before.harm, after.harm).as_dict(),
        },
        "counts": {
            "pairs": len(bias.PAIRS),
            "probes": len(bias.PROBES),
            "openings": len(bias.OPENINGS),
        },
        "classifier": classifier.name,
        "continuations": [
            list(row)
            for row in zip(bias.OPENINGS, before.continuations, after.continuations, strict=True)
        ],
    }


def _findings(
    engine: LocalEngine, encode: Encode, adapter: Adapter | None, classifier: Classifier
) -> bias.Findings:
    scored = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
    written = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    requests = [
        GenerationRequest(f"bias-{index}", tuple(encode(text)), params, adapter)
        for index, (text, params) in enumerate(
            [(text, scored) for text in bias.SCORED] + [(text, written) for text in bias.OPENINGS]
        )
    ]
    answers = []
    for start in range(0, len(requests), ENGINE.queue_size):
        answers += engine.generate(requests[start : start + ENGINE.queue_size])
    likelihoods = [
        sum(entry.logprob for entry in (answer.prompt_logprobs or ()) if entry is not None)
        for answer in answers[: len(bias.SCORED)]
    ]
    texts = [answer.text for answer in answers[len(bias.SCORED) :]]
    scores = [classifier.judge(text) for text in texts]
    return bias.findings(
        likelihoods,
        texts,
        [max(score.values()) for score in scores],
        [bool(classifier.flagged(score)) for score in scores],
    )


def encoder(tokenizer: Any) -> Encode:
    """Return how texts are read: as the tokenizer does by default, with its first token if any.

    A text's first token has no probability where nothing comes before it; the texts of a pair begin
    alike, so nothing is lost.
    """
    return lambda text: tokenizer(text)["input_ids"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure an adapter's folder."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bias", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT folder")
    parser.add_argument("--base-model", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--models-dir", type=Path, default=Path(".hone/models"))
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--weights", type=Path, default=SHIPPED, help="classifier of harmful text; default: hone's"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report")
    given = parser.parse_args(arguments)
    try:
        found = measure(given)
    except ToolkitError as error:
        print(f"train.bias: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if given.json else bias.in_words(found))
    return 0


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Open the base and measure the adapter that `main` was told."""
    spec = base_model.find_spec(given.base_model)
    folder = base_model.fetch(spec, given.models_dir)
    tokenizer = base_model.load_tokenizer(folder)
    ref = AdapterRef(digest=str(given.adapter), path=str(given.adapter))
    fingerprint = base_model.fingerprint(folder)
    with LocalEngine.open(folder, given.dtype, given.device, ENGINE, fingerprint) as engine:
        return report(engine, encoder(tokenizer), ref, spec.name, load(given.weights))


if __name__ == "__main__":
    sys.exit(main())

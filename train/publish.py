"""The last part of a run: the adapter's folder, proven by loading it the way serving does.

The folder is written as `adapter.tmp`: weights, which base they belong to, model card, loss curve.
Then the serving engine loads it on a fresh base and scores a few rows; its log-probabilities must
be the trainer's. Only then is the folder renamed to `adapter`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from data import bias
from data.durable import sync_files
from data.errors import TrainingFailed
from data.moderation import classifier
from serve.engine.base import AdapterRef, GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine
from serve.engine.runner import PROBE_TOKENS as TRIAL_TOKENS
from train.base_model import Base
from train.bias import ENGINE as BIAS_ENGINE
from train.bias import encoder, report
from train.config import RunConfig
from train.run import ORIGIN, RunFolder, write_json

LOSSES = (("train_loss", "training"), ("valid_loss", "validation"))
PROBE_ROWS = 3
PROBE_TOKENS = 192
TRIAL_PIECES = 32  # of the probe's rows, of which one is tried at every load
# Of a log-probability, the worst and the mean over tokens. Two right computations in bfloat16 are
# 0.03 to 0.07 apart on average (SmolLM2-135M), and 0.5 where a token is improbable.
TOLERANCE = {
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (2.0, 0.15),
    torch.float16: (0.25, 0.02),
}


def write_adapter(
    run: RunFolder,
    model: PeftModel,
    base: Base,
    config: RunConfig,
    rows: Sequence[Sequence[int]],
    summary: Mapping[str, Any],
    *,
    save: Callable[[Path], None] | None = None,
    curves: Sequence[tuple[str, str]] = LOSSES,
    serves: bool = True,
) -> None:
    """Save the adapter, check it through the engine, and put it in place.

    With `config.bias_report` the engine also measures its bias, which is kept beside it.

    Args:
        rows: Token ids to score; the first few are used.
        summary: What the model card tells of the run; `method` is how it was trained.
        save: Writes the adapter into a folder as PEFT does; by default all of `model`.
        curves: Names and labels of the metrics in the picture.
        serves: False for an adapter that the engine refuses, which is not checked through it.

    Raises:
        TrainingFailed: The engine's log-probabilities are not the trainer's.
    """
    folder = run.path / "adapter.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    if save is None:
        model.peft_config["default"].base_model_name_or_path = base.name  # no path of this machine
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    else:
        save(folder)
    write_json(folder / ORIGIN, base.origin)
    (folder / "README.md").write_text(model_card(base, summary), encoding="utf-8")
    plot_curves(run.metrics, folder / "loss.png", curves)
    kept = [list(row[:PROBE_TOKENS]) for row in rows[:PROBE_ROWS]]
    rows = [row if len(row) > 1 else row * 2 for row in kept]  # a token is scored after another
    probe = {"token_ids": rows, "logprobs": _score(model, rows)}
    tolerance = TOLERANCE[base.model.dtype]
    if serves:
        _try_out(folder, base, config, probe, tolerance)
        probe |= _trial(model, rows)
    write_json(folder / "probe.json", {**probe, "tolerance": tolerance[0]})
    sync_files(folder)
    shutil.rmtree(run.adapter, ignore_errors=True)
    folder.rename(run.adapter)


def model_card(base: Base, summary: Mapping[str, Any]) -> str:
    """Return the adapter's README in the hub's model-card form."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in summary.items())
    method = summary.get("method", "supervised fine-tuning")
    return f"""---
base_model: {base.name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, hone]
---

# A LoRA adapter of {base.name}

Trained by {method} with hone. Load it with PEFT:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base, "this/folder")
```

| | |
|---|---|
{facts}

![Curves by step](loss.png)

It does what its training data show, and was not checked beyond that: evaluate it on rows that it
has not seen before you rely on it.
"""


def plot_curves(metrics: Path, picture: Path, curves: Sequence[tuple[str, str]]) -> None:
    """Draw metrics by step: losses in one field, others below one another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines]
    together = all(name.endswith("loss") for name, _ in curves)
    count = 1 if together else len(curves)
    figure, fields = pyplot.subplots(
        count, figsize=(7, 4 if together else 2.4 * count), layout="constrained", squeeze=False
    )
    for index, (name, label) in enumerate(curves):
        axes = fields[0 if together else index][0]
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats a token)" if together else label)
        axes.grid(alpha=0.3)
        if together and points:
            axes.legend()
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


@torch.inference_mode()
def _score(model: PeftModel, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability of every token but the first, by the trainer's model."""
    model.eval()
    scores = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores.append(log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1).tolist())
    return scores


def _trial(model: PeftModel, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what every load of the adapter is tried on: a few tokens, of which it changes most.

    Tokens that the adapter hardly changes would not tell a wrong adapter from the right one; those
    that it makes likelier are told alike by all dtypes.
    """
    pieces = [
        row[start : start + TRIAL_TOKENS]
        for row in rows
        for start in range(0, len(row) - TRIAL_TOKENS + 1, TRIAL_TOKENS)
    ]
    pieces = pieces[:: max(1, math.ceil(len(pieces) / TRIAL_PIECES))]
    if not pieces:
        return {}
    ids = torch.tensor(pieces, device=model.device)
    tuned = _score_pieces(model, ids)
    with model.disable_adapter():
        plain = _score_pieces(model, ids)
    best = int((tuned - plain).sum(dim=-1).argmax())
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    found = {"token_ids": list(pieces[best]), "logprobs": tuned[best].tolist(), "dtype": dtype}
    return {"trial": found}


@torch.inference_mode()
def _score_pieces(model: PeftModel, ids: Tensor) -> Tensor:
    """Return the log-probabilities [N, T - 1] of pieces [N, T] that begin a text each."""
    model.eval()
    log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def _try_out(
    folder: Path,
    base: Base,
    config: RunConfig,
    probe: Mapping[str, Any],
    tolerance: tuple[float, float],
) -> None:
    """Load the adapter the way serving does, and check and measure it."""
    dtype = str(base.model.dtype).removeprefix("torch.")
    longest = max(map(len, probe["token_ids"]))
    limits = EngineConfig(max_batch=PROBE_ROWS, max_context=longest + 1)
    if config.bias_report:
        limits = replace(BIAS_ENGINE, max_context=max(BIAS_ENGINE.max_context or 0, longest + 1))
    adapter = AdapterRef(digest="probe", path=str(folder))
    with LocalEngine.open(base.folder, dtype, config.device, limits, base.fingerprint) as engine:
        _check_served(engine, adapter, probe, tolerance)
        if config.bias_report:
            read = encoder(base.tokenizer)
            found = report(engine, read, adapter, base.name, classifier.load())
            write_json(folder / bias.FILE, found)


def _check_served(
    engine: LocalEngine,
    adapter: AdapterRef,
    probe: Mapping[str, Any],
    tolerance: tuple[float, float],
) -> None:
    completions = engine.generate(
        [
            GenerationRequest(
                id=f"probe-{index}",
                prompt_ids=tuple(row),
                params=SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
                adapter=adapter,
            )
            for index, row in enumerate(probe["token_ids"])
        ]
    )
    differences = [
        abs(entry.logprob - log_prob)
        for completion, wanted in zip(completions, probe["logprobs"], strict=True)
        for entry, log_prob in zip(
            [entry for entry in (completion.prompt_logprobs or ()) if entry], wanted, strict=True
        )
    ]
    found = (max(differences), sum(differences) / len(differences))
    if not (found[0] <= tolerance[0] and found[1] <= tolerance[1]):  # NaN fails too
        raise TrainingFailed(
            f"The serving engine's log-probabilities differ from the trainer's by {found[1]:.2g} "
            f"on average, {found[0]:.2g} at most (allowed {tolerance[1]} and {tolerance[0]}): the "
            "adapter would answer differently from what was trained",
            code="probe_mismatch",
        )

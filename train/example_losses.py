"""The loss of each training row under the finished adapter: what to look at first in the data.

One line a row in `example_losses.jsonl`. It costs a forward pass over the data, so it is done only
up to `score_examples` rows and MAX_TOKENS tokens; above, an event says so.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from data.render import IGNORED
from train.batches import Rendered
from train.prepare import TrainingJob
from train.run import RunFolder, replace_text

MAX_TOKENS = 1_000_000
BATCH_TOKENS = 2048


def write_losses(run: RunFolder, model: Any, job: TrainingJob) -> None:
    """Write the losses, or tell why not; does nothing where they were not asked for."""
    limit, train = job.config.score_examples, job.train
    if not limit:
        return
    if len(train.examples) > limit or train.num_tokens > MAX_TOKENS:
        run.tell(
            f"The losses of single examples are not computed: {len(train.examples)} examples of "
            f"{train.num_tokens} tokens, of at most {limit} and {MAX_TOKENS}"
        )
        return
    found = score(model, train)
    lines = [
        json.dumps({"line": line, "tokens": len(example), **scores})
        for line, example, scores in zip(train.lines.tolist(), train.examples, found, strict=True)
    ]
    replace_text(run.losses, "".join(line + "\n" for line in lines))


@torch.inference_mode()
def score(model: Any, train: Rendered) -> list[dict[str, float]]:
    """Return each row's mean loss over its learned tokens, nats, their number and accuracy."""
    model.eval()
    rows = train.examples
    lengths = rows.lengths
    order = np.argsort(lengths, kind="stable").tolist()
    found: list[dict[str, float]] = [{} for _ in rows]
    batch: list[int] = []
    for position, index in enumerate(order):
        batch.append(index)
        following = order[position + 1] if position + 1 < len(order) else None
        full = following is None or (len(batch) + 1) * int(lengths[following]) > BATCH_TOKENS
        if full:
            for scored, values in zip(batch, _score_batch(model, batch, train), strict=True):
                found[scored] = values
            batch = []
    return found


def _score_batch(model: Any, batch: list[int], train: Rendered) -> list[dict[str, float]]:
    examples = [train.examples[index] for index in batch]
    longest = max(map(len, examples))
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.tensor(example.input_ids)
        labels[row, : len(example)] = torch.tensor(example.labels)
        mask[row, : len(example)] = 1
    place = model.device
    inputs = {"input_ids": ids.to(place), "attention_mask": mask.to(place)}
    scores = model(**inputs, labels=labels.to(place), fused_lm_head=True)
    counts = scores.label_mask.sum(1).double()
    losses = -scores.log_probs.double().sum(1) / counts
    accuracy = scores.is_top1.double().sum(1) / counts
    columns = zip(losses.tolist(), accuracy.tolist(), counts.tolist(), strict=True)
    return [
        {"loss": loss, "token_accuracy": right, "learned_tokens": int(count)}
        for loss, right, count in columns
    ]

"""A model of its own, for an adapter that cannot be served beside others.

DoRA rescales every output of a layer (arXiv:2402.09353), which the engine's mixed batches of plain
LoRA do not do. Its result is therefore the base with the adapter merged in: a folder that serves as
a base model (`HONE_MODEL=FOLDER hone serve`), not one of many adapters on a shared base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import TrainingFailed
from serve.engine.base import GenerationRequest, SamplingParams
from serve.engine.local import EngineConfig, LocalEngine
from train.base_model import Base
from train.run import RunFolder


def write_merged(run: RunFolder, model: Any, base: Base, device: str) -> None:
    """Merge the adapter of a PEFT model into its base and save it as `merged/`; the model is used
    up.

    The folder is written aside, loaded as serving loads a base, and must give the log-probabilities
    that the adapter's probe holds.

    Raises:
        TrainingFailed: It gives others.
    """
    folder = run.path / "merged.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    merged = model.merge_and_unload()
    merged.save_pretrained(str(folder), safe_serialization=True)
    base.tokenizer.save_pretrained(str(folder))
    probe = json.loads((run.adapter / "probe.json").read_text("utf-8"))
    dtype = str(base.model.dtype).removeprefix("torch.")
    worst = _worst(folder, dtype, device, probe)
    if not worst <= probe["tolerance"]:  # NaN fails too
        raise TrainingFailed(
            f"The merged model's log-probabilities differ from the trainer's by {worst:.2g} "
            f"(allowed {probe['tolerance']})",
            code="probe_mismatch",
        )
    shutil.rmtree(run.merged, ignore_errors=True)
    folder.rename(run.merged)
    run.tell(
        "A DoRA adapter is not served beside others; the base with it merged in lies in `merged` "
        "and serves as a base model"
    )


def _worst(folder: Path, dtype: str, device: str, probe: Mapping[str, Any]) -> float:
    """Return the largest difference between the engine's log-probabilities and the probe's; NaN
    where one is NaN."""
    rows = probe["token_ids"]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    requests = [
        GenerationRequest(f"probe-{index}", tuple(row), params) for index, row in enumerate(rows)
    ]
    longest = max(map(len, rows))
    config = EngineConfig(max_batch=len(rows), max_context=longest + 1)
    with LocalEngine.open(folder, dtype, device, config) as engine:
        completions = engine.generate(requests)
    differences = [
        abs(entry.logprob - log_prob)
        for completion, wanted in zip(completions, probe["logprobs"], strict=True)
        for entry, log_prob in zip(
            [entry for entry in (completion.prompt_logprobs or ()) if entry], wanted, strict=True
        )
    ]
    return float(np.max(differences))

"""What both contenders of `benchmarks/training.py` share: the words, the rows' order, the clock."""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

WARM_UP = 3  # steps that are not timed


class Clock(TrainerCallback):
    """Notes when each step ends, and the loss of each."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def start_alike(model: Any) -> None:
    """Draw the adapters' first weights from one seed, so that losses can be compared."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                module.reset_lora_parameters(adapter, True)


def words() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, required=True)
    for name in ("batch", "steps", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    return parser


def report(
    clock: Clock, lengths: list[list[int]], padded: list[int], loaded: int, dtype: str
) -> dict[str, Any]:
    """Return what is told of a run.

    Args:
        lengths: Real tokens of each row of each step.
        padded: Tokens that each step computed, padding included.
        loaded: Bytes at most in use before the first step.
        dtype: Of the base.
    """
    real = sum(sum(rows) for rows in lengths[WARM_UP : len(clock.times)])
    last = clock.losses[-max(1, len(clock.losses) // 4) :]
    return {
        "tokens_per_s": real / (clock.times[-1] - clock.times[WARM_UP - 1]),
        "padding": round(1 - sum(map(sum, lengths)) / sum(padded), 3),
        "final_loss": sum(last) / len(last),
        "peak_bytes": peak(),
        "loaded_bytes": loaded,
        "dtype": dtype,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""What happens beside the steps: metrics, progress, whole checkpoints, and stopping when told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.run import RunFolder

STOPPED = 143  # the exit status of a run that was told to stop: 128 + SIGTERM
GRACE_S = 7.0  # a step that takes longer is given up; the last whole checkpoint stands
TRAIN_NAMES = {
    "loss": "train_loss",
    "mean_token_accuracy": "train_mean_token_accuracy",
    "entropy": "train_entropy",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
}
VALID_NAMES = {
    "eval_loss": "valid_loss",
    "eval_mean_token_accuracy": "valid_mean_token_accuracy",
}


class Stopper(TrainerCallback):
    """Turns SIGTERM and SIGINT into a checkpoint and an orderly end after the step at hand.

    A step, evaluation or save that lasts beyond GRACE_S is given up.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.training = False

    def install(self) -> None:
        """Take the signals; before training they end the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked.set()
        if not self.training:
            sys.exit(STOPPED)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(STOPPED))
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.training = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.asked.is_set():
            control.should_save = True
            control.should_training_stop = True


class RunLog(TrainerCallback):
    """Writes metrics.jsonl and events.jsonl, and marks checkpoints whole."""

    def __init__(self, run: RunFolder, has_validation: bool):
        self._run = run
        self._has_validation = has_validation
        self._tokens = 0.0
        self._since = time.monotonic()
        self._evaluation: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record: dict[str, Any] = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch or 0.0, 4),
        }
        if "loss" in logs:
            record |= {ours: logs[name] for name, ours in TRAIN_NAMES.items() if name in logs}
            record |= self._speed(logs.get("num_tokens", 0.0))
        elif "eval_loss" in logs:
            record |= {ours: logs[name] for name, ours in VALID_NAMES.items() if name in logs}
            self._evaluation = {f"full_{ours}": logs[name] for name, ours in VALID_NAMES.items()}
        else:
            return  # the closing summary
        self._run.append(self._run.metrics, record)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self._run.mark_complete(state.global_step)
            self._run.tell(
                f"Checkpoint created at step {state.global_step}",
                step=state.global_step,
                metrics=self._evaluation,
            )

    def _speed(self, num_tokens: float) -> dict[str, float]:
        """Return real (unpadded) tokens so far, and those a second since the last record."""
        now = time.monotonic()
        gained, self._tokens = num_tokens - self._tokens, num_tokens
        seconds, self._since = now - self._since, now
        return {
            "trained_tokens": int(num_tokens),
            "tokens_per_s": round(max(gained, 0) / max(seconds, 1e-9), 1),
        }


class ProgressBar(TrainerCallback):
    """A bar with the loss beside it; on a terminal only."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task("training", note="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._progress.start()
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation loss"}
        for name, label in names.items():
            if logs and name in logs:
                self._progress.update(self._task, note=f"{label} {logs[name]:.3f}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._progress.stop()

"""What happens beside the steps: metrics, progress, whole checkpoints, and stopping when told."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from train.config import EarlyStopping
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
MODELS_KEPT = 3  # laid out for whoever publishes them
CHECKPOINT_NAMES = ("train_loss", "train_mean_token_accuracy")
VALID_NAMES = {
    "eval_loss": "valid_loss",
    "eval_mean_token_accuracy": "valid_mean_token_accuracy",
}
RENAMED = {*TRAIN_NAMES, *VALID_NAMES, "num_tokens", "epoch"}  # the rest keeps TRL's names


class Stopper(TrainerCallback):
    """Turns SIGTERM and SIGINT into a checkpoint and an orderly end after the step at hand.

    A step, evaluation or save that lasts beyond GRACE_S is given up.

    Attributes:
        every: A run that resumes right at multiples of so many steps alone ends at such a one.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.training = False
        self.every = 1

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

    def settle(self) -> None:
        """Call the alarm off: training has ended in order, and no step is to be given up."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.training = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        if self.asked.is_set() and state.global_step % self.every == 0:
            control.should_save = True
            control.should_training_stop = True


class KeptTokenCount(TrainerCallback):
    """Has checkpoints carry TRL's count of tokens, which else begins at 0 in a resumed run."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer._total_train_tokens = state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.num_input_tokens_seen = int(self._trainer._total_train_tokens)


class SaveAt(TrainerCallback):
    """Has a checkpoint made at the steps of its own choice."""

    def __init__(self, steps: Collection[int]):
        self._steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step in self._steps:
            control.should_save = True


class EvaluateAt(TrainerCallback):
    """Has the trainer evaluate at the steps of its own choice."""

    def __init__(self, steps: Collection[int]):
        self._steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step in self._steps:
            control.should_evaluate = True


class EarlyStop(TrainerCallback):
    """Ends a run whose validation loss no longer falls.

    It counts from the trainer's log, which a checkpoint carries, so a resumed run counts alike. One
    that was killed after its last step is at its end at once (`LoraTrainer` takes no step more).
    """

    def __init__(self, settings: EarlyStopping):
        self._settings = settings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.on_evaluate(args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        settings = self._settings
        stalled = evals_without_gain(losses, settings.min_delta, settings.warmup_evals)
        if stalled >= settings.patience:
            control.should_training_stop = True


def evals_without_gain(losses: Sequence[float], min_delta: float, warmup: int) -> int:
    """Return how many evaluations in a row, those of the warm-up aside, brought no lower loss."""
    best, count = float("inf"), 0
    for index, loss in enumerate(losses):
        if loss < best - min_delta:
            best, count = loss, 0
        elif index >= warmup:
            count += 1
    return count


class RunLog(TrainerCallback):
    """Writes metrics.jsonl and events.jsonl, and marks checkpoints whole.

    Args:
        published: Tells of a step whether its checkpoint becomes a model; others are only for
            resuming.
        origin: Which base the adapter belongs to, written beside it.
        keep: How many checkpoints stay, beside the best, once a new one is marked whole.
    """

    def __init__(
        self,
        run: RunFolder,
        published: Callable[[int], bool],
        origin: Mapping[str, str],
        keep: int,
    ) -> None:
        self._run = run
        self._keep = keep
        self._published = published
        self._origin = origin
        self._training: dict[str, float] = {}
        self._tokens = 0.0
        self._since = time.monotonic()
        self._evaluation: dict[str, float] = {}
        self._evaluated_at = -1

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        told = (record.get("trained_tokens") for record in self._run.read(self._run.metrics))
        self._tokens = max((float(tokens) for tokens in told if tokens is not None), default=0.0)
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
            record |= {name: value for name, value in logs.items() if name not in RENAMED}
            self._training = {name: record[name] for name in CHECKPOINT_NAMES if name in record}
            record |= self._speed(logs.get("num_tokens", 0.0))
        elif "eval_loss" in logs:
            record |= {ours: logs[name] for name, ours in VALID_NAMES.items() if name in logs}
            found = {ours: logs[name] for name, ours in VALID_NAMES.items() if name in logs}
            record |= {name: value for name, value in logs.items() if name not in RENAMED}
            self._evaluated_at = state.global_step
            self._evaluation = found | {f"full_{name}": value for name, value in found.items()}
        elif any(name.startswith("eval_") for name in logs):  # of sampled answers
            for name, value in logs.items():
                if name.startswith("eval_"):
                    record[f"eval/{name.removeprefix('eval_')}"] = value
        else:
            return  # the closing summary
        self._run.append(self._run.metrics, record)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        step = state.global_step
        if self._published(step):
            self._run.lay_out_model(step, self._origin, max(MODELS_KEPT, self._keep))
        self._run.mark_complete(step)
        folder = str(self._run.checkpoints)
        rotate_checkpoints(folder, self._keep, state.best_model_checkpoint)
        if self._published(step):
            metrics: dict[str, float] = {"step": step, **self._training}
            if self._evaluated_at == step:
                metrics |= self._evaluation
            message = f"Checkpoint created at step {step}"
            self._run.tell(message, step=step, checkpoint=step, metrics=metrics)

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

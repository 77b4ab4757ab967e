"""TRL's SFTTrainer with what hone asks of a step and of a validation.

Rows come in an order of their own (`LengthGroupedSampler`), the head skips positions without loss
(`loss_head`), a step's rows go through the model in parts that fit in memory, validation counts
every token alike, and a loss that is not finite ends the run. The loss of a step is a mean over its
learned tokens, so how it is cut into parts changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import Sampler
from transformers import TrainerControl
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from data.errors import ConfigError, TrainingFailed
from data.render import IGNORED
from train.batches import LengthGroupedSampler, name_lines
from train.class_metrics import Classes, Found, gathered
from train.fused_layers import fuse_layers
from train.loss_head import use_compact_head
from train.memory import describe_memory, is_out_of_memory
from train.together import Seat

Batch = dict[str, torch.Tensor]

ROUND = 4  # tokens; libraries prepare a product anew, for milliseconds, for each length they meet


class LoraTrainer(SFTTrainer):
    """Trains an adapter.

    Args:
        order: The order of the training rows.
        max_rows: Most rows that go through the model at once.
        max_tokens: Most tokens, padding included, that do; one row always does.
        prompt_loss_weight: Of a token without a label, beside 1 for one with a label. A step's loss
            is the weighted mean, `sum(w nll) / sum(w)`.
        lr_ratio: Learning rate of the matrices B over that of the others (LoRA+, arXiv:2402.12354).
        lines: Of each training row, for messages about it.
        seat: Where the run takes its turns with others on the same base, if it does.
        classes: That the validation rows are classified into, if they are.
        kwargs: Of SFTTrainer.
    """

    def __init__(
        self,
        order: LengthGroupedSampler,
        max_rows: int,
        max_tokens: int,
        prompt_loss_weight: float = 0.0,
        lr_ratio: float = 1.0,
        lines: Sequence[int] | NDArray[np.int64] = (),
        seat: Seat | None = None,
        classes: Classes | None = None,
        **kwargs: Any,
    ) -> None:
        self._order = order
        self._lr_ratio = lr_ratio
        self._lines = lines
        self._seat = seat
        self._classes = classes
        self._prompt_loss_weight = prompt_loss_weight
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        super().__init__(**kwargs)
        if not is_deepspeed_zero3_enabled():  # it gathers a weight for its own module's forward
            fuse_layers(self.model.get_base_model())
        if seat is not None:
            seat.take(self)
        is_compact = use_compact_head(self.model.get_base_model())
        if prompt_loss_weight and not is_compact:
            raise ConfigError(
                [
                    f"prompt_loss_weight is {prompt_loss_weight}, but this base model scales its "
                    "logits in a way of its own; leave it at 0"
                ]
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Accumulate the gradients of one step, part by part; returns the step's loss."""
        if self._prompt_loss_weight:
            num_items_in_batch = self._total_weight(inputs)
        parts = list(cut_batch(inputs, self._max_rows, self._max_tokens))
        losses = []
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                try:
                    losses.append(self._part(model, part, num_items_in_batch))
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise self._no_room(part, error) from error
                    raise
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise TrainingFailed(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; the last whole "
                f"checkpoint is kept. Lower learning_rate, or look for broken rows"
                f"{self._suspects()}",
                code="loss_not_finite",
            )
        return loss

    def _part(self, model: torch.nn.Module, part: Batch, num_items: Any) -> torch.Tensor:
        if self._seat is None:
            return super().training_step(model, part, num_items)
        work = partial(super().training_step, model, part, num_items)
        return self._seat.compute(part["input_ids"].numel(), work)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, with prompts at their weight in training."""
        if self._prompt_loss_weight and self.model.training:
            inputs = {**inputs, "prompt_loss_weight": self._prompt_loss_weight}  # type: ignore[dict-item]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make AdamW, with a learning rate of its own for the matrices B where that is asked."""
        if self._lr_ratio == 1:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer: Any = create_loraplus_optimizer(
            model=self.model,
            optimizer_cls=kind,
            loraplus_lr_ratio=self._lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        return self.optimizer

    def _no_room(self, part: Batch, error: RuntimeError) -> TrainingFailed:
        """Say how large the part was that did not fit, and what makes it smaller."""
        rows, tokens = part["input_ids"].shape
        smaller = max(8, rows * tokens // 2)
        advice = (
            f"set micro_batch_tokens={smaller} (the step's result stays the same)"
            if rows > 1
            else f"set max_length={tokens // 2}, as one row by itself is too long"
        )
        return TrainingFailed(
            f"Memory ran out at step {self.state.global_step + 1}, in a part of {rows} rows of "
            f"{tokens} tokens, padding included ({describe_memory(self.args.device)}): {advice}, "
            "or gradient_checkpointing=true, or a smaller base; the last checkpoint is kept. "
            f"{str(error).splitlines()[0]}",
            code="out_of_memory",
        )

    def _suspects(self) -> str:
        """Name the lines of the step at hand."""
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes
        at = self.state.global_step * size % (math.ceil(len(self._order) / size) * size)
        rows = list(self._order)[at : at + size]
        if not len(self._lines):
            return ""
        return f"; the step's rows were {name_lines(sorted(self._lines[row] for row in rows))}"

    def _total_weight(self, inputs: Batch) -> torch.Tensor:
        """Return the sum of the weights of a step's tokens, over all processes: []."""
        labelled = inputs["labels"][:, 1:].ne(IGNORED).sum()
        others = inputs["attention_mask"][:, 1:].sum() - labelled
        weight = (labelled + self._prompt_loss_weight * others).to(self.args.device)
        return self.accelerator.reduce(weight)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate token by token: each counts alike, however the rows fall into batches."""
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        classified: Found = []
        for batch in self.get_eval_dataloader():
            for part in cut_batch(batch, self._max_rows, self._max_tokens):
                inputs = self._prepare_inputs(part)
                totals += self._sums(inputs)
                if self._classes is not None:
                    with self.compute_loss_context_manager():
                        classified += self._classes.scores(self._bare_model(), inputs)
        loss, correct, count = self.accelerator.reduce(totals).tolist()
        metrics = {"eval_loss": loss / count, "eval_mean_token_accuracy": correct / count}
        if self._classes is not None:
            metrics |= self._classes.metrics(gathered(classified))
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _bare_model(self) -> Any:
        """Return the causal LM with the adapter in it."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _sums(self, inputs: Batch) -> torch.Tensor:
        """Return a batch's loss, its right tokens, and its learned tokens, each summed: [3]."""
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.model(**inputs, fused_lm_head=True)
        parts = (-scores.log_probs.sum(), scores.is_top1.sum(), scores.label_mask.sum())
        return torch.stack([part.double() for part in parts])


def cut_batch(batch: Batch, max_rows: int, max_tokens: int) -> Iterator[Batch]:
    """Cut a padded batch [B, T] into parts of rows of similar length, each as short as it can be.

    Rows are padded on the right, to a multiple of ROUND where the batch is so long. A part has at
    most `max_rows` rows and `max_tokens` tokens, but always one row.
    """
    lengths = batch["attention_mask"].sum(1)
    order = torch.argsort(lengths, stable=True).tolist()
    most = batch["attention_mask"].shape[1]
    widths = [min(most, length + -length % ROUND) for length in lengths.tolist()]
    start = 0
    for end in range(1, len(order) + 1):
        is_full = end < len(order) and (
            end - start == max_rows or (end - start + 1) * widths[order[end]] > max_tokens
        )
        if is_full or end == len(order):
            rows = order[start:end]
            yield {name: value[rows, : widths[rows[-1]]] for name, value in batch.items()}
            start = end

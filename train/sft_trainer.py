"""TRL's SFTTrainer with what hone asks of a step and of a validation.

Rows come in an order of their own (`LengthGroupedSampler`), the head skips positions without loss
(`loss_head`), a step's rows go through the model in parts that fit in memory, validation counts
every token alike, and numbers that are not finite end the run. The loss of a step is a mean over
its learned tokens, so how it is cut into parts changes nothing but rounding. Nor does it matter how
many processes share the rows: what accelerate repeats to fill the last batch is left out, and all
compute equally many parts, since they meet in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from numpy.typing import NDArray
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerControl
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
        self._total_train_tokens = 0  # TRL's count
        super().__init__(**kwargs)
        if not is_deepspeed_zero3_enabled():  # it gathers a weight for its own module's forward
            fuse_layers(self.model.get_base_model())
        if seat is not None:
            seat.take(self)
        self._learned = [p for p in self.model.parameters() if p.requires_grad]
        self._num_parameters = self.model.num_parameters(exclude_embeddings=True)
        know_modules(self.model)
        if self.accelerator.distributed_type == DistributedType.NO:
            self.model.zero_grad = partial(_zero_grad, self._learned)
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

    def _run_epoch(self, **kwargs: Any) -> None:
        """Train an epoch, unless the run was over before it: early stopping may have ended it."""
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """Return what TRL's trainer does, without the rows that only fill the last batch."""
        at = self._first_row()
        size = self.args.per_device_train_batch_size
        own = (self._own_rows(batch, at, size, len(self._order)) for batch in epoch_iterator)
        return super().get_batch_samples(own, num_batches, device)

    def _first_row(self) -> int:
        """Return the place in the epoch's order of the first row of the step at hand."""
        size = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return self.state.global_step * size % (math.ceil(len(self._order) / size) * size)

    def _own_rows(self, batch: Batch, at: int, size: int, count: int) -> Batch:
        """Return the rows [B, T] of this process that are no repetition, or an idle batch.

        Args:
            at: Place of the first row that the processes share, `size` each, of `count`.
        """
        left = count - at - self.accelerator.process_index * size
        return {name: value[:left] for name, value in batch.items()} if left > 0 else _idle(batch)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Cut a batch into parts that fit, as many in every process."""
        parts = list(cut_batch(batch, self._max_rows, self._max_tokens))
        if self.accelerator.num_processes == 1:
            return parts
        counts = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
        return [_idle(batch)] * (int(counts.max()) - len(parts)) + parts

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Accumulate the gradients of one step, part by part; returns the step's loss."""
        if self._prompt_loss_weight:
            num_items_in_batch = self._total_weight(inputs)
        tokens = self._total_train_tokens
        parts = self._parts(inputs)
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
        loss = whole = torch.stack(losses).sum()
        if self.accelerator.num_processes > 1:  # all have to see what one does
            seen = inputs["attention_mask"].sum() * _learns(inputs)
            totals = self.accelerator.reduce(torch.stack([loss.double(), seen.double()]))
            whole = totals[0] / self.accelerator.num_processes
            self._total_train_tokens = tokens + int(totals[1])  # without idle parts
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self._require_finite("loss", whole)
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return what Trainer does, without counting the model's weights again."""
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Clip as Trainer does; one process need not look for what learns."""
        if self.accelerator.distributed_type != DistributedType.NO:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._learned, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's length, which has to be finite before a weight changes."""
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        if found is not None:  # DeepSpeed may not know it yet
            self._require_finite("length of the gradient", found)
        return found

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save the state, unless a weight is not finite."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and weight.numel():
                largest = weight.detach().abs().max()
                self._require_finite(f"largest number of {name}", largest, after=True)
        super()._save_checkpoint(model, trial)

    def _require_finite(self, what: str, value: Any, *, after: bool = False) -> None:
        """Raise TrainingFailed where a number is not finite; `after` the step is done."""
        if math.isfinite(value):
            return
        step = self.state.global_step + (not after)
        raise TrainingFailed(
            f"The {what} is {float(value)} at step {step}; the last whole checkpoint is kept. "
            f"Lower learning_rate, or look for broken rows{'' if after else self._suspects()}",
            code="loss_not_finite",
        )

    def _part(self, model: torch.nn.Module, part: Batch, num_items: Any) -> torch.Tensor:
        if self._seat is None:
            return super().training_step(model, part, num_items)
        work = partial(super().training_step, model, part, num_items)
        return self._seat.compute(part["input_ids"].numel(), work)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, with prompts at their weight in training."""
        if self._prompt_loss_weight and self.model.training and _learns(inputs):
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
        if self._seat is not None:
            advice += ", or --max-tokens 0, which computes each run's rows alone"
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
        if not len(self._lines):
            return ""
        at = self._first_row()
        rows = list(self._order)[at : at + size]
        return f"; the step's rows were {name_lines(sorted(self._lines[row] for row in rows))}"

    def _total_weight(self, inputs: Batch) -> torch.Tensor:
        """Return the sum of the weights of a step's tokens, over all processes: []."""
        labelled = inputs["labels"][:, 1:].ne(IGNORED).sum()
        others = inputs["attention_mask"][:, 1:].sum() - labelled
        weight = (labelled + self._prompt_loss_weight * others * _learns(inputs)).to(
            self.args.device
        )
        return self.accelerator.reduce(weight)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate token by token: each counts once, however the rows fall into batches.

        Raises:
            TrainingFailed: The loss is not finite.
        """
        self.model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        classified: Found = []
        size = self.args.per_device_eval_batch_size
        count = len(self.eval_dataset)
        for index, batch in enumerate(self.get_eval_dataloader()):
            at = index * size * self.accelerator.num_processes
            for part in self._parts(self._own_rows(batch, at, size, count)):
                inputs = self._prepare_inputs(part)
                totals += self._sums(inputs)
                if self._classes is not None:
                    with self.compute_loss_context_manager():
                        classified += self._classes.scores(self._bare_model(), inputs)
        loss, correct, learned = self.accelerator.reduce(totals).tolist()
        self._require_finite("validation loss", loss / learned, after=True)
        metrics = {"eval_loss": loss / learned, "eval_mean_token_accuracy": correct / learned}
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


def know_modules(model: torch.nn.Module) -> None:
    """Let `train`, which every step calls, go through a list of modules, not the model's tree.

    A model with adapters has thousands of modules, and a walk through them takes 5 to 10 ms. One
    whose modules do more than note the mode (DoRA's caches, kernels of the hub) is left alone.
    """
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, PreTrainedModel):
            if getattr(module, "use_kernels", False):
                return
        elif type(module).train is not torch.nn.Module.train:
            return
    every = [module.__dict__ for module in modules]

    def train(mode: bool = True) -> torch.nn.Module:
        for fields in every:
            fields["training"] = mode
        return model

    model.train = train  # type: ignore[method-assign]


def _zero_grad(learned: Sequence[torch.nn.Parameter], set_to_none: bool = True) -> None:
    for parameter in learned:
        if set_to_none or parameter.grad is None:
            parameter.grad = None
        else:
            parameter.grad.zero_()


def _idle(batch: Batch) -> Batch:
    """Return a batch [1, 2] without loss, for a process that others would wait for in vain."""
    few = {name: value[:1, :2] for name, value in batch.items()}
    return {**few, "labels": torch.full_like(few["labels"], IGNORED)}


def _learns(batch: Batch) -> bool:
    """Tell whether a batch has a label: an idle one has none."""
    return bool(batch["labels"].ne(IGNORED).any())


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

"""TRL's RewardTrainer, on prompts with all their comparisons, with probabilities as labels.

The loss of a pair is -[p log sigmoid(d - m) + (1 - p) log sigmoid(-d)], d the difference of the
scores, p the probability that the first is better and m its margin: Bradley-Terry for p = 1, a tie
for p = 0.5. A step's loss is the mean over its pairs, however it is cut into parts. The score is
the head on the last token by its index; nothing is inferred from padding, so EOS is always scored.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, TrainerControl
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardTrainer

from data.errors import TrainingFailed
from data.reward_head import HEAD
from rlhf.comparisons import Group, Pair, batches_of
from train.fused_layers import fuse_layers

Batch = dict[str, Any]


class ScoredBase:
    """A causal LM whose forward pass gives one score a row while a reward model is trained."""

    def __init__(self, model: PreTrainedModel, config: LoraConfig):
        width = model.config.get_text_config().hidden_size
        self._base = model
        self._forward = model.forward
        model.config.num_labels = 1
        fuse_layers(model)
        self.model: PeftModel = get_peft_model(model, config)
        head = nn.Linear(width, 1, bias=False, dtype=torch.float32, device=model.device)
        nn.init.normal_(head.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020
        model.score = head
        model.forward = types.MethodType(_score_rows, model)

    @property
    def head(self) -> nn.Linear:
        return self._base.score

    def give_back(self) -> None:
        """Make the base a language model again."""
        self._base.forward = self._forward


def _score_rows(
    self: PreTrainedModel, input_ids: Tensor, ends: Tensor, **_: Any
) -> SequenceClassifierOutput:
    """Return the score [b, 1] at position `ends` [b] of each row, padded on the right."""
    hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(ends), device=ends.device), ends]
    return SequenceClassifierOutput(logits=self.score(last.float()))


def pair_loss(
    better: Tensor, worse: Tensor, prob: Tensor, margin: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Return the loss [P] of pairs with scores `better` and `worse`.

    Args:
        prob: That `better` is the better one.
        margin: That it should have.
        smoothing: Probability that a judgement is the wrong way round.
    """
    prob = prob * (1 - smoothing) + (1 - prob) * smoothing
    difference = better - worse
    return -(prob * logsigmoid(difference - margin) + (1 - prob) * logsigmoid(-difference))


class PairTrainer(RewardTrainer):
    """Trains a reward model.

    Args:
        scored: The model.
        max_tokens: Most tokens, padding included, that go through the model at once.
        smoothing: See `pair_loss`.
        center: Times the mean squared sum of a pair's scores.
        kwargs: Of RewardTrainer.
    """

    def __init__(
        self, scored: ScoredBase, max_tokens: int, smoothing: float, center: float, **kwargs: Any
    ) -> None:
        self._scored = scored
        self._max_tokens = max_tokens
        self._smoothing = smoothing
        self._center = center
        self.loss_is_scaled_for_ga = True
        super().__init__(model=scored.model, data_collator=list, **kwargs)
        for parameter in scored.head.parameters():
            parameter.requires_grad_(True)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # rendered already

    def training_step(
        self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Any = None
    ) -> Tensor:
        """Accumulate the gradients of one step, part by part; returns the step's mean loss."""
        model.train()
        groups = [as_group(row) for row in inputs][: self._num_own()]
        count = torch.tensor(float(sum(len(group.pairs) for group in groups)))
        total = self._summed(count.to(self.args.device)) / self.accelerator.num_processes
        parts = batches_of(groups, self._max_tokens)
        idle = not parts  # others wait for this process's gradient all the same
        parts = parts or [[as_group(inputs[0])]]
        loss = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                summed, scores = self._sums(model, part)
                summed = summed * 0 if idle else summed
                self.accelerator.backward(summed / total)
            loss += summed.detach() / total
            if not idle:
                self._note(part, scores.detach())
        if not torch.isfinite(loss):
            raise TrainingFailed(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}; the last whole "
                "checkpoint is kept. Lower learning_rate",
                code="loss_not_finite",
            )
        self._total_train_tokens += sum(group.num_tokens for group in groups)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def _num_own(self) -> int:
        """Return how many of this process's groups are no repetition that fills the last batch."""
        own, count = self.args.per_device_train_batch_size, len(self.train_dataset)
        size = own * self.accelerator.num_processes
        at = self.state.global_step * size % (math.ceil(count / size) * size)
        return max(0, count - at - self.accelerator.process_index * own)

    def _sums(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the pairs of some groups, and the answers' scores."""
        rows = [ids for group in groups for ids in group.answers]
        scores = score_rows(model, rows, self.args.device)
        better, worse, prob, margin = _columns(groups, self.args.device)
        losses = pair_loss(scores[better], scores[worse], prob, margin, self._smoothing)
        if self._center:
            losses = losses + self._center * (scores[better] + scores[worse]).square()
        return losses.sum(), scores

    def _note(self, groups: Sequence[Group], scores: Tensor) -> None:
        better, worse, prob, _ = _columns(groups, self.args.device)
        difference = scores[better] - scores[worse]
        metrics = self._metrics["train"]
        decided = prob > 0.5
        if bool(decided.any()):
            metrics["accuracy"].append((difference[decided] > 0).float().mean().item())
        metrics["margin"].append(difference.mean().item())
        metrics["mean_reward"].append(scores.mean().item())
        metrics["min_reward"].append(scores.min().item())
        metrics["max_reward"].append(scores.max().item())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out pairs."""
        self.model.eval()
        groups = [as_group(row) for row in self.eval_dataset]
        mine = groups[self.accelerator.process_index :: self.accelerator.num_processes]
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for part in batches_of(mine, self._max_tokens):
                summed, scores = self._sums(self.model, part)
                better, worse, prob, _margin = _columns(part, self.args.device)
                wins = ((scores[better] > scores[worse]) & (prob > 0.5)).sum()
                found = (summed, wins, (prob > 0.5).sum(), torch.tensor(len(better)))
                totals += torch.stack([value.double().to(totals.device) for value in found])
        total, right, decided, count = self._summed(totals).tolist()
        metrics = {"eval_loss": total / count, "eval_accuracy": right / max(decided, 1)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _summed(self, value: Tensor) -> Tensor:
        """Return the sum over processes."""
        summed: Tensor = self.accelerator.reduce(value)
        return summed

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # the first process alone
            return
        folder = Path(output_dir or str(self.args.output_dir))
        save_file({"score.weight": self._scored.head.weight.detach().cpu()}, folder / HEAD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        weight = load_file(Path(resume_from_checkpoint) / HEAD)["score.weight"]
        with torch.no_grad():
            self._scored.head.weight.copy_(weight)


def score_rows(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the raw score [b] of each row of a `ScoredBase`'s model."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)  # any padding: it is never read
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    return model(input_ids=ids.to(device), ends=ends).logits.squeeze(-1)


def as_row(group: Group) -> Batch:
    """Return a group as a row of a dataset."""
    return {
        "prompt": list(group.prompt),
        "answers": [list(ids) for ids in group.answers],
        "lengths": list(group.lengths),
        "pairs": [[p.better, p.worse, p.line, p.judgements] for p in group.pairs],
        "probs": [p.prob for p in group.pairs],
        "margins": [p.margin for p in group.pairs],
    }


def as_group(row: Batch) -> Group:
    """Return a row of a dataset as the group that it was."""
    pairs = [
        Pair(better, worse, prob, margin, line, judgements)
        for (better, worse, line, judgements), prob, margin in zip(
            row["pairs"], row["probs"], row["margins"], strict=True
        )
    ]
    answers = [tuple(ids) for ids in row["answers"]]
    return Group(tuple(row["prompt"]), answers, list(row["lengths"]), pairs)


def _columns(
    groups: Sequence[Group], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pairs' rows, probabilities and margins, rows counted over all groups."""
    better, worse, prob, margin, start = [], [], [], [], 0
    for group in groups:
        for pair in group.pairs:
            better.append(start + pair.better)
            worse.append(start + pair.worse)
            prob.append(pair.prob)
            margin.append(pair.margin)
        start += len(group.answers)
    return (
        torch.tensor(better, device=device),
        torch.tensor(worse, device=device),
        torch.tensor(prob, device=device),
        torch.tensor(margin, device=device),
    )

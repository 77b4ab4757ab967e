"""The language-model head, computed only where there is loss.

TRL's fused head scores every position unless Triton is there, and a prompt's positions have no
loss: on CPU that was 38 % of a step for rows of 26 tokens with 7 learned. Selecting the positions
into one flat matrix first gives the same numbers for a fraction of the work, on any device.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from data.render import IGNORED
from train import native_head

CHUNK = 1024  # positions whose logits exist at the same time, where C does not compute them
ROUND = 16
SCALED = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass
class TokenScores(ModelOutput):
    """Per-token fields [B, T-1], zero where there is no loss; named as TRL's trainer reads them."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None


def use_compact_head(model: PreTrainedModel) -> bool:
    """Give a causal LM that TRL's trainer has patched a head that skips positions without loss.

    With `prompt_loss_weight`, it scores the positions without a label too, and multiplies their
    log-probabilities by the weight; entropy and accuracy stay those of the labels.

    Models that scale their logits in a way of their own keep TRL's head, which knows them.

    Returns:
        Whether the model has it now.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SCALED):
        return False
    softcap = getattr(config, "final_logit_softcapping", None)
    trl_forward = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        prompt_loss_weight: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None or getattr(config, "output_router_logits", False):
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        attention_mask = kwargs.pop("attention_mask", None)  # rows are padded on the right
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != IGNORED
        scored = mask
        if prompt_loss_weight:
            scored = attention_mask[:, 1:].bool()
            targets = kwargs["input_ids"][:, 1:]
        scores = _score(self.get_output_embeddings(), hidden[scored], targets[scored], softcap)
        log_probs, entropy, is_top1 = (
            part.new_zeros(mask.shape).masked_scatter(scored, part) for part in scores
        )
        if prompt_loss_weight:
            log_probs = torch.where(mask, log_probs, prompt_loss_weight * log_probs)
            entropy, is_top1 = entropy * mask, is_top1 * mask
        return TokenScores(log_probs, entropy, is_top1, mask)

    model.forward = types.MethodType(forward, model)
    return True


def _score(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> list[torch.Tensor]:
    """Return log-probability, entropy and is-top-1 of each target: hidden [N, D], targets [N]."""
    if softcap is None and _is_frozen(head):
        return list(_FrozenHead.apply(hidden, targets, head))
    parts = []
    for start in range(0, max(1, len(targets)), CHUNK):
        chunk = (head, hidden[start : start + CHUNK], targets[start : start + CHUNK], softcap)
        if len(targets) <= CHUNK:
            parts.append(_score_chunk(*chunk))
        else:  # the backward pass computes a chunk's logits again rather than keep them all
            parts.append(checkpoint(_score_chunk, *chunk, use_reentrant=False))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _is_frozen(head: torch.nn.Module) -> bool:
    """Tell whether the head is one plain matrix that does not learn, all of it here."""
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and type(head.weight) is torch.nn.Parameter
        and not head.weight.requires_grad
        and head.weight.shape == (head.out_features, head.in_features)
    )


class _FrozenHead(torch.autograd.Function):
    """Scores as `_score`'s, with the gradient of the hidden states [N, D] found on the way.

    A target's log-probability has the gradient (onehot - p) W, whatever its weight in the loss. So
    the logits are used up chunk by chunk, and nothing of the vocabulary's size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Linear
    ) -> tuple[torch.Tensor, ...]:
        weight = head.weight
        if native_head.suits(head, hidden):
            scores = native_head.scores(weight, hidden, targets, slopes=ctx.needs_input_grad[0])
            ctx.save_for_backward(scores.slopes)
            ctx.mark_non_differentiable(scores.entropies, scores.is_top1)
            return scores.log_probs, scores.entropies, scores.is_top1
        log_probs, entropy, is_top1 = (
            torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            at = slice(start, start + CHUNK)
            target = targets[at, None]
            logits = (_whole(hidden[at]) @ weight.t())[: len(target)].float()
            highest, index = logits.max(-1, keepdim=True)
            probs = torch.softmax(logits, -1)
            total = highest - probs.gather(-1, index).log()  # log of the sum of exponentials
            log_probs[at] = (logits.gather(-1, target) - total).squeeze(-1)
            entropy[at] = total.squeeze(-1) - torch.linalg.vecdot(probs, logits)
            is_top1[at] = (index == target).squeeze(-1).float()
            if gradient is not None:
                probs.scatter_add_(-1, target, torch.full_like(highest, -1))
                found = _whole(probs.to(hidden.dtype)) @ weight
                gradient[at] = found[: len(target)].neg_()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(gradient.dtype), None, None


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """Add rows of zeros [N, D] up to a multiple of ROUND, so that products are of few shapes."""
    return functional.pad(rows, (0, 0, 0, -len(rows) % ROUND))


def _score_chunk(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = head(hidden).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_probs = functional.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = (log_probs.argmax(-1) == targets).float()
    return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy, is_top1

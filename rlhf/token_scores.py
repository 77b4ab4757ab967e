"""Log-probabilities of chosen tokens, without ever holding all their logits.

The head is frozen, so how a token's log-probability depends on its hidden state is one vector a
token, which the forward pass works out chunk by chunk while it has the logits: with z the logits
and p their softmax, the gradient by z is (onehot - p) / temperature. The backward pass is then one
multiplication, and of a chunk's [C, V] logits nothing stays. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train import native_head

CHUNK_BYTES = 16 << 20  # of float32 logits at a time
Logits = Callable[[Tensor], Tensor]


class HeadLogits:
    """What turns hidden states [N, D] into float32 logits [N, V] as the model does.

    Args:
        model: A causal LM of transformers; scales and caps that some put on logits are kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head: Any = model.get_output_embeddings()
        config = model.config.get_text_config()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.is_plain = self._softcap is None and self._scale == 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.head(hidden).float()
        if self._scale != 1.0:
            found = found * self._scale
        return found if self._softcap is None else torch.tanh(found / self._softcap) * self._softcap


def chosen_scores(
    logits: Logits, hidden: Tensor, chosen: Tensor, temperature: float, closed_form: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy [N] of each position's distribution, in nats.

    Args:
        logits: `HeadLogits`, or what does the same.
        hidden: [N, D], what the head reads.
        chosen: [N], ids of the chosen tokens.
        temperature: Divides the logits.
        closed_form: Gradients reach `hidden` alone, and only through the log-probabilities: right
            where `logits` has nothing to train and the entropy is not in the loss.
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    if closed_form and learns:
        return _ClosedForm.apply(hidden, chosen, logits, temperature)
    if not torch.is_grad_enabled() and _is_native(logits, hidden):
        found = native_head.scores(logits.head.weight, hidden, chosen, temperature, slopes=False)
        return found.log_probs, found.entropies
    parts = []
    for part in _chunks(logits, hidden):
        given = (logits, hidden[part], chosen[part], temperature)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_score, *given, use_reentrant=False))
        else:
            parts.append(_score(*given))
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


@torch.no_grad()
def divergence(
    ours: Logits, theirs: Logits, hidden: Sequence[Tensor], temperature: float
) -> Tensor:
    """Return KL(ours || theirs) [N] of each position's distributions over all tokens, in nats.

    Args:
        ours: From hidden states to logits, as `HeadLogits`.
        theirs: Of the distribution that it is measured against.
        hidden: [N, D] of ours, and of theirs.
        temperature: Divides the logits of both.
    """
    parts = []
    for part in _chunks(ours, hidden[0]):
        log_p, log_q = (
            functional.log_softmax(logits(states[part]) / temperature, dim=-1)
            for logits, states in zip((ours, theirs), hidden, strict=True)
        )
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, chosen: Tensor, logits: Logits, temperature: float
    ) -> tuple[Tensor, Tensor]:
        if _is_native(logits, hidden):
            scores = native_head.scores(logits.head.weight, hidden, chosen, temperature)
            ctx.save_for_backward(scores.slopes)
            ctx.mark_non_differentiable(scores.entropies)
            return scores.log_probs, scores.entropies
        slopes = torch.empty_like(hidden)
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies = torch.empty_like(log_probs)
        for part in _chunks(logits, hidden):
            with torch.enable_grad():
                given = hidden[part].detach().requires_grad_()
                found = logits(given)
            with torch.no_grad():
                every = functional.log_softmax(found / temperature, dim=-1)
                towards = every.exp()
                entropies[part] = -(towards * every).sum(-1)
                index = chosen[part, None]
                log_probs[part] = every.gather(-1, index).squeeze(-1)
                towards.neg_().scatter_add_(-1, index, torch.ones_like(index, dtype=towards.dtype))
            (slopes[part],) = torch.autograd.grad(found, given, towards.div_(temperature))
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0][:, None].to(slopes.dtype), None, None, None


def _is_native(logits: Logits, hidden: Tensor) -> TypeGuard[HeadLogits]:
    """Tell whether machine code computes the scores."""
    is_plain = isinstance(logits, HeadLogits) and logits.is_plain
    return is_plain and native_head.suits(logits.head, hidden)  # type: ignore[attr-defined]


def _score(
    logits: Logits, hidden: Tensor, chosen: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_probs = functional.log_softmax(logits(hidden) / temperature, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, chosen[:, None]).squeeze(-1), entropy


def _chunks(logits: Logits, hidden: Tensor) -> list[slice]:
    with torch.no_grad():
        vocabulary = logits(hidden[:1]).shape[-1]
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(at, at + size) for at in range(0, max(1, len(hidden)), size)]

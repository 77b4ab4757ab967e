"""Causal attention of short rows on a CPU, forward and backward written out.

PyTorch's fused attention cuts a row into blocks; for rows of some tens of tokens its backward pass
on a CPU spends nine tenths of its time on the blocks' bookkeeping (2.1 ms for 8 rows of 26 tokens
where five batched products take 0.3). Here the query heads that share a key head are one matrix, so
keys are not repeated; scores are float32, and computed again in the backward pass, not kept.

With S = s Q K' + mask, P = softmax(S), O = P V (' transposes) and G the gradient of O:

    grad V = P' G    D = P * (G V' - rowsum(P * G V'))    grad Q = s D K    grad K = s D' Q
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256  # beyond it the fused kernel is faster, and scores would take room


def suits(query: Tensor, implementation: str, dropout: float) -> bool:
    """Tell whether `attend` computes what transformers' `implementation` would, and faster.

    Args:
        query: [B, H, T, D].
        implementation: The model's `attn_implementation`.
        dropout: Of the probabilities.
    """
    is_short = query.device.type == "cpu" and query.shape[2] <= LONGEST
    return is_short and implementation == "sdpa" and not dropout


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the mixed values [B, T, H, D].

    Args:
        query: [B, H, T, D].
        key: [B, H / g, T, D]; g query heads in turn share one.
        value: As `key`.
        mask: Which keys a query sees, [B or 1, 1, T, T], True or added to the scores; None lets it
            see itself and those before.
        scale: Of the products of query and key.
    """
    mixed: Tensor = _Attention.apply(query, key, value, mask, scale)
    return mixed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        q, k, v = _grouped(query, key).mul_(scale), _grouped(key, key), _grouped(value, key)
        mixed = torch.bmm(_probabilities(q, k, mask, query.shape), v).view(query.shape)
        return mixed.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, mask = ctx.saved_tensors
        q, k, v = _grouped(query, key).mul_(ctx.scale), _grouped(key, key), _grouped(value, key)
        g = _grouped(gradients[0].transpose(1, 2), key)
        p = _probabilities(q, k, mask, query.shape)
        grad_v = torch.bmm(p.transpose(1, 2), g)
        d = torch.ops.aten._softmax_backward_data(
            torch.bmm(g, v.transpose(1, 2)), p, -1, torch.float32
        )
        grad_q = torch.bmm(d, k).mul_(ctx.scale)
        grad_k = torch.bmm(d.transpose(1, 2), q)
        return (
            grad_q.view(query.shape).to(query.dtype),
            grad_k.view(key.shape).to(key.dtype),
            grad_v.view(value.shape).to(value.dtype),
            None,
            None,
        )


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """Return heads [B, H, T, D] as one float32 matrix for each key head: [B K, H / K T, D]."""
    batch, heads, _, width = key.shape
    copy = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
    return copy.view(batch * heads, -1, width)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Return [B K, H / K T, T]; a query that sees nothing spreads its attention evenly."""
    batch, heads, length, _ = shape
    scores = torch.bmm(q, k.transpose(1, 2))
    by_head = scores.view(batch, heads, length, length)
    least = torch.finfo(torch.float32).min
    if mask is None:
        by_head += torch.full((length, length), least, device=q.device).triu_(1)
    elif mask.dtype == torch.bool:
        by_head.masked_fill_(~mask, least)
    else:
        by_head += mask
    return torch.softmax(scores, -1)

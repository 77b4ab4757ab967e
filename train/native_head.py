"""The frozen head of positions with a target by machine code of our own (`native/head.h`)."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train import native_code


class _HeadStruct(ctypes.Structure):
    """`Head` of native/head.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "NDV"),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "target")),
        *((name, ctypes.c_void_p) for name in ("log_prob", "entropy", "is_top", "slope")),
        ("narrow", ctypes.c_int32),
        ("way", ctypes.c_int32),
        ("temperature", ctypes.c_float),
    )


class HeadScores(NamedTuple):
    """Of each position: log-probability of its target, entropy in nats, whether the target is the
    likeliest, each [N] in float32; and the gradient of the log-probability by the hidden state
    [N, D], if it was asked for."""

    log_probs: Tensor
    entropies: Tensor
    is_top1: Tensor
    slopes: Tensor | None


def suits(head: nn.Module, hidden: Tensor) -> bool:
    """Tell whether `scores` computes what a head says of hidden states [N, D]."""
    weight: Any = getattr(head, "weight", None)
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.shape == (head.out_features, head.in_features)
        and weight.device.type == hidden.device.type == "cpu"
        and weight.dtype == hidden.dtype
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.is_contiguous()
        and native_code.library() is not None
    )


@torch.no_grad()
def scores(
    weight: Tensor, hidden: Tensor, targets: Tensor, temperature: float = 1.0, slopes: bool = True
) -> HeadScores:
    """Return what the softmax of hidden W' / temperature says of the targets.

    Args:
        weight: [V, D].
        hidden: [N, D], as `suits` takes it.
        targets: [N], each in 0 to V; another's log-probability is not a number.
        slopes: Whether the gradient is wanted.
    """
    hidden, targets = hidden.contiguous(), targets.contiguous().to(torch.int64)
    count, width = hidden.shape
    found = torch.empty(3, count, dtype=torch.float32)
    gradient = torch.empty_like(hidden) if slopes else None
    call = _HeadStruct(
        *(count, width, len(weight), hidden.data_ptr(), weight.data_ptr(), targets.data_ptr()),
        *(part.data_ptr() for part in found),
        None if gradient is None else gradient.data_ptr(),
        narrow=hidden.dtype == torch.bfloat16,
        way=native_code.way_of(hidden.dtype),
        temperature=temperature,
    )
    if count:
        native_code.run(native_code.library().head_scores, call)
    log_probs, entropies, is_top1 = found
    return HeadScores(log_probs, entropies, is_top1, gradient)

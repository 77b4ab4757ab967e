"""Decoder layers with LoRA on a CPU by machine code of our own, forward and backward.

`native/layer.h` computes what `fused_layers` writes out in PyTorch: for rows of some tens of tokens
two thirds of a step there were small operations, and products whose weights were laid out anew for
every call. A layer is one call here. Where no C compiler is, or a layer has what is not written in
C, `suits` says so and `fused_layers` goes its own way.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from train import native_code
from train.fused_projections import Weights, spread

LONGEST = 1024  # tokens of a row; longer ones go by PyTorch's attention, the two were not compared
PROJECTIONS = 7
GROUPS = (range(3), range(3, 4), range(4, 6), range(6, 7))  # projections of one input
FIELDS = 5  # of a projection in a flat list: base, bias, A, B, scale
A, B, SCALE = 2, 3, 4
GATE = 3  # of what is kept: qkv, mixed, middle, gate, up


class _ProjectionStruct(ctypes.Structure):
    """`Projection` of native/layer_rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("base", "bias", "b", "grad_b")),
        *((name, ctypes.c_int64) for name in ("rank", "offset")),
        ("scale", ctypes.c_float),
    )


class _GroupStruct(ctypes.Structure):
    """`Group` of native/layer_rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "low", "grad_a")),
        ("rank", ctypes.c_int64),
    )


class _LayerStruct(ctypes.Structure):
    """`Layer` of native/layer_rows.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "BTCEHDI"),
        *((name, ctypes.c_void_p) for name in ("x", "before", "after", "cosine", "sine", "mask")),
        *((name, ctypes.c_int64) for name in ("mask_apart", "angles_apart")),
        *((name, ctypes.c_void_p) for name in ("qkv", "mixed", "middle", "gate", "up", "out")),
        *((name, ctypes.c_void_p) for name in ("grad", "grad_x")),
        ("projection", _ProjectionStruct * PROJECTIONS),
        ("group", _GroupStruct * len(GROUPS)),
        *((name, ctypes.c_float) for name in ("before_eps", "after_eps", "scale")),
        *((name, ctypes.c_int32) for name in ("narrow", "norms_narrow", "angles_narrow", "way")),
    )


class Shape(NamedTuple):
    """What is the same at every call of a layer."""

    heads: int
    key_heads: int
    head_dim: int
    inner: int
    before_eps: float
    after_eps: float
    scale: float


class Frozen(NamedTuple):
    """What a layer shares with others or does not learn: norms [D], angles and mask of the rows."""

    before: Tensor
    after: Tensor
    cosine: Tensor
    sine: Tensor
    mask: Tensor | None


def suits(layer: Any, hidden: Tensor, weights: Sequence[Weights], kwargs: dict[str, Any]) -> bool:
    """Tell whether `compute` does what the layer would.

    Args:
        hidden: [B, T, D].
        weights: Of q, k, v, o, gate, up, down.
        kwargs: Of the layer's call.
    """
    attn, mask = layer.self_attn, kwargs.get("attention_mask")
    cosine, sine = kwargs["position_embeddings"]
    batch, length, _ = hidden.shape
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.numel() > 0
        and length <= LONGEST
        and attn.config._attn_implementation == "sdpa"
        and not (attn.training and attn.attention_dropout)
        and not hasattr(attn, "q_norm")
        and attn.head_dim % 2 == 0
        and cosine.shape == sine.shape
        and cosine.dtype == sine.dtype
        and cosine.shape[1:] == (length, attn.head_dim)
        and len(cosine) in (1, batch)
        and (_sees_all(attn, length) if mask is None else _is_plain_mask(mask, batch, length))
        and all(norm.dtype in (torch.float32, torch.bfloat16) for norm in norms)
        and not any(norm.requires_grad for norm in norms)
        and all(_is_plain(w, hidden.dtype) for w in weights)
        and native_code.library() is not None
    )


def _is_plain_mask(mask: Tensor, batch: int, length: int) -> bool:
    shapes = [(rows, 1, length, length) for rows in (1, batch)]
    return mask.dtype == torch.bool and mask.shape in shapes


def _sees_all(attn: Any, length: int) -> bool:
    window = getattr(attn, "sliding_window", None)
    return window is None or window >= length


def _is_plain(weights: Weights, dtype: torch.dtype) -> bool:
    (adapter,) = weights.adapters
    factors = [part for part in (adapter.a, adapter.b) if part is not None]
    bases = [part for part in (weights.base, weights.bias) if part is not None]
    return (
        all(type(part) in (Tensor, torch.nn.Parameter) for part in (*factors, *bases))
        and all(part.dtype == torch.float32 and part.is_contiguous() for part in factors)
        and all(part.dtype == dtype and part.is_contiguous() for part in bases)
    )


def compute(
    layer: Any, hidden: Tensor, weights: Sequence[Weights], kwargs: dict[str, Any]
) -> Tensor:
    """Return the layer's output [B, T, D]; `suits` holds."""
    attn = layer.self_attn
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    heads, key_heads = (len(weights[i].base) // attn.head_dim for i in (0, 1))
    shape = Shape(
        *(heads, key_heads, attn.head_dim, len(weights[4].base)),
        *(before.variance_epsilon, after.variance_epsilon, attn.scaling),
    )
    cosine, sine = kwargs["position_embeddings"]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = (mask[:1] if mask.stride(0) == 0 else mask).contiguous()
    out: Tensor = _Layer.apply(
        *(hidden.contiguous(), shape, torch.is_grad_enabled(), before.weight, after.weight),
        *(cosine.contiguous(), sine.contiguous(), mask),
        *spread(weights),
    )
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: Shape,
        learns: bool,
        before: Tensor,
        after: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor | None,
        *flat: Any,
    ) -> Tensor:
        batch, length, _ = x.shape
        tokens, wide = batch * length, shape.heads * shape.head_dim
        both = wide + 2 * shape.key_heads * shape.head_dim
        widths = (both, wide, x.shape[-1], shape.inner, shape.inner)
        kept: list[Tensor | None] = [x.new_empty(tokens, width) for width in widths]
        if not learns:  # else what the backward pass takes is kept
            kept[GATE:] = [None, None]
        stacks = [_stack([flat[FIELDS * i + A] for i in group]) for group in GROUPS]
        lows = [None if a is None else a.new_empty(tokens, len(a)) for a in stacks]
        out = torch.empty_like(x)
        frozen = Frozen(before, after, cosine, sine, mask)
        call = _struct(x, shape, frozen, flat, kept, stacks, lows)
        call.out = out.data_ptr()
        native_code.run(native_code.library().layer_forward, call)
        if not learns:
            return out
        ctx.shape = shape
        ctx.scales = flat[SCALE::FIELDS]
        tensors = [part for place, part in enumerate(flat) if place % FIELDS != SCALE]
        ctx.save_for_backward(x, *frozen, *kept, *stacks, *lows, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        x, *frozen = itertools.islice(saved, 1 + len(Frozen._fields))
        kept, stacks, lows = (list(itertools.islice(saved, n)) for n in (5, 4, 4))
        flat = [part for scale in ctx.scales for part in (*itertools.islice(saved, 4), scale)]
        call = _struct(x, ctx.shape, Frozen(*frozen), flat, kept, stacks, lows)
        grad = gradients[0].contiguous()
        call.grad = grad.data_ptr()
        needs = ctx.needs_input_grad
        first = len(needs) - len(flat)
        learned: list[Tensor | None] = [None] * len(flat)
        for i, projection in enumerate(call.projection):
            at = FIELDS * i + B
            if needs[first + at]:
                learned[at] = found = torch.empty_like(flat[at])
                projection.grad_b = found.data_ptr()
        for numbers, group, stack in zip(GROUPS, call.group, stacks, strict=True):
            places = [FIELDS * i + A for i in numbers if flat[FIELDS * i + A] is not None]
            if stack is not None and any(needs[first + at] for at in places):
                found = torch.empty_like(stack)
                group.grad_a = found.data_ptr()
                parts = found.split([len(flat[at]) for at in places])
                for at, part in zip(places, parts, strict=True):
                    learned[at] = part if needs[first + at] else None
        grad_x = None
        if needs[0]:
            grad_x = torch.empty_like(x)
            call.grad_x = grad_x.data_ptr()
        native_code.run(native_code.library().layer_backward, call)
        return grad_x, *[None] * (first - 1), *learned


def _stack(matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Lay the matrices A of projections of one input one below the other: [R, K]."""
    found = [one.detach() for one in matrices if one is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat(found)


def _struct(
    x: Tensor,
    shape: Shape,
    frozen: Frozen,
    flat: Sequence[Any],
    kept: Sequence[Tensor | None],
    stacks: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
) -> _LayerStruct:
    batch, length, width = x.shape
    *shared, mask = frozen
    narrow = x.dtype == torch.bfloat16
    call = _LayerStruct(
        *(batch, length, width, shape.heads, shape.key_heads, shape.head_dim, shape.inner),
        *(x.data_ptr(), *(part.data_ptr() for part in shared)),
        None if mask is None else mask.data_ptr(),
        *(_apart(mask, batch), _apart(frozen.cosine, batch)),
        *(None if part is None else part.data_ptr() for part in kept),
        before_eps=shape.before_eps,
        after_eps=shape.after_eps,
        scale=shape.scale,
        narrow=narrow,
        norms_narrow=frozen.before.dtype == torch.bfloat16,
        angles_narrow=frozen.cosine.dtype == torch.bfloat16,
        way=native_code.way_of(x.dtype),
    )
    for numbers, group, stack, low in zip(GROUPS, call.group, stacks, lows, strict=True):
        if stack is not None and low is not None:
            group.a, group.low, group.rank = stack.data_ptr(), low.data_ptr(), len(stack)
        offset = 0
        for i in numbers:
            base, bias, _, b, scale = flat[FIELDS * i : FIELDS * i + FIELDS]
            projection = call.projection[i]
            projection.base = base.data_ptr()
            projection.bias = None if bias is None else bias.data_ptr()
            if b is not None:
                projection.b, projection.rank, projection.offset = b.data_ptr(), b.shape[1], offset
                projection.scale = scale
                offset += b.shape[1]
    return call


def _apart(shared: Tensor | None, batch: int) -> int:
    """Return the numbers from one row's part to the next one's; 0 where all have the same."""
    if shared is None or len(shared) == 1:
        return 0
    return shared.numel() // batch

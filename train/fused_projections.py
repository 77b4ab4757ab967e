"""The projections of a decoder layer, forward and backward: a frozen base with adapters on it.

Rows of several models may lie one below the other: the base's product is one for all of them, and
each segment of rows has its own adapter's.

With y = x W' + s (x A') B' (' transposes) and g the gradient of y:

    grad x = g W + s (g B) A    grad A = s (g B)' x    grad B = s g' (x A')

and for n = x r w with r = 1 / sqrt(mean(x^2) + eps), h = g w (Zhang & Sennrich 2019):

    grad x = r (h - x r^2 mean(h x))
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Adapter(NamedTuple):
    """A [r, K] and B [N, r] of one model for one projection, both None where it has none."""

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0


class Weights(NamedTuple):
    """Of one projection: the frozen base [N, K] and [N], and each segment's adapter."""

    base: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]


def spread(weights: Sequence[Weights]) -> list[Any]:
    """Lay tensors out flat, as autograd takes them: base, bias, and A, B, scale of each segment."""
    return [
        value
        for w in weights
        for value in (w.base, w.bias, *(field for adapter in w.adapters for field in adapter))
    ]


class _Stack:
    """One segment's adapters of projections of one input: A [R, K] is one, and cast once."""

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype):
        self.adapters = adapters
        matrices = [one.a for one in adapters if one.a is not None]
        self.a = torch.cat(matrices).to(dtype) if matrices else None
        self.scaled_b = [
            None if one.b is None else (one.b * one.scale).to(dtype) for one in adapters
        ]
        ends = list(itertools.accumulate(0 if one.a is None else len(one.a) for one in adapters))
        self.columns = [slice(*ends) for ends in itertools.pairwise([0, *ends])]

    def forward(self, x: Tensor, outs: Sequence[Tensor]) -> Tensor | None:
        """Add s (x A') B' of each projection to its output; returns x A' [T, R]."""
        if self.a is None:
            return None
        low = x @ self.a.t()
        for y, b, columns in zip(outs, self.scaled_b, self.columns, strict=True):
            if b is not None:
                y.addmm_(low[:, columns], b.t())
        return low

    def backward(
        self, gradients: Sequence[Tensor], x: Tensor, low: Tensor | None, grad_x: Tensor
    ) -> list[tuple[Tensor | None, ...]]:
        """Add to the gradient of x; returns those of A, B and scale of each projection."""
        learned: list[tuple[Tensor | None, ...]] = [(None, None, None)] * len(self.adapters)
        if self.a is None or low is None:
            return learned
        g_low = torch.cat(
            [g @ b for g, b in zip(gradients, self.scaled_b, strict=True) if b is not None], 1
        )
        grad_x.addmm_(g_low, self.a)
        grad_a = None
        for index, (g, (a, b, scale)) in enumerate(zip(gradients, self.adapters, strict=True)):
            if a is None or b is None or not a.requires_grad:
                continue
            if grad_a is None:
                grad_a = (g_low.t() @ x).to(a.dtype)
            columns = self.columns[index]
            grad_b = (g.t() @ low[:, columns]).to(b.dtype).mul_(scale)
            learned[index] = (grad_a[columns], grad_b, None)
        return learned


class _Projections:
    """Projections of one input [T, K], whose rows belong to segments with adapters of their own."""

    def __init__(self, flat: Sequence[Any], rows: Sequence[int], dtype: torch.dtype):
        self.rows = list(rows)
        self.weights = _gather(flat, len(rows))
        adapters = zip(*(w.adapters for w in self.weights), strict=True)
        self.stacks = [_Stack(of_segment, dtype) for of_segment in adapters]

    def forward(
        self, x: Tensor, out: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return x W' + bias + s (x A') B' [T, N] of each, and x A' [T, R] of each segment.

        Args:
            out: What the projections are added to.
        """
        found = []
        for w in self.weights:
            y = x @ w.base.t() if out is None else torch.addmm(out, x, w.base.t())
            if w.bias is not None:
                y += w.bias
            found.append(y)
        parts = zip(*(y.split(self.rows) for y in found), strict=True)
        inputs = x.split(self.rows)
        lows = [
            stack.forward(part, outs)
            for stack, part, outs in zip(self.stacks, inputs, parts, strict=True)
        ]
        return found, lows

    def backward(
        self, gradients: Sequence[Tensor], x: Tensor, lows: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of x, and those of the fields of all weights, flat."""
        grad_x: Tensor | None = None
        for g, w in zip(gradients, self.weights, strict=True):
            grad_x = g @ w.base if grad_x is None else grad_x.addmm_(g, w.base)
        assert grad_x is not None
        parts = zip(*(g.split(self.rows) for g in gradients), strict=True)
        found = [
            stack.backward(of_segment, *rest)
            for stack, of_segment, *rest in zip(
                *(self.stacks, parts, x.split(self.rows), lows, grad_x.split(self.rows)),
                strict=True,
            )
        ]
        learned: list[Tensor | None] = []
        for of_weight in zip(*found, strict=True):
            learned += [None, None, *itertools.chain(*of_weight)]
        return grad_x, learned


def _gather(flat: Sequence[Any], num_segments: int) -> list[Weights]:
    size, step = 2 + num_segments * len(Adapter._fields), len(Adapter._fields)
    found = []
    for start in range(0, len(flat), size):
        base, bias, *fields = flat[start : start + size]
        adapters = (Adapter(*fields[at : at + step]) for at in range(0, len(fields), step))
        found.append(Weights(base, bias, tuple(adapters)))
    return found


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) in float32: [T, 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return (x * inverse).mul_(weight)
    return weight * (x.float() * inverse).to(x.dtype)


def _normed_back(g: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x [T, D], overwriting g where it is float32."""
    g, x = (g * weight).float() if g.dtype != torch.float32 else g.mul_(weight), x.float()
    mean = torch.linalg.vecdot(g, x).div_(x.shape[-1])[:, None]
    return g.addcmul_(x, mean.mul_(inverse.square()), value=-1).mul_(inverse)


class NormedProjections(torch.autograd.Function):
    """Several projections of one normalised input: x [T, D] -> [T, N] each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, rows: Sequence[int], *flat: Any
    ) -> tuple[Tensor, ...]:
        ctx.projections = _Projections(flat, rows, x.dtype)
        inverse = _inverse_rms(x, eps)
        found, lows = ctx.projections.forward(_normed(x, norm, inverse))
        ctx.save_for_backward(x, norm, inverse, *lows)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, *lows = ctx.saved_tensors
        grad, learned = ctx.projections.backward(gradients, _normed(x, norm, inverse), lows)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype)
        return grad_x, None, None, None, *learned


class AddProjection(torch.autograd.Function):
    """A residual [T, N] and the projection of x [T, K]."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, rows: Sequence[int], *flat: Any) -> Tensor:
        ctx.projections = _Projections(flat, rows, x.dtype)
        (y,), lows = ctx.projections.forward(x, residual)
        ctx.save_for_backward(x, *lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        grad_x, learned = ctx.projections.backward(gradients, x, lows)
        return gradients[0], grad_x, None, *learned


class AddMlp(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n the normalised x: [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, rows: Sequence[int], *flat: Any
    ) -> Tensor:
        size = len(flat) // 3
        ctx.inner = _Projections(flat[: 2 * size], rows, x.dtype)
        ctx.down = _Projections(flat[2 * size :], rows, x.dtype)
        inverse = _inverse_rms(x, eps)
        (g, u), lows = ctx.inner.forward(_normed(x, norm, inverse))
        (y,), lows_down = ctx.down.forward(functional.silu(g).mul_(u), x)
        ctx.save_for_backward(x, norm, inverse, g, u, *lows, *lows_down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, g, u, *lows = ctx.saved_tensors
        lows, lows_down = lows[: len(lows) // 2], lows[len(lows) // 2 :]
        active = functional.silu(g)
        inner, of_down = ctx.down.backward(gradients, active * u, lows_down)
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(u), g)
        normed = _normed(x, norm, inverse)
        grad, of_inner = ctx.inner.backward([grad_gate, grad_up], normed, lows)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype).add_(gradients[0])
        return grad_x, None, None, None, *of_inner, *of_down


class Rotation(torch.autograd.Function):
    """Rotary positions (Su et al. 2021), halves as transformers pairs them: x [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return y

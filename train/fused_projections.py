"""The projections of a decoder layer, forward and backward: a frozen base with adapters on it.

Rows of several models may lie one below the other: the base's product is one for all of them, and
each segment of rows has its own adapter's.

With y = x W' + s (x A') B' (' transposes) and g the gradient of y:

    grad x = g W + s (g B) A    grad A = s (g B)' x    grad B = s g' (x A')

and for n = x r w with r = 1 / sqrt(mean(x^2) + eps), h = g w (Zhang & Sennrich 2019):

    grad x = r (h - x r^2 mean(h x))
"""

from __future__ import annotations

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


def _gather(flat: Sequence[Any], num_segments: int) -> list[Weights]:
    size, step = 2 + num_segments * len(Adapter._fields), len(Adapter._fields)
    found = []
    for start in range(0, len(flat), size):
        base, bias, *fields = flat[start : start + size]
        adapters = (Adapter(*fields[at : at + step]) for at in range(0, len(fields), step))
        found.append(Weights(base, bias, tuple(adapters)))
    return found


def _project(
    x: Tensor, w: Weights, rows: Sequence[int], out: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return x W' + bias + s (x A') B' [T, N], added to `out` if given; and x A' by segment."""
    if out is not None:
        y = torch.addmm(out, x, w.base.t())
        if w.bias is not None:
            y += w.bias
    elif w.bias is not None:
        y = torch.addmm(w.bias, x, w.base.t())
    else:
        y = x @ w.base.t()
    lows: list[Tensor | None] = []
    for x_part, y_part, (a, b, scale) in zip(x.split(rows), y.split(rows), w.adapters, strict=True):
        if a is None or b is None:
            lows.append(None)
        else:
            low = x_part @ a.t().to(x.dtype)
            y_part.addmm_(low, b.t().to(x.dtype), alpha=scale)
            lows.append(low)
    return y, lows


def _project_back(
    g: Tensor,
    x: Tensor,
    w: Weights,
    rows: Sequence[int],
    lows: Sequence[Tensor | None],
    into: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradient of x, added to `into` if given, and those of `w`, flat."""
    grad_x = g @ w.base if into is None else into.addmm_(g, w.base)
    learned: list[Tensor | None] = [None, None]
    parts = (part.split(rows) for part in (g, x, grad_x))
    for g_part, x_part, grad_part, low, (a, b, scale) in zip(*parts, lows, w.adapters, strict=True):
        grad_a = grad_b = None
        if a is not None and b is not None and low is not None:
            g_low = g_part @ b.to(g.dtype)
            grad_part.addmm_(g_low, a.to(g.dtype), alpha=scale)
            if a.requires_grad:
                grad_a = (g_low.t() @ x_part).to(a.dtype).mul_(scale)
                grad_b = (g_part.t() @ low).to(b.dtype).mul_(scale)
        learned += [grad_a, grad_b, None]
    return grad_x, tuple(learned)


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
        weights = _gather(flat, len(rows))
        inverse = _inverse_rms(x, eps)
        normed = _normed(x, norm, inverse)
        found, lows = zip(*(_project(normed, w, rows) for w in weights), strict=True)
        ctx.weights, ctx.rows = weights, rows
        ctx.save_for_backward(x, norm, inverse, *(low for of_one in lows for low in of_one))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, *lows = ctx.saved_tensors
        normed = _normed(x, norm, inverse)
        grad, learned = None, ()
        for index, (g, w) in enumerate(zip(gradients, ctx.weights, strict=True)):
            of_one = lows[index * len(ctx.rows) : (index + 1) * len(ctx.rows)]
            grad, found = _project_back(g, normed, w, ctx.rows, of_one, grad)
            learned += found
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype)
        return grad_x, None, None, None, *learned


class AddProjection(torch.autograd.Function):
    """A residual [T, N] and the projection of x [T, K]."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, rows: Sequence[int], *flat: Any) -> Tensor:
        (w,) = _gather(flat, len(rows))
        y, lows = _project(x, w, rows, residual)
        ctx.w, ctx.rows = w, rows
        ctx.save_for_backward(x, *lows)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *lows = ctx.saved_tensors
        (g,) = gradients
        grad_x, learned = _project_back(g, x, ctx.w, ctx.rows, lows, None)
        return g, grad_x, None, *learned


class AddMlp(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n the normalised x: [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, rows: Sequence[int], *flat: Any
    ) -> Tensor:
        gate, up, down = ctx.weights = _gather(flat, len(rows))
        ctx.rows = rows
        inverse = _inverse_rms(x, eps)
        normed = _normed(x, norm, inverse)
        g, of_gate = _project(normed, gate, rows)
        u, of_up = _project(normed, up, rows)
        y, of_down = _project(functional.silu(g).mul_(u), down, rows, x)
        ctx.save_for_backward(x, norm, inverse, g, u, *of_gate, *of_up, *of_down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, g, u, *lows = ctx.saved_tensors
        (gradient,) = gradients
        gate, up, down = ctx.weights
        rows, count = ctx.rows, len(ctx.rows)
        active = functional.silu(g)
        inner, of_down = _project_back(gradient, active * u, down, rows, lows[2 * count :], None)
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(u), g)
        normed = _normed(x, norm, inverse)
        grad, of_gate = _project_back(grad_gate, normed, gate, rows, lows[:count], None)
        grad, of_up = _project_back(grad_up, normed, up, rows, lows[count : 2 * count], grad)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype).add_(gradient)
        return grad_x, None, None, None, *of_gate, *of_up, *of_down


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

"""Decoder layers of the Llama family with LoRA, forward and backward written out.

Autograd through PEFT's modules makes some forty passes over memory a layer that need not be: an
adapter's output is scaled, then added; the gradient of an input is summed from each projection and
each of their adapters; a norm and a SwiGLU keep several tensors each. Here a block is one function:
adapters are added inside the matrix products (`addmm`), gradients of one input are summed there
too, and what is cheap (the norm, the SwiGLU) is computed again in the backward pass, not kept. The
mathematics is PEFT's and transformers'; only the order of some sums differs.
The ideas are those of LoRA kernels in Unsloth and Liger; there is no device-specific code here.

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
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from train import short_attention

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class Weights(NamedTuple):
    """Of one projection: the frozen base [N, K] and [N], an adapter's A [r, K] and B [N, r]."""

    base: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


def fuse_layers(model: PreTrainedModel) -> int:
    """Let the decoder layers of a causal LM with LoRA adapters compute by this module.

    A call that asks for what is not written out here (a cache, dropout in the adapter, an adapter
    variant such as DoRA, several active adapters, a base that learns) is done by the layer's own
    forward, so the model can do all that it could.

    Args:
        model: The model under PEFT's adapters.

    Returns:
        How many layers there are of a kind that this module knows.
    """
    made: dict[type[nn.Module], type[nn.Module]] = {}
    count = 0
    for layer in model.modules():
        kind = type(layer)
        if kind.__name__ in LAYERS and _norms_are_known(layer):
            if not hasattr(kind, "is_written_out"):
                if kind not in made:
                    made[kind] = _written_out(kind)
                layer.__class__ = made[kind]
            count += 1
    return count


def _norms_are_known(layer: Any) -> bool:
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return all(type(norm).__name__ in NORMS for norm in norms)


def _written_out(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of the same name, by which sharding and checkpointing still find it."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = None
        if not args and kwargs.get("past_key_values") is None:
            found = _layer_weights(self, hidden_states.dtype)
        if found is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _layer(self, hidden_states, found, **kwargs)

    fields = {"forward": forward, "is_written_out": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), fields)


def _layer_weights(layer: Any, dtype: torch.dtype) -> list[Weights] | None:
    """Return the weights of q, k, v, o, gate, up, down; None where one needs its own forward."""
    attn, mlp = layer.self_attn, layer.mlp
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    found = []
    for module in (
        *(attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ):
        weights = _weights(module, dtype)
        if weights is None:
            return None
        found.append(weights)
    return found


def _weights(module: Any, dtype: torch.dtype) -> Weights | None:
    base = module.base_layer if isinstance(module, LoraLinear) else module
    if type(base) is not nn.Linear or base.weight.dtype != dtype or base.weight.requires_grad:
        return None
    plain = Weights(base.weight, base.bias, None, None, 0.0)
    if base is module or module.disable_adapters or module.merged:
        return None if base is not module and module.merged else plain
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return plain
    if len(names) > 1 or names[0] in module.lora_variant or module.lora_bias.get(names[0]):
        return None
    (name,) = names
    dropout = module.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training:
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return plain._replace(a=a, b=b, scale=module.scaling[name])


def _layer(
    layer: Any,
    hidden: Tensor,
    weights: list[Weights],
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    q, k, v, o, gate, up, down = weights
    attn, norm = layer.self_attn, layer.input_layernorm
    batch, length, width = hidden.shape
    flat = hidden.reshape(-1, width)
    query, key, value = (
        part.view(batch, length, -1, attn.head_dim)
        for part in _NormedProjections.apply(
            flat, norm.weight, norm.variance_epsilon, *_flat([q, k, v])
        )
    )
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    cos, sin = (part.unsqueeze(2) for part in position_embeddings)
    query, key = _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    mixed = _attention(attn, query, key, value, attention_mask, **kwargs)
    flat = _AddProjection.apply(flat, mixed.reshape(batch * length, -1), *_flat([o]))
    norm = layer.post_attention_layernorm
    flat = _AddMlp.apply(flat, norm.weight, norm.variance_epsilon, *_flat([gate, up, down]))
    return flat.view(batch, length, width)


def _attention(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Return the mixed values [B, T, H, D] of heads [B, H, T, D]."""
    implementation = attn.config._attn_implementation
    dropout = attn.attention_dropout if attn.training else 0.0
    if short_attention.suits(query, implementation, dropout):
        return short_attention.attend(query, key, value, mask, attn.scaling)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if hasattr(attn, "sliding_window"):
        kwargs["sliding_window"] = attn.sliding_window
    mixed: Tensor = attend(
        attn, query, key, value, mask, dropout=dropout, scaling=attn.scaling, **kwargs
    )[0]
    return mixed


def _gather(flat: Sequence[Any]) -> list[Weights]:
    size = len(Weights._fields)
    return [Weights(*flat[start : start + size]) for start in range(0, len(flat), size)]


class _Projections:
    """Projections of one input: their adapters' matrices A are one, [R, K], and cast once."""

    def __init__(self, flat: Sequence[Any], dtype: torch.dtype):
        self.weights = _gather(flat)
        self.a: Tensor | None = None
        adapted = [w.a for w in self.weights if w.a is not None]
        if adapted:
            self.a = torch.cat(adapted).to(dtype)
        self.scaled_b = [None if w.b is None else (w.b * w.scale).to(dtype) for w in self.weights]
        ends = itertools.accumulate(0 if w.a is None else len(w.a) for w in self.weights)
        self.columns = [
            slice(end if w.a is None else end - len(w.a), end)
            for w, end in zip(self.weights, ends, strict=True)
        ]

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Return x W' + bias + s (x A') B' [T, N] of each, and x A' [T, R].

        Args:
            out: What the projections are added to.
        """
        low = None if self.a is None else x @ self.a.t()
        found = []
        for w, b, columns in zip(self.weights, self.scaled_b, self.columns, strict=True):
            y = x @ w.base.t() if out is None else torch.addmm(out, x, w.base.t())
            if w.bias is not None:
                y += w.bias
            if b is not None and low is not None:
                y.addmm_(low[:, columns], b.t())
            found.append(y)
        return found, low

    def backward(
        self, gradients: Sequence[Tensor], x: Tensor, low: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of x, and those of the fields of all weights."""
        learned: list[list[Tensor | None]] = [[None] * len(Weights._fields) for _ in self.weights]
        grad_x: Tensor | None = None
        for g, w in zip(gradients, self.weights, strict=True):
            grad_x = g @ w.base if grad_x is None else grad_x.addmm_(g, w.base)
        assert grad_x is not None
        if self.a is None or low is None:
            return grad_x, _flat(learned)
        g_low = torch.cat(
            [g @ b for g, b in zip(gradients, self.scaled_b, strict=True) if b is not None], 1
        )
        grad_x.addmm_(g_low, self.a)
        grad_a = None
        for index, (g, w) in enumerate(zip(gradients, self.weights, strict=True)):
            if w.a is None or w.b is None or not w.a.requires_grad:
                continue
            if grad_a is None:
                grad_a = (g_low.t() @ x).to(w.a.dtype)
            columns = self.columns[index]
            learned[index][2] = grad_a[columns]
            learned[index][3] = (g.t() @ low[:, columns]).to(w.b.dtype).mul_(w.scale)
        return grad_x, _flat(learned)


def _flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for one in lists for item in one]


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


class _NormedProjections(torch.autograd.Function):
    """Several projections of one normalised input: x [T, D] -> [T, N] each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *flat: Any) -> tuple[Tensor, ...]:
        ctx.projections = _Projections(flat, x.dtype)
        inverse = _inverse_rms(x, eps)
        found, low = ctx.projections.forward(_normed(x, norm, inverse))
        ctx.save_for_backward(x, norm, inverse, low)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, low = ctx.saved_tensors
        grad, learned = ctx.projections.backward(gradients, _normed(x, norm, inverse), low)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype)
        return grad_x, None, None, *learned


class _AddProjection(torch.autograd.Function):
    """A residual [T, N] and the projection of x [T, K]."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, *flat: Any) -> Tensor:
        ctx.projections = _Projections(flat, x.dtype)
        (y,), low = ctx.projections.forward(x, residual)
        ctx.save_for_backward(x, low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, low = ctx.saved_tensors
        grad_x, learned = ctx.projections.backward(gradients, x, low)
        return gradients[0], grad_x, *learned


class _AddMlp(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n the normalised x: [T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *flat: Any) -> Tensor:
        size = len(Weights._fields)
        ctx.inner = _Projections(flat[: 2 * size], x.dtype)
        ctx.down = _Projections(flat[2 * size :], x.dtype)
        inverse = _inverse_rms(x, eps)
        (g, u), low = ctx.inner.forward(_normed(x, norm, inverse))
        (y,), low_down = ctx.down.forward(functional.silu(g).mul_(u), x)
        ctx.save_for_backward(x, norm, inverse, g, u, low, low_down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, g, u, low, low_down = ctx.saved_tensors
        active = functional.silu(g)
        inner, of_down = ctx.down.backward(gradients, active * u, low_down)
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(u), g)
        normed = _normed(x, norm, inverse)
        grad, of_inner = ctx.inner.backward([grad_gate, grad_up], normed, low)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype).add_(gradients[0])
        return grad_x, None, None, *of_inner, *of_down


class _Rotation(torch.autograd.Function):
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

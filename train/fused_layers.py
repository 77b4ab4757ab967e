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
            flat, norm.weight, norm.variance_epsilon, *_spread([q, k, v])
        )
    )
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    cos, sin = (part.unsqueeze(2) for part in position_embeddings)
    query, key = _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, eager_attention_forward
    )
    if hasattr(attn, "sliding_window"):
        kwargs["sliding_window"] = attn.sliding_window
    mixed, _ = attend(
        attn,
        *(part.transpose(1, 2) for part in (query, key, value)),
        attention_mask,
        dropout=attn.attention_dropout if attn.training else 0.0,
        scaling=attn.scaling,
        **kwargs,
    )
    flat = _AddProjection.apply(flat, mixed.reshape(batch * length, -1), *_spread([o]))
    norm = layer.post_attention_layernorm
    flat = _AddMlp.apply(flat, norm.weight, norm.variance_epsilon, *_spread([gate, up, down]))
    return flat.view(batch, length, width)


def _spread(weights: Sequence[Weights]) -> list[Any]:
    return [part for one in weights for part in one]


def _gather(flat: Sequence[Any]) -> list[Weights]:
    size = len(Weights._fields)
    return [Weights(*flat[start : start + size]) for start in range(0, len(flat), size)]


def _project(x: Tensor, w: Weights, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return x W' + bias + s (x A') B' [T, N], and x A' [T, r]; added to `out` if given."""
    if out is not None:
        y = torch.addmm(out, x, w.base.t())
        if w.bias is not None:
            y += w.bias
    elif w.bias is not None:
        y = torch.addmm(w.bias, x, w.base.t())
    else:
        y = x @ w.base.t()
    if w.a is None or w.b is None:
        return y, None
    low = x @ w.a.t().to(x.dtype)
    return y.addmm_(low, w.b.t().to(x.dtype), alpha=w.scale), low


def _project_back(
    g: Tensor, x: Tensor, w: Weights, low: Tensor | None, into: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the gradient of x, added to `into` if given, and those of `w`'s fields."""
    grad_x = g @ w.base if into is None else into.addmm_(g, w.base)
    if w.a is None or w.b is None or low is None:
        return grad_x, (None,) * len(Weights._fields)
    g_low = g @ w.b.to(g.dtype)
    grad_x.addmm_(g_low, w.a.to(g.dtype), alpha=w.scale)
    grad_a = grad_b = None
    if w.a.requires_grad:
        grad_a = (g_low.t() @ x).to(w.a.dtype).mul_(w.scale)
        grad_b = (g.t() @ low).to(w.b.dtype).mul_(w.scale)
    return grad_x, (None, None, grad_a, grad_b, None)


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
        weights = _gather(flat)
        inverse = _inverse_rms(x, eps)
        normed = _normed(x, norm, inverse)
        found, lows = zip(*(_project(normed, w) for w in weights), strict=True)
        ctx.weights = weights
        ctx.save_for_backward(x, norm, inverse, *lows)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, *lows = ctx.saved_tensors
        normed = _normed(x, norm, inverse)
        grad, learned = _project_back(gradients[0], normed, ctx.weights[0], lows[0], None)
        for g, w, low in zip(gradients[1:], ctx.weights[1:], lows[1:], strict=True):
            grad, found = _project_back(g, normed, w, low, grad)
            learned += found
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype)
        return grad_x, None, None, *learned


class _AddProjection(torch.autograd.Function):
    """A residual [T, N] and the projection of x [T, K]."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, *flat: Any) -> Tensor:
        (w,) = _gather(flat)
        y, low = _project(x, w, residual)
        ctx.w = w
        ctx.save_for_backward(x, low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, low = ctx.saved_tensors
        (g,) = gradients
        grad_x, learned = _project_back(g, x, ctx.w, low, None)
        return g, grad_x, *learned


class _AddMlp(torch.autograd.Function):
    """x + down(silu(gate(n)) * up(n)) with n the normalised x: [T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, *flat: Any) -> Tensor:
        gate, up, down = ctx.weights = _gather(flat)
        inverse = _inverse_rms(x, eps)
        normed = _normed(x, norm, inverse)
        g, low_gate = _project(normed, gate)
        u, low_up = _project(normed, up)
        y, low_down = _project(functional.silu(g).mul_(u), down, x)
        ctx.save_for_backward(x, norm, inverse, g, u, low_gate, low_up, low_down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, norm, inverse, g, u, low_gate, low_up, low_down = ctx.saved_tensors
        (gradient,) = gradients
        gate, up, down = ctx.weights
        active = functional.silu(g)
        inner, of_down = _project_back(gradient, active * u, down, low_down, None)
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(u), g)
        normed = _normed(x, norm, inverse)
        grad, of_gate = _project_back(grad_gate, normed, gate, low_gate, None)
        grad, of_up = _project_back(grad_up, normed, up, low_up, grad)
        grad_x = _normed_back(grad, x, norm, inverse).to(x.dtype).add_(gradient)
        return grad_x, None, None, *of_gate, *of_up, *of_down


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

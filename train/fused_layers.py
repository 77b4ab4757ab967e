"""Decoder layers of the Llama family with LoRA, forward and backward written out.

Autograd through PEFT's modules makes some forty passes over memory a layer that need not be: an
adapter's output is scaled, then added; the gradient of an input is summed from each projection and
each of their adapters; a norm and a SwiGLU keep several tensors each. Here a block is one function:
adapters are added inside the matrix products (`addmm`), gradients of one input are summed there
too, and what is cheap (the norm, the SwiGLU) is computed again in the backward pass, not kept. The
mathematics is PEFT's and transformers'; only the order of some sums differs.
The ideas are those of LoRA kernels in Unsloth and Liger; there is no device-specific code here, but
where C does the same on a CPU (`native_layers`), it is asked.

Several models that share one frozen base may go through a layer together (`meeting`, `run_layer`):
their rows lie one below the other, so the base's products are one each, and every segment of rows
has its own adapter's. Nothing of a row reaches the rows of another model. In C they are computed
one after the other: there a product of few rows is about as fast a row as one of many.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from train import native_layers, short_attention
from train.fused_projections import (
    Adapter,
    AddMlp,
    AddProjection,
    NormedProjections,
    Rotation,
    Weights,
    spread,
)

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class Segment(NamedTuple):
    """What one model brings to a layer: hidden states [B, T, D] and the call's other arguments."""

    layer: Any
    hidden: Tensor
    weights: list[Weights]
    kwargs: dict[str, Any]


Meet = Callable[[Segment], Tensor]


class _Local(threading.local):
    meet: Meet | None = None


_local = _Local()


@contextmanager
def meeting(meet: Meet) -> Iterator[None]:
    """Have the layers that this thread calls computed by `meet`, which ends up in `run_layer`."""
    _local.meet = meet
    try:
        yield
    finally:
        _local.meet = None


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


def can_join(model: PreTrainedModel) -> bool:
    """Tell whether the model's layers, all of them, can be computed together with another's."""
    layers = [m for m in model.modules() if type(m).__name__ in LAYERS]
    return bool(layers) and all(
        hasattr(layer, "is_written_out")
        and not layer.gradient_checkpointing
        and not layer.self_attn.attention_dropout
        and _layer_weights(layer, layer.self_attn.q_proj.weight.dtype) is not None
        for layer in layers
    )


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
        segment = Segment(self, hidden_states, found, kwargs)
        if _local.meet is not None:
            return _local.meet(segment)
        return run_layer([segment])[0]

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
    if base.bias is not None and base.bias.requires_grad:
        return None
    plain = Weights(base.weight, base.bias, (Adapter(),))
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
    return plain._replace(adapters=(Adapter(a, b, module.scaling[name]),))


def run_layer(segments: Sequence[Segment]) -> list[Tensor]:
    """Compute one decoder layer for segments of models that share its base: [B, T, D] each."""
    with torch.autocast(segments[0].hidden.device.type, enabled=False):
        if all(native_layers.suits(*segment) for segment in segments):
            return [native_layers.compute(*segment) for segment in segments]
        return _layer(segments)


def _layer(segments: Sequence[Segment]) -> list[Tensor]:
    rows = tuple(part.hidden.shape[0] * part.hidden.shape[1] for part in segments)
    q, k, v, o, gate, up, down = map(_together, zip(*(s.weights for s in segments), strict=True))
    layer = segments[0].layer  # what is frozen is the same in all
    width = segments[0].hidden.shape[-1]
    flat = _stack([part.hidden.reshape(-1, width) for part in segments])
    norm = layer.input_layernorm
    found = NormedProjections.apply(
        flat, norm.weight, norm.variance_epsilon, rows, *spread([q, k, v])
    )
    apart = zip(*(part.split(rows) for part in found), strict=True)
    mixed = [
        _attend(part.layer.self_attn, part.hidden.shape[1], *of_part, **part.kwargs)
        for part, of_part in zip(segments, apart, strict=True)
    ]
    flat = AddProjection.apply(flat, _stack(mixed), rows, *spread([o]))
    norm = layer.post_attention_layernorm
    flat = AddMlp.apply(flat, norm.weight, norm.variance_epsilon, rows, *spread([gate, up, down]))
    return [
        part.view(segment.hidden.shape)
        for part, segment in zip(flat.split(rows), segments, strict=True)
    ]


def _attend(
    attn: Any,
    length: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return the attention of one model's rows, [B T, heads x head_dim]."""
    rows = len(query)
    query, key, value = (
        part.view(rows // length, length, -1, attn.head_dim) for part in (query, key, value)
    )
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    cos, sin = (part.unsqueeze(2) for part in position_embeddings)
    query, key = Rotation.apply(query, cos, sin), Rotation.apply(key, cos, sin)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    mixed = _attention(attn, query, key, value, attention_mask, **kwargs)
    return mixed.reshape(rows, -1)


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


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _together(weights: Sequence[Weights]) -> Weights:
    return weights[0]._replace(adapters=tuple(w.adapters[0] for w in weights))

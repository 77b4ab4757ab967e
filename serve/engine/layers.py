"""Decoder layers of the Llama family by a dozen kernel calls instead of a hundred of torch.

Half of a decode step on a CPU was spent between the products: small operations, and the calls of
modules around them. A layer is replaced only when all its parts are those of Llama, Mistral, Qwen2
and their kin, and the whole model only keeps its new layers when its logits stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from serve.engine import kernels
from serve.engine.projections import Projections

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
NORMS = ("input_layernorm", "post_attention_layernorm")
TOLERANCE = 1e-3  # of a logit


class Layers:
    """The layers of a model, while an engine has it.

    Args:
        how: By layer, what transformers asks of attention: scale, window, softcap.
        logits: Returns the model's logits on a probe; called with old and new layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Projections,
        how: dict[int, tuple[Any, ...]],
        logits: Callable[[], torch.Tensor],
    ):
        self._replaced: list[nn.Module] = []
        if not kernels.usable(model):
            return
        threads = torch.get_num_threads()
        found = [
            (layer, forward)
            for layer in model.modules()
            if (forward := _lean(layer, projections, how, threads)) is not None
        ]
        if not found:
            return
        before = logits()
        for layer, forward in found:
            layer.forward = forward
            self._replaced.append(layer)
        if not torch.allclose(logits(), before, rtol=TOLERANCE, atol=TOLERANCE):
            self.close()

    def __len__(self) -> int:
        return len(self._replaced)

    def close(self) -> None:
        """Give the layers back as they were."""
        for layer in self._replaced:
            del layer.forward
        self._replaced.clear()


def _lean(
    layer: nn.Module,
    projections: Projections,
    how: dict[int, tuple[Any, ...]],
    threads: int,
) -> Callable[..., torch.Tensor] | None:
    """Return a layer's forward by kernels, or None if it has other parts than expected."""
    parts: dict[str, Any] = dict(layer.named_children())
    if set(parts) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    if set(dict(attention.named_children())) != set(ATTENTION):
        return None
    if set(dict(mlp.named_children())) != set(MLP) or not _is_silu(mlp.act_fn):
        return None
    if not all("forward" in vars(parts[name]) for name in NORMS):  # no kernel fits them
        return None
    siblings = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = projections.fused(siblings)
    gate_up = projections.fused((mlp.gate_proj, mlp.up_proj))
    if qkv is None or gate_up is None or attention.layer_idx not in how:
        return None
    norm, second_norm = (parts[name].forward for name in NORMS)
    width = attention.head_dim
    heads = [module.out_features // width for module in siblings]
    index, scale_window_softcap = attention.layer_idx, how[attention.layer_idx]
    out, down = attention.o_proj.forward, mlp.down_proj.forward

    def forward(
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        engine_step: Any,
        **__: Any,
    ) -> torch.Tensor:
        x = hidden_states[0]
        cosine, sine = position_embeddings
        together = qkv(norm(x))
        kernels.rotate(together, heads[0] + heads[1], cosine[0], sine[0])
        query, key, value = together.view(len(x), -1, width).split(heads, dim=1)
        mixed = engine_step.attend(index, query, key, value, *scale_window_softcap)
        x = x + out(mixed.flatten(1))
        return (x + down(kernels.gate(gate_up(second_norm(x)), threads)))[None]

    return forward


def _is_silu(activation: nn.Module) -> bool:
    x = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(x), nn.functional.silu(x))

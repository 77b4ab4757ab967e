"""A model's whole forward pass as one call of the kernels, for models built like Llama.

Half of a decode step on a CPU was spent between the products: small operations of torch, the calls
of modules around them, and threads that had to be woken for each. A model is taken over only when
all its parts are those of Llama, Mistral, Qwen2, Qwen3 and their kin, and only when its logits stay
the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from serve.engine import kernels
from serve.engine.kernels import AdapterPlan
from serve.engine.kv_cache import KVCache
from serve.engine.lora import LoraBank
from serve.engine.projections import KernelLinears, Projections

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
NORMS = ("input_layernorm", "post_attention_layernorm")


class NormStruct(ctypes.Structure):
    """`Norm` of native/forward.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("offset", ctypes.c_float), ("eps", ctypes.c_float))


class LayerStruct(ctypes.Structure):
    """`Layer` of native/forward.h."""

    _fields_ = (
        *((name, NormStruct) for name in ("before", "after", "query", "key")),
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *(("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("window", ctypes.c_int64)),
    )


class ModelStruct(ctypes.Structure):
    """`Model` of native/forward.h."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden", "heads", "kv_heads")),
        *(("width", ctypes.c_int64), ("inner", ctypes.c_int64), ("narrow", ctypes.c_int32)),
        ("last", NormStruct),
        *((name, ctypes.c_void_p) for name in ("head", "cosine", "sine")),
    )


class PassStruct(ctypes.Structure):
    """`Pass` of native/forward.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_sequences", "num_kept")),
        *((name, ctypes.c_void_p) for name in ("position", "place", "begin", "count", "offset")),
        *((name, ctypes.c_void_p) for name in ("kept", "body", "top")),
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens of one sequence in a pass.

    Attributes:
        offset: Where the sequence's block begins in the arena.
        start: Position of the first token.
        wanted: How many of the last tokens reach the head.
    """

    offset: int
    start: int
    count: int
    wanted: int


class Forward:
    """The kernels' forward pass over a model's packed weights and the arena of its keys and values.

    The tensors that the structures point to are held by this object, and by the projections.

    Args:
        parts: Of the model, as `parts_of` finds them.
        cache: Of float32 or bfloat16.
        max_context: Positions that a token may have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: LoraBank,
        parts: Parts,
        cache: KVCache,
        max_context: int,
    ):
        self._held = parts, cache
        self._embed = model.get_input_embeddings()
        self._bank = bank
        self._threads = torch.get_num_threads()
        self._run = kernels.library().forward
        self._products = [product for layer in parts.layers for product in layer.products]
        self._products.append(parts.head)
        self._hidden_size = parts.last.width
        self._vocab_size = parts.head.num_outputs
        self._prepared: tuple[int, frozenset[str]] | None = None
        self._cosine, self._sine = parts.angles(max_context)
        self._layers = (LayerStruct * len(parts.layers))()
        for struct, layer in zip(self._layers, parts.layers, strict=True):
            for name, norm in zip(("before", "after", "query", "key"), layer.norms, strict=True):
                if norm is not None:
                    setattr(struct, name, _norm(norm))
            names = ("qkv", "out", "gate_up", "down")
            for name, product in zip(names, layer.products, strict=True):
                setattr(struct, name, ctypes.addressof(product.kernel.struct))
            struct.keys = cache.keys[layer.index].data_ptr()
            struct.values = cache.values[layer.index].data_ptr()
            struct.scale, window, softcap = layer.how
            struct.window, struct.softcap = window or 0, softcap or 0.0
        first = parts.layers[0]
        narrow = int(cache.dtype is torch.bfloat16)
        self._model = ModelStruct(
            ctypes.addressof(self._layers),
            *(len(parts.layers), self._hidden_size, first.heads, first.kv_heads),
            *(first.width, first.inner, narrow, _norm(parts.last)),
            ctypes.addressof(parts.head.kernel.struct),
            *(self._cosine.data_ptr(), self._sine.data_ptr()),
        )

    def __call__(
        self, ids: torch.Tensor, parts: Sequence[Part]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a pass over the tokens `ids` [N] of consecutive parts.

        Returns:
            Logits [K, V] of the tokens that reach the head, and what it was given [K, hidden].

        Raises:
            MemoryError: There was none for intermediate results.
        """
        positions = [n for part in parts for n in range(part.start, part.start + part.count)]
        places = [
            n
            for part in parts
            for n in range(part.offset + part.start, part.offset + part.start + part.count)
        ]
        begins: list[int] = []
        kept: list[int] = []
        end = 0
        for part in parts:
            begins.append(end)
            end += part.count
            kept += range(end - part.wanted, end)
        given = [
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (
                *(positions, places, begins, [part.count for part in parts]),
                *([part.offset for part in parts], kept),
            )
        ]
        x = self._embed(ids).contiguous()
        hidden = x.new_empty(len(kept), self._hidden_size)
        logits = x.new_empty(len(kept), self._vocab_size)
        plans = self._plans()
        struct = PassStruct(
            *(len(positions), len(parts), len(kept)),
            *(numbers.data_ptr() for numbers in given),
            *(None if plan is None else plan.address for plan in plans),
        )
        addresses = ctypes.addressof(self._model), ctypes.addressof(struct)
        tensors = x.data_ptr(), hidden.data_ptr(), logits.data_ptr()
        if self._run(*addresses, *tensors, self._threads):
            raise MemoryError("no memory for the intermediate results of a step")
        return logits, hidden

    def _plans(self) -> tuple[AdapterPlan | None, AdapterPlan | None]:
        """Return whose adapter each token has: of all tokens, and of those that reach the head."""
        body, top = self._bank.step, self._bank.head_step
        digests = frozenset() if body is None else body.digests
        if self._prepared != (self._bank.version, digests):
            for product in self._products:
                product.prepare()
            self._prepared = self._bank.version, digests
        return (
            None if body is None else body.plan,
            None if top is None else top.plan,
        )


@dataclass(frozen=True, slots=True)
class _NormParts:
    weight: torch.Tensor
    offset: float
    eps: float

    @property
    def width(self) -> int:
        return len(self.weight)


@dataclass(frozen=True, slots=True)
class _LayerParts:
    """What a layer is made of; `norms` and `products` in the order of the structure."""

    index: int
    norms: tuple[_NormParts | None, ...]
    products: tuple[KernelLinears, ...]
    how: tuple[Any, ...]
    heads: int
    kv_heads: int
    width: int
    inner: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.heads, self.kv_heads, self.width, self.inner


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model is made of, all of it known to the kernels."""

    layers: list[_LayerParts]
    last: _NormParts
    head: KernelLinears
    rotary: nn.Module

    def angles(self, max_context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines [max_context, width] of all positions."""
        with torch.inference_mode():
            positions = torch.arange(max_context)[None]
            cosine, sine = self.rotary(torch.empty(1, 1, dtype=torch.float32), positions)
        return cosine[0].contiguous(), sine[0].contiguous()


def _norm(parts: _NormParts) -> NormStruct:
    return NormStruct(parts.weight.data_ptr(), parts.offset, parts.eps)


def parts_of(
    model: PreTrainedModel, projections: Projections, how: dict[int, tuple[Any, ...]]
) -> Parts | None:
    """Find the parts of a model, or None if it has others than the kernels know.

    Args:
        how: By layer, what transformers asks of attention: scale, window, softcap.
    """
    inside: Any = getattr(model, model.base_model_prefix, None)
    if set(_children(inside)) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    head, last = projections.kernel_of([model.get_output_embeddings()]), _norm_parts(inside.norm)
    found = [_layer(layer, projections, how) for layer in inside.layers]
    layers = [layer for layer in found if layer is not None]
    if head is None or last is None or not layers or len(layers) < len(found):
        return None
    if len({layer.shape for layer in layers}) > 1:
        return None
    parts = Parts(layers, last, head, inside.rotary_emb)
    return parts if parts.angles(1)[0].shape == (1, layers[0].width) else None


def _layer(
    layer: nn.Module, projections: Projections, how: dict[int, tuple[Any, ...]]
) -> _LayerParts | None:
    children = _children(layer)
    if set(children) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = children["self_attn"], children["mlp"]
    if set(_children(attention)) - set(HEAD_NORMS) != set(ATTENTION):
        return None
    if set(_children(mlp)) != set(MLP) or not _is_silu(mlp.act_fn):
        return None
    siblings = [attention.q_proj, attention.k_proj, attention.v_proj]
    products = [
        projections.kernel_of(modules)
        for modules in (
            *(siblings, [attention.o_proj]),
            *([mlp.gate_proj, mlp.up_proj], [mlp.down_proj]),
        )
    ]
    norms = [_norm_parts(children[name]) for name in NORMS]
    own = [getattr(attention, name, None) for name in HEAD_NORMS]
    head_norms = [None if norm is None else _norm_parts(norm) for norm in own]
    known = [*products, *norms, *(norm for norm, had in zip(head_norms, own, strict=True) if had)]
    if any(part is None for part in known) or attention.layer_idx not in how:
        return None
    width = attention.head_dim
    heads, kv_heads, value_heads = (module.out_features // width for module in siblings)
    if kv_heads != value_heads or any(norm and norm.width != width for norm in head_norms):
        return None
    return _LayerParts(
        attention.layer_idx,
        (*norms, *head_norms),
        tuple(product for product in products if product is not None),
        how[attention.layer_idx],
        *(heads, kv_heads, width, mlp.down_proj.in_features),
    )


def _norm_parts(module: Any) -> _NormParts | None:
    """Return the norm that a module computes by the kernel, as `Norms` found it."""
    kernel = vars(module).get("forward")
    if not isinstance(kernel, kernels.RmsNorm):
        return None
    return _NormParts(kernel.weight, kernel.offset, kernel.eps)


def _children(module: Any) -> dict[str, Any]:
    return dict(module.named_children()) if isinstance(module, nn.Module) else {}


def _is_silu(activation: nn.Module) -> bool:
    x = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(x), nn.functional.silu(x))

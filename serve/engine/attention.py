"""Attention over the KV arena, as one of transformers' attention functions.

The model runs on a flat row of tokens [1, N]: one token of each decoding sequence and chunks of
prompts. Everything but attention works on each token alone, so only attention must know which
token belongs to whom: a `Step`, handed down through the model's keyword arguments, says so. With
this name as attention implementation transformers builds no mask of its own.

Shapes: N tokens of the step, S sequences of a group, Q tokens of each, L keys, H key-value heads,
G query heads per key-value head, D head width. Grouped queries are folded into the query length,
[S, H, G*Q, D], so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from data.errors import EngineFailure
from serve.engine import kernels
from serve.engine.blocks import Block
from serve.engine.kv_cache import KVCache, LayerShape

IMPLEMENTATION = "hone_arena"


class Group:
    """Sequences whose blocks have one size and that bring equally many tokens to the step.

    Args:
        start: First row of the group; its S*Q rows are contiguous, sequence after sequence.
        blocks: One a sequence, by ascending lane.
        firsts: Position of each sequence's first token of this step.
        num_queries: Q.
    """

    def __init__(
        self,
        start: int,
        blocks: Sequence[Block],
        firsts: Sequence[int],
        num_queries: int,
        device: torch.device,
    ):
        self.rows = slice(start, start + len(blocks) * num_queries)
        self.num_queries = num_queries
        self._size = blocks[0].size
        self._num_keys = max(firsts) + num_queries
        low, span = blocks[0].lane, blocks[-1].lane - blocks[0].lane + 1
        self._lanes = slice(low, low + span)
        # With gaps between the lanes: a few are computed in vain, many are worth a copy of ours.
        self._gathered: torch.Tensor | None = None  # lanes
        self._padded: torch.Tensor | None = None  # places in the view's span
        if len(blocks) < span <= 2 * len(blocks):
            self._padded = torch.tensor([block.lane - low for block in blocks], device=device)
        elif len(blocks) < span:
            self._gathered = torch.tensor([block.lane for block in blocks], device=device)
        firsts_S1 = torch.tensor(firsts, device=device)[:, None]
        positions = firsts_S1 + torch.arange(num_queries, device=device)
        if self._padded is not None:  # lanes that are not ours look at key 0, to be dropped
            ours = positions
            positions = ours.new_zeros(span, num_queries).index_copy_(0, self._padded, ours)
        self._positions = positions
        self._masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor] = {}

    def attend(
        self,
        query_NED: torch.Tensor,
        keys_THD: torch.Tensor,
        values_THD: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return the attention output of the group's rows, [S*Q, H*G, D]."""
        keys, values = self._view(keys_THD), self._view(values_THD)
        heads, width = keys.shape[1], query_NED.shape[-1]
        query = query_NED[self.rows].unflatten(0, (-1, self.num_queries)).unflatten(2, (heads, -1))
        folded = query.permute(0, 2, 3, 1, 4).reshape(len(query), heads, -1, width)
        if self._padded is not None:
            padded = folded.new_zeros(len(self._positions), *folded.shape[1:])
            folded = padded.index_copy_(0, self._padded, folded)
        mask = self._mask(window, query.shape[3], folded.dtype)
        mixed = _attention(folded, keys, values, mask, scale, softcap)
        if self._padded is not None:
            mixed = mixed.index_select(0, self._padded)
        unfolded = mixed.unflatten(2, (-1, self.num_queries)).permute(0, 3, 1, 2, 4)
        return unfolded.flatten(2, 3).flatten(0, 1)

    def _view(self, arena_THD: torch.Tensor) -> torch.Tensor:
        """Return [S, H, L, D]: a view where lanes are dense, else a copy of our lanes."""
        whole = len(arena_THD) // self._size * self._size
        lanes = arena_THD[:whole].unflatten(0, (-1, self._size))[:, : self._num_keys]
        if self._gathered is None:
            return lanes[self._lanes].transpose(1, 2)
        return lanes.index_select(0, self._gathered).transpose(1, 2)

    def _mask(self, window: int | None, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 where a query sees a key, else -inf: [S, 1, G*Q, L], or one row if Q is 1."""
        groups = 1 if self.num_queries == 1 else groups
        key = (window, groups, dtype)
        if key not in self._masks:
            keys = torch.arange(self._num_keys, device=self._positions.device)
            queries = self._positions[:, :, None]
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device)
            mask.masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask.repeat(1, groups, 1).unsqueeze(1)
        return self._masks[key]


class Singles:
    """Sequences that bring one token each, for the kernel: blocks of any size, in any order.

    Args:
        blocks: One a sequence.
        positions: Of each sequence's token.
    """

    def __init__(self, blocks: Sequence[Block], positions: Sequence[int], threads: int):
        self._threads = threads
        self._rows = slice(0, len(blocks))
        self._offsets = torch.tensor([block.offset for block in blocks])
        self._positions = torch.tensor(positions)
        self._seen: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        query_NED: torch.Tensor,
        keys_THD: torch.Tensor,
        values_THD: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return the attention output of the first S rows, [S, H*G, D]."""
        if window not in self._seen:
            hidden = torch.zeros_like(self._positions)
            if window is not None:
                hidden = (self._positions + 1 - window).clamp(min=0)
            self._seen[window] = self._offsets + hidden, self._positions + 1 - hidden
        first, length = self._seen[window]
        query = query_NED[self._rows]
        return kernels.attend(
            query, keys_THD, values_THD, first, length, scale, softcap, self._threads
        )


@dataclass
class Step:
    """Where the tokens of one forward pass go in the arena, and what they see."""

    cache: KVCache
    where_N: torch.Tensor
    groups: list[Group | Singles]

    def attend(
        self,
        layer: int,
        query_NED: torch.Tensor,
        key_NHD: torch.Tensor,
        value_NHD: torch.Tensor,
        *how: Any,
    ) -> torch.Tensor:
        """Store the new keys and values; return [N, heads, D]."""
        self.cache.write(layer, self.where_N, key_NHD, value_NHD)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        outputs = [group.attend(query_NED, keys, values, *how) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass
class ProbeStep:
    """One sequence that sees only itself: no arena. Notes the shapes of every layer."""

    num_tokens: int
    device: torch.device
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    how: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # scale, window, softcap

    def attend(
        self,
        layer: int,
        query_NED: torch.Tensor,
        key_NHD: torch.Tensor,
        value_NHD: torch.Tensor,
        *how: Any,
    ) -> torch.Tensor:
        """Return [N, heads, D]."""
        self.how[layer] = how
        self.shapes[layer] = (key_NHD.shape[1], key_NHD.shape[2], value_NHD.shape[2])
        group = Group(0, [Block(0, self.num_tokens)], [0], self.num_tokens, self.device)
        return group.attend(query_NED, key_NHD, value_NHD, *how)


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale
        )
    scores = torch.tanh(query @ keys.transpose(2, 3) * (scale / softcap)) * softcap + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ values


def arena_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    engine_step: Step | ProbeStep | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks of it: from [1, heads, N, D] to [1, N, heads, D]."""
    if engine_step is None:
        raise EngineFailure(
            "The model's attention is in use by an engine; close it before other forward passes."
        )
    if others.get("s_aux") is not None:
        raise EngineFailure("Attention sinks are not supported by this engine.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = engine_step.attend(layer, query, key, value, scale, sliding_window, softcap)
    return output[None], None


AttentionInterface.register(IMPLEMENTATION, arena_attention)

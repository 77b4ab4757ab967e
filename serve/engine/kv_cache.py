"""Keys and values of every running sequence, in one arena of tokens per layer.

Shapes: T tokens of the arena, H key-value heads, D head width. Memory is taken once, at start, and
never grows: its size is the stated budget.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from serve.engine.blocks import Block

LayerShape = tuple[int, int, int]  # heads, key width, value width


class KVCache:
    """Arenas `keys[layer]` and `values[layer]`, each [T, H, D]."""

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.dtype = dtype
        # Zeros, not empty: masked attention weights are 0, and 0 times a stray NaN is NaN.
        self.keys, self.values = (
            {
                layer: torch.zeros(num_tokens, shape[0], shape[side], dtype=dtype, device=device)
                for layer, shape in shapes.items()
            }
            for side in (1, 2)
        )

    def write(
        self, layer: int, where_N: torch.Tensor, key_NHD: torch.Tensor, value_NHD: torch.Tensor
    ) -> None:
        """Store the keys and values of N tokens at arena positions."""
        self.keys[layer].index_copy_(0, where_N, key_NHD)
        self.values[layer].index_copy_(0, where_N, value_NHD)

    def copy(self, source: Block, target: Block, start: int, stop: int) -> None:
        """Copy the tokens from `start` to `stop` of one block to the same places of another."""
        for arena in (*self.keys.values(), *self.values.values()):
            tokens = arena[source.offset + start : source.offset + stop]
            arena[target.offset + start : target.offset + stop] = tokens

    def scrub(self, block: Block) -> None:
        """Zero a block whose sequence may have left values that are not finite."""
        for arena in (*self.keys.values(), *self.values.values()):
            arena[block.offset : block.offset + block.size].zero_()


def bytes_per_token(shapes: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Return the cache memory that one token takes in all layers."""
    numbers = sum(heads * (key + value) for heads, key, value in shapes.values())
    return numbers * dtype.itemsize

"""An adapter as plain tensors, checked and scaled, and the modules that it may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Weights:
    """One module's share of an adapter: A [r, in] and B [r, out], scaling included."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class Trial:
    """A few tokens and what the trainer's own model said of them: whoever serves must say the same.

    Attributes:
        logprobs: Of every token but the first.
        dtype: The trainer's.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that passed the checks of its files, in host memory.

    Attributes:
        trial: None where the trainer left none, as other trainers do.
    """

    digest: str
    weights: Mapping[str, Weights]
    trial: Trial | None = None

    @property
    def rank(self) -> int:
        """Rows that it takes: its largest rank."""
        return max(len(weights.a) for weights in self.weights.values())

    @property
    def num_bytes(self) -> int:
        """Host memory."""
        return sum(w.a.nbytes + w.b.nbytes for w in self.weights.values())

    def scaled(self, scale: float) -> LoadedAdapter:
        """Return the adapter that adds `scale` times as much, under a digest of its own."""
        if scale == 1:
            return self
        weights = {site: Weights(w.a, w.b * scale) for site, w in self.weights.items()}
        return LoadedAdapter(variant_of(self.digest, scale), weights)


def variant_of(digest: str, scale: float) -> str:
    """Name an adapter at a scale."""
    return digest if scale == 1 else f"{digest}*{scale!r}"


def lora_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that LoRA may change, by name."""
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def site_shape(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a site."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]  # Conv1D

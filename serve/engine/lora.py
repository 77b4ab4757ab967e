"""Many LoRA adapters in one forward pass: stacked matrices and a mask of ownership.

Each module that some adapter changes is a site with two buffers: A [R, in] and B [R, out], in which
every active adapter owns some rows, the same in all sites (zeros where it lacks the module or has a
smaller rank there). With x [N, in] the tokens of a step,

    output += where(row's adapter is the token's, x @ A.T, 0) @ B

adds to each token its own adapter and nothing else. Foreign products are replaced by zeros, not
multiplied by them, so an adapter that overflows cannot reach another's tokens. Scaling is folded
into B. A step of base tokens only pays one comparison a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Weights:
    """One site's share of an adapter: A [r, in] and B [r, out], scaling included."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that passed the checks of its files, in host memory."""

    digest: str
    weights: Mapping[str, Weights]

    @property
    def rank(self) -> int:
        """Rows that it takes: its largest rank."""
        return max(len(weights.a) for weights in self.weights.values())

    @property
    def num_bytes(self) -> int:
        """Host memory."""
        return sum(w.a.nbytes + w.b.nbytes for w in self.weights.values())


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


class _Site:
    """The stacked matrices of one module, and the hook that adds their product."""

    def __init__(self, bank: LoraBank, module: nn.Module, is_head: bool, num_claimed: int):
        self.bank = bank
        self.is_head = is_head
        self.shape = site_shape(module)
        self.scale = float(getattr(module, "embed_scale", 1.0))  # Gemma scales its embeddings
        self.users: set[str] = set()
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        # Only rows that were claimed are ever read; the others need not even be memory yet.
        self.a = weight.new_empty(bank.max_rows, self.shape[0])
        self.b = weight.new_empty(bank.max_rows, self.shape[1])
        self.a[:num_claimed] = 0
        self.b[:num_claimed] = 0
        lookup = isinstance(module, nn.Embedding)
        self.handle = module.register_forward_hook(self._embed if lookup else self._multiply)

    def put(self, digest: str, rows: torch.Tensor, weights: Weights | None) -> None:
        """Write an adapter's share into its rows, zeros where it has none."""
        rank = 0
        if weights is not None:
            self.users.add(digest)
            rank = len(weights.a)
            self.a[rows[:rank]] = weights.a.to(self.a)
            self.b[rows[:rank]] = (weights.b * self.scale).to(self.b)
        if rank < len(rows):
            self.a[rows[rank:]] = 0
            self.b[rows[rank:]] = 0

    def _multiply(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        step = self.bank.step
        if step is not None and not self.users.isdisjoint(step.digests):
            inputs = args[0].reshape(-1, self.shape[0])
            step.add(output, inputs @ self.a[step.rows].T, self.b, self.is_head)

    def _embed(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        step = self.bank.step
        if step is not None and not self.users.isdisjoint(step.digests):
            columns = self.a[step.rows].index_select(1, args[0].flatten())
            step.add(output, columns.T, self.b, self.is_head)


@dataclass(frozen=True, slots=True)
class _Step:
    """Which rows take part in a forward pass, and which tokens are none of their business."""

    digests: frozenset[str]
    rows: slice
    foreign: torch.Tensor  # [N, rows] bool
    foreign_head: torch.Tensor  # the same for the rows that reach the head

    def add(
        self, output: torch.Tensor, products: torch.Tensor, b: torch.Tensor, is_head: bool
    ) -> None:
        """Add the masked products [N, rows] times B to the output in place."""
        products.masked_fill_(self.foreign_head if is_head else self.foreign, 0)
        output.view(-1, output.shape[-1]).addmm_(products, b[self.rows])


class LoraBank:
    """The active adapters of a model, at most `max_rows` ranks together.

    Rows are claimed from the lowest on, so those between the rows of a step's adapters were all
    written once.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int):
        self.max_rows = max_rows
        self.step: _Step | None = None
        self._model = model
        self._modules = lora_sites(model)
        self._sites: dict[str, _Site] = {}
        self._owned: dict[str, torch.Tensor] = {}  # digest -> rows, least recently used first
        self._numbers: dict[str, int] = {}
        self._next_number = 0
        self._num_claimed = 0  # rows that some adapter had, so that they hold finite numbers
        self._device: torch.device = model.device
        self._owner = torch.full((max_rows,), NOBODY, dtype=torch.long, device=self._device)

    def activate(self, adapter: LoadedAdapter, in_use: Iterable[str]) -> bool:
        """Give an adapter rows, taking those of unused ones if need be; False if none are left."""
        if adapter.digest in self._owned:
            self._owned[adapter.digest] = self._owned.pop(adapter.digest)
            return True
        while (free := (self._owner == NOBODY).nonzero().flatten()).numel() < adapter.rank:
            if not self._evict(set(in_use)):
                return False
        rows = free[: adapter.rank]
        self._num_claimed = max(self._num_claimed, int(rows[-1]) + 1)
        for name in adapter.weights.keys() - self._sites.keys():
            self._add_site(name)
        for name, site in self._sites.items():
            site.put(adapter.digest, rows, adapter.weights.get(name))
        self._owned[adapter.digest] = rows
        self._numbers[adapter.digest] = self._next_number
        self._owner[rows] = self._next_number
        self._next_number += 1
        return True

    def deactivate(self, digest: str) -> None:
        """Free the rows of an adapter that no sequence uses."""
        rows = self._owned.pop(digest, None)
        if rows is not None:
            del self._numbers[digest]
            self._owner[rows] = NOBODY
            for site in self._sites.values():
                site.users.discard(digest)

    def clear(self) -> None:
        """Free all rows, whoever has them."""
        for digest in list(self._owned):
            self.deactivate(digest)

    def begin(self, spans: Sequence[tuple[str | None, int]], head_rows: torch.Tensor) -> None:
        """Prepare a forward pass over consecutive spans of (adapter digest, tokens)."""
        digests = frozenset(digest for digest, _ in spans if digest is not None)
        if not digests:
            self.step = None
            return
        owned = torch.cat([self._owned[digest] for digest in digests])
        rows = slice(int(owned.min()), int(owned.max()) + 1)
        numbers = [NOBODY - 1 if digest is None else self._numbers[digest] for digest, _ in spans]
        counts = torch.tensor([count for _, count in spans])
        token_owner = torch.tensor(numbers).repeat_interleave(counts).to(self._device)
        foreign = token_owner[:, None] != self._owner[None, rows]
        self.step = _Step(digests, rows, foreign, foreign.index_select(0, head_rows))

    def close(self) -> None:
        """Give the model back as it was."""
        self.step = None
        for site in self._sites.values():
            site.handle.remove()
        self._sites.clear()

    def _add_site(self, name: str) -> None:
        module = self._modules[name]
        is_head = module is self._model.get_output_embeddings()
        self._sites[name] = _Site(self, module, is_head, self._num_claimed)

    def _evict(self, in_use: set[str]) -> bool:
        unused = [digest for digest in self._owned if digest not in in_use]
        if unused:
            self.deactivate(unused[0])
        return bool(unused)

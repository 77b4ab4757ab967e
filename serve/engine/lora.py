"""Many LoRA adapters in one forward pass: stacked factors and a mask of ownership.

Every active adapter owns some rows of each stack, the same in all stacks (zeros where it lacks the
module or has a smaller rank there). With x [n, in] the tokens of a segment,

    output += where(row's adapter is the token's, x @ A.T, 0) @ B

adds to each token its own adapter and nothing else. Foreign products are replaced by zeros, not
multiplied by them, so an adapter that overflows cannot reach another's tokens. Scaling is folded
into B. Decoding tokens of all adapters are one segment; a long chunk of a prompt is a segment of
its own, which multiplies its own adapter's rows only. Base tokens alone pay one comparison a stack.

Shapes: n tokens, R rows, S modules that share their input, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from serve.engine.adapter_weights import LoadedAdapter
from serve.engine.kernels import AdapterPlan, ProductStruct

NOBODY = -1
OWN_SEGMENT = 32  # tokens of one adapter that are worth products of their own


@dataclass(frozen=True, slots=True)
class Holding:
    """What an active adapter has: its rows, ascending, and the number that marks them."""

    digest: str
    rows: torch.Tensor
    number: int

    @property
    def span(self) -> slice:
        """From its first row to its last."""
        return slice(int(self.rows[0]), int(self.rows[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of a forward pass, and the rows that may concern them.

    Attributes:
        foreign: [n, R] bool, which rows are another adapter's; None if all are the tokens' own.
    """

    tokens: slice
    rows: slice
    digests: frozenset[str]
    foreign: torch.Tensor | None


class LoraStep:
    """Who owns the tokens of one forward pass: of all of them, or of those that reach the head.

    Made for stacks in two forms, each on demand: `segments` for torch, `plan` for the kernels.

    Args:
        spans: Consecutive (holding or None, tokens).
        owner: [R] the number of the adapter that has each row.
        kept: [K] numbers of the tokens that are left, ascending; None for all.
    """

    def __init__(
        self,
        spans: Sequence[tuple[Holding | None, int]],
        owner: torch.Tensor,
        kept: torch.Tensor | None = None,
    ):
        self.digests = frozenset(held.digest for held, _ in spans if held is not None)
        self._spans = spans
        self._owner = owner
        self._kept = kept

    @cached_property
    def segments(self) -> list[Segment]:
        """The tokens in segments; those of the base alone are in none."""
        if self._kept is not None:
            whole = _segment(0, self._spans, self._owner)
            return [_only(segment, self._kept) for segment in whole]
        segments = []
        mixed: list[tuple[Holding | None, int]] = []
        start = place = 0
        for held, count in (*self._spans, (None, OWN_SEGMENT)):  # a last one, to close the open
            if count >= OWN_SEGMENT:
                segments += _segment(start, mixed, self._owner)
                segments += _segment(place, [(held, count)], self._owner)
                mixed, start = [], place + count
            else:
                mixed.append((held, count))
            place += count
        return segments

    @cached_property
    def plan(self) -> AdapterPlan:
        """The same as numbers of rows for each token."""
        first: list[int] = []
        number: list[int] = []
        rows: list[int] = []
        starts: dict[str, int] = {}
        for held, count in self._spans:
            if held is None:
                first += [0] * count
                number += [0] * count
                continue
            if held.digest not in starts:
                starts[held.digest] = len(rows)
                rows += held.rows.tolist()
            first += [starts[held.digest]] * count
            number += [len(held.rows)] * count
        if self._kept is not None:
            kept = self._kept.tolist()
            first, number = [first[n] for n in kept], [number[n] for n in kept]
        return AdapterPlan(first, number, rows)


class LoraStack:
    """The factors of all active adapters for S modules that read the same input.

    A is [max_rows, S, in], so that one product serves all S; B is [max_rows, out] for each.
    Memory is taken when the first adapter brings one of the modules.

    Args:
        names: Of the modules.
        shapes: Their (inputs, outputs).
        scale: Of what the modules add to their output.
        narrow: Whether the factors are rounded to bfloat16; for the kernels alone.
    """

    def __init__(
        self,
        bank: LoraBank,
        names: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        is_head: bool = False,
        scale: float = 1.0,
        narrow: bool = False,
    ):
        self.names = list(names)
        self._bank = bank
        self._is_head = is_head
        self._scale = scale
        self._narrow = narrow
        self._num_inputs = shapes[0][0]
        self._sizes = [size for _, size in shapes]
        self._users: list[set[str]] = [set() for _ in names]
        self._a = torch.empty(0)
        self._b: list[torch.Tensor] = []

    def put(self, adapter: LoadedAdapter, rows: torch.Tensor) -> None:
        """Write an adapter's share into its rows, zeros where it has none."""
        shares = [adapter.weights.get(name) for name in self.names]
        first = int(rows[0])  # neighbours are written as slices, five times faster
        dense = int(rows[-1]) - first == len(rows) - 1
        if not self._b:
            if not any(shares):
                return
            self._take_memory()
        for index, share in enumerate(shares):
            rank = 0
            if share is not None:
                self._users[index].add(adapter.digest)
                rank = len(share.a)
                mine = slice(first, first + rank) if dense else rows[:rank]
                a, b = share.a, share.b if self._scale == 1 else share.b * self._scale
                if not dense:  # what is written by index has the stack's dtype already
                    a, b = a.to(self._a), b.to(self._a)
                self._a[mine, index] = a
                self._b[index][mine] = b
            if rank < len(rows):
                self._a[rows[rank:], index] = 0
                self._b[index][rows[rank:]] = 0

    def forget(self, digest: str) -> None:
        """Note that an adapter's rows are free."""
        for users in self._users:
            users.discard(digest)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Add every token's adapter to the modules' outputs, in place.

        Args:
            x: [N, in], the tokens' inputs.
            output: [N, sum of outputs], the modules side by side.
        """
        for segment in self._segments():
            a = self._a[segment.rows]
            products = x[segment.tokens] @ a.view(-1, self._num_inputs).T
            self._add_products(products.view(len(products), len(a), -1), segment, output)

    def add_lookup(self, ids: torch.Tensor, output: torch.Tensor) -> None:
        """The same for a lookup table: `ids` [N] name the inputs that are 1."""
        for segment in self._segments():
            columns = self._a[segment.rows].index_select(2, ids[segment.tokens])
            self._add_products(columns.permute(2, 0, 1), segment, output)

    def plan_for(self, product: ProductStruct) -> AdapterPlan | None:
        """Return the plan of the step at hand for a kernel's product, or None if it has none.

        The product learns where the factors are as soon as there are any.
        """
        step = self._step()
        if step is None:
            return None
        if not product.siblings:
            product.a, product.siblings = self._a.data_ptr(), len(self._b)
            product.narrow = int(self._narrow)
            for index, (b, size) in enumerate(zip(self._b, self._sizes, strict=True)):
                product.b[index], product.size[index] = b.data_ptr(), size
        return step.plan

    def _segments(self) -> Iterator[Segment]:
        step = self._step()
        for segment in step.segments if step is not None else ():
            if any(not users.isdisjoint(segment.digests) for users in self._users):
                yield segment

    def _step(self) -> LoraStep | None:
        """Return the step at hand if it concerns this stack."""
        step = self._bank.head_step if self._is_head else self._bank.step
        if step is None or all(users.isdisjoint(step.digests) for users in self._users):
            return None
        return step

    def _add_products(self, nRS: torch.Tensor, segment: Segment, output: torch.Tensor) -> None:
        mine = nRS.permute(2, 0, 1).contiguous()
        if segment.foreign is not None:
            mine.masked_fill_(segment.foreign, 0)
        start = 0
        for index, size in enumerate(self._sizes):
            if not self._users[index].isdisjoint(segment.digests):
                place = output[segment.tokens, start : start + size]
                place.addmm_(mine[index], self._b[index][segment.rows])
            start += size

    def _take_memory(self) -> None:
        like, rows = self._bank.like, self._bank.max_rows
        if self._narrow:
            like = like.to(torch.bfloat16)
        # Only rows that were claimed are ever read; the others need not even be memory yet.
        self._a = like.new_empty(rows, len(self.names), self._num_inputs)
        self._b = [like.new_empty(rows, size) for size in self._sizes]
        for stack in (self._a, *self._b):
            stack[: self._bank.num_claimed] = 0


class LoraBank:
    """The active adapters of a model, at most `max_rows` ranks together.

    Rows are claimed from the lowest on, so those between the rows of a step's adapters were all
    written once.

    Attributes:
        step: Who owns the tokens of the forward pass at hand; None for base tokens alone.
        head_step: The same of those that reach the head.
        num_claimed: Rows that some adapter had, so that they hold finite numbers.
        version: Changes whenever an adapter comes or goes.
        like: A tensor of the dtype that adapters are computed in, on the model's device.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int, dtype: torch.dtype | None = None):
        self.max_rows = max_rows
        self.step: LoraStep | None = None
        self.head_step: LoraStep | None = None
        self.num_claimed = 0
        self.version = 0
        self.like = torch.empty(0, dtype=dtype or model.dtype, device=model.device)
        self._stacks: list[LoraStack] = []
        self._held: dict[str, Holding] = {}  # by digest, least recently used first
        self._next_number = 0
        self._owner = torch.full((max_rows,), NOBODY, dtype=torch.long, device=model.device)

    @property
    def digests(self) -> list[str]:
        """Of the active adapters, scaled ones under their own."""
        return list(self._held.copy())

    def attach(self, stack: LoraStack) -> None:
        """Have a stack filled with the adapters that become active."""
        self._stacks.append(stack)

    def activate(self, adapter: LoadedAdapter, in_use: Iterable[str]) -> bool:
        """Give an adapter rows, taking those of unused ones if need be; False if none are left."""
        if adapter.digest in self._held:
            self._held[adapter.digest] = self._held.pop(adapter.digest)
            return True
        while (free := (self._owner == NOBODY).nonzero().flatten()).numel() < adapter.rank:
            if not self._evict(set(in_use)):
                return False
        rows = _densest(free, adapter.rank)
        self.version += 1
        self.num_claimed = max(self.num_claimed, int(rows[-1]) + 1)
        for stack in self._stacks:
            stack.put(adapter, rows)
        self._held[adapter.digest] = Holding(adapter.digest, rows, self._next_number)
        self._owner[rows] = self._next_number
        self._next_number += 1
        return True

    def deactivate(self, digest: str) -> None:
        """Free the rows of an adapter that no sequence uses."""
        held = self._held.pop(digest, None)
        if held is not None:
            self.version += 1
            self._owner[held.rows] = NOBODY
            for stack in self._stacks:
                stack.forget(digest)

    def clear(self) -> None:
        """Free all rows, whoever has them."""
        for digest in list(self._held):
            self.deactivate(digest)

    def begin(self, spans: Sequence[tuple[str | None, int]], head_rows: torch.Tensor) -> None:
        """Prepare a forward pass over consecutive spans of (adapter digest, tokens)."""
        self.step = self.head_step = None
        if any(digest is not None for digest, _ in spans):
            owned = [(None if d is None else self._held[d], count) for d, count in spans]
            self.step = LoraStep(owned, self._owner)
            self.head_step = LoraStep(owned, self._owner, head_rows)

    def close(self) -> None:
        """Forget all stacks."""
        self.step = self.head_step = None
        self._stacks.clear()

    def _evict(self, in_use: set[str]) -> bool:
        unused = [digest for digest in self._held if digest not in in_use]
        if unused:
            self.deactivate(unused[0])
        return bool(unused)


def _densest(free: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first run of neighbours among ascending row numbers, else the lowest rows."""
    spans = free[count - 1 :] - free[: len(free) - count + 1]
    start = int((spans == count - 1).int().argmax())
    return free[start : start + count]


def _segment(
    start: int, spans: Sequence[tuple[Holding | None, int]], owner: torch.Tensor
) -> list[Segment]:
    """Return the segment of consecutive spans, none if all are the base's."""
    holdings = {held.digest: held for held, _ in spans if held is not None}
    if not holdings:
        return []
    places = [held.span for held in holdings.values()]
    rows = slice(min(p.start for p in places), max(p.stop for p in places))
    tokens = slice(start, start + sum(count for _, count in spans))
    digests = frozenset(holdings)
    [held, *others] = [held for held, _ in spans]
    if held is not None and not others and len(held.rows) == rows.stop - rows.start:
        return [Segment(tokens, rows, digests, None)]
    numbers = [NOBODY - 1 if held is None else held.number for held, _ in spans]
    counts = torch.tensor([count for _, count in spans])
    owners = torch.tensor(numbers).repeat_interleave(counts).to(owner.device)
    return [Segment(tokens, rows, digests, owners[:, None] != owner[None, rows])]


def _only(segment: Segment, kept: torch.Tensor) -> Segment:
    """Return the segment of all tokens as one of those that are kept, [K] ascending numbers."""
    foreign = segment.foreign
    if foreign is not None:
        foreign = foreign.index_select(0, kept)
    return Segment(slice(0, len(kept)), segment.rows, segment.digests, foreign)

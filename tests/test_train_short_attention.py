"""Attention of short rows written out, against PyTorch's own under autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train import short_attention

SCALE = 0.3


def heads(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query [2, 6, 7, 8] and key and value of two heads, laid out as the layers do."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 6, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def masks() -> dict[str, Tensor | None]:
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    padded = causal.repeat(2, 1, 1, 1)
    padded[1, ..., 4:] = False
    padded[1, :, 4:, :4] = True
    window = causal & ~causal.tril(-3)
    added = torch.zeros(7, 7).masked_fill(~window, torch.finfo(torch.float32).min)
    return {
        "causal": None,
        "padded": padded,
        "window": window.expand(1, 1, 7, 7),
        "added": added.expand(2, 1, 7, 7),
    }


def expected(parts: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Return the mixed values and the gradients of a weighted sum, by PyTorch in float64."""
    q, k, v = (part.double().detach().requires_grad_() for part in parts)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    mixed = functional.scaled_dot_product_attention(
        q, k, v, mask, scale=SCALE, is_causal=mask is None, enable_gqa=True
    )
    mixed = mixed.transpose(1, 2)
    (mixed * weights(mixed)).sum().backward()
    return [mixed.detach(), *(part.grad for part in (q, k, v) if part.grad is not None)]


def found(parts: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    q, k, v = (part.detach().requires_grad_() for part in parts)
    mixed = short_attention.attend(q, k, v, mask, SCALE)
    (mixed * weights(mixed)).sum().backward()
    return [mixed.detach(), *(part.grad for part in (q, k, v) if part.grad is not None)]


def weights(mixed: Tensor) -> Tensor:
    return torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed.dtype)


@pytest.mark.parametrize("name", list(masks()))
def test_values_and_gradients(name: str) -> None:
    ours, theirs = found(heads(), masks()[name]), expected(heads(), masks()[name])
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_bfloat16_rounds_only_at_its_ends() -> None:
    parts = heads(torch.bfloat16)
    for one, other in zip(found(parts, None), expected(parts, None), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, atol=1e-2, rtol=1e-2)


def test_a_query_that_sees_nothing_stays_finite() -> None:
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    assert all(part.isfinite().all() for part in found(heads(), mask))


@pytest.mark.parametrize(
    ("length", "implementation", "dropout", "suits"),
    [
        (short_attention.LONGEST, "sdpa", 0.0, True),
        (short_attention.LONGEST + 1, "sdpa", 0.0, False),
        (7, "eager", 0.0, False),
        (7, "sdpa", 0.1, False),
    ],
)
def test_what_is_left_to_the_library(
    length: int, implementation: str, dropout: float, suits: bool
) -> None:
    query = torch.zeros(1, 1, length, 2)
    assert short_attention.suits(query, implementation, dropout) is suits
    assert not short_attention.suits(query.to("meta"), implementation, dropout)

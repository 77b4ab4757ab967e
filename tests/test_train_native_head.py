"""The head in C against PyTorch's own operations under autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from serve.engine import kernels
from train import native_code, native_head
from train.native_code import BY_FLOAT, BY_PAIRS, BY_UNIT

pytestmark = pytest.mark.skipif(native_code.library() is None, reason="needs a C compiler")

# positions, hidden, vocabulary: chunks and slices that are whole and that are not
SHAPES = [(1, 8, 5), (7, 44, 301), (130, 64, 2048), (257, 96, 4130), (40, 512, 6176)]


def case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    count, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / width**0.5)
    head.weight.requires_grad_(False)
    hidden = torch.randn(count, width, generator=generator).to(dtype)
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    targets[::3] = (hidden.double() @ head.weight.double().t()).argmax(-1)[::3]
    return head, 2 * hidden, targets


def truth(head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    hidden = hidden.double().requires_grad_()
    every = torch.log_softmax(hidden @ head.weight.double().t() / temperature, -1)
    chosen = every.gather(-1, targets[:, None]).squeeze(-1)
    chosen.sum().backward()
    assert hidden.grad is not None
    entropy = -(every.exp() * every).sum(-1)
    is_top = (every.argmax(-1) == targets).double()
    return [chosen.detach(), entropy.detach(), is_top, hidden.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients(shape: tuple[int, int, int], temperature: float) -> None:
    head, hidden, targets = case(shape, torch.float32)
    assert native_head.suits(head, hidden)
    found = native_head.scores(head.weight, hidden, targets, temperature)
    for part, expected in zip(found, truth(head, hidden, targets, temperature), strict=True):
        assert part is not None
        torch.testing.assert_close(part.double(), expected, atol=2e-5, rtol=2e-5)
    alone = native_head.scores(head.weight, hidden, targets, temperature, slopes=False)
    assert alone.slopes is None
    assert all(torch.equal(*pair) for pair in zip(alone[:3], found[:3], strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", [BY_FLOAT, BY_PAIRS, BY_UNIT])
def test_in_bfloat16(
    shape: tuple[int, int, int], way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_pairs = kernels.library() is not None and kernels.library().multiplies_bfloat16()
    if (way == BY_PAIRS and not has_pairs) or (
        way == BY_UNIT and not native_code.library().has_unit()
    ):
        pytest.skip("this processor has no such products")
    monkeypatch.setattr(native_code, "_way_in_bfloat16", lambda: way)
    head, hidden, targets = case(shape, torch.bfloat16)
    found = native_head.scores(head.weight, hidden, targets, 0.9)
    log_probs, entropies, _, slopes = truth(head, hidden, targets, 0.9)
    # inputs are bfloat16 already, and sums are float32: only the shares are rounded
    torch.testing.assert_close(found.log_probs.double(), log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.entropies.double(), entropies, atol=1e-4, rtol=1e-4)
    assert found.slopes is not None
    assert found.slopes.dtype == torch.bfloat16
    assert (found.slopes.double() - slopes).norm() < 6e-3 * slopes.norm()


def test_threads_and_neighbours_change_no_bit() -> None:
    head, hidden, targets = case((257, 96, 4130), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(native_head.scores(head.weight, hidden, targets))
    finally:
        torch.set_num_threads(before)
    some = native_head.scores(head.weight, hidden[100:140], targets[100:140])
    for one, three, part in zip(*results, some, strict=True):
        assert one is not None
        assert three is not None
        assert torch.equal(one, three)
        assert torch.equal(one[100:140], part)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    head, hidden, targets = case((7, 44, 301), torch.float32)
    hidden[2, 3] = float("nan")
    hidden[4, 3] = float("inf")
    found = native_head.scores(head.weight, hidden, targets)
    unknown = native_head.scores(head.weight, hidden, torch.full_like(targets, 301))
    assert unknown.log_probs.isnan().all()
    finite = found.log_probs.isfinite()
    assert finite.tolist() == [row not in (2, 4) for row in range(7)]


def test_nothing_to_score_and_what_does_not_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = case((7, 44, 301), torch.float32)
    empty = native_head.scores(head.weight, hidden[:0], targets[:0])
    assert [part.shape for part in empty if part is not None] == [(0,), (0,), (0,), (0, 44)]
    assert not native_head.suits(nn.Linear(44, 301), hidden)  # has a bias, and learns
    assert not native_head.suits(head, hidden.bfloat16())
    monkeypatch.setattr(native_code, "library", lambda: None)
    assert not native_head.suits(head, hidden)

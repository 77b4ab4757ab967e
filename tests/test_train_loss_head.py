"""The compact head and the trainer's loss, against transformers' own loss over all positions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from train import loss_head
from train.loss_head import use_compact_head

IGNORED = -100


def patched(arch: str) -> PreTrainedModel:
    model = tiny_model(arch)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    use_compact_head(model)
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (3, 12), generator=generator)
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[2, 9:] = IGNORED
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("chunk", [1024, 4])
def test_scores_and_gradients_are_transformers(
    arch: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", chunk)
    inputs = batch()
    reference = tiny_model(arch)
    expected = reference(**inputs, use_cache=False)
    expected.loss.backward()
    model = patched(arch)
    scores = model(**inputs, fused_lm_head=True)
    loss = -scores.log_probs.sum() / scores.label_mask.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, n=name: f"{n}: {text}")
    mask = inputs["labels"][:, 1:] != IGNORED
    log_probs = expected.logits[:, :-1].log_softmax(-1)
    right = log_probs.argmax(-1) == inputs["labels"][:, 1:]
    assert torch.equal(scores.is_top1.bool(), right & mask)
    entropy = -(log_probs.exp() * log_probs).sum(-1) * mask
    torch.testing.assert_close(scores.entropy, entropy.detach())


@pytest.mark.parametrize("chunk", [1024, 4])
def test_a_frozen_head_scores_alike(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK", chunk)
    found = []
    for frozen in (False, True):
        model = patched("llama")
        model.lm_head.weight = torch.nn.Parameter(  # untied, so that the rest still learns
            model.lm_head.weight.detach().clone(), requires_grad=not frozen
        )
        scores = model(**batch(), fused_lm_head=True)
        weights = torch.randn(scores.log_probs.shape, generator=torch.Generator().manual_seed(3))
        (scores.log_probs * weights).sum().backward()
        assert (model.lm_head.weight.grad is None) == frozen
        body = {n: p.grad for n, p in model.model.named_parameters()}
        found.append((scores.log_probs, scores.entropy, scores.is_top1, body))
    torch.testing.assert_close(found[1], found[0])


def test_a_frozen_head_without_gradients() -> None:
    model = patched("llama").requires_grad_(False)
    scores = model(**batch(), fused_lm_head=True)
    expected = patched("llama")(**batch(), fused_lm_head=True)
    torch.testing.assert_close(scores.log_probs, expected.log_probs.detach())


def test_positions_without_loss_score_zero() -> None:
    scores = patched("llama")(**batch(), fused_lm_head=True)
    mask = batch()["labels"][:, 1:] != IGNORED
    assert torch.equal(scores.label_mask, mask)
    assert not scores.log_probs[~mask].any()


def test_a_batch_without_loss_has_a_gradient_of_zero() -> None:
    inputs = batch()
    inputs["labels"][:] = IGNORED
    model = patched("llama")
    model(**inputs, fused_lm_head=True).log_probs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_generation_still_has_its_logits() -> None:
    ids = batch()["input_ids"]
    torch.testing.assert_close(
        patched("llama")(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits
    )

"""The shape of a fresh adapter: its scale as PEFT computes it, and misspelt layers."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import tiny_model

from data.errors import ConfigError
from train.config import SftLora
from train.lora import lora_config


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [2, 8, 32])
def test_the_scale_is_two_at_every_rank(rank: int, use_rslora: bool) -> None:
    lora = SftLora(r=rank, use_rslora=use_rslora, target_modules=["q_proj"])
    base = tiny_model("llama")
    model = get_peft_model(base, lora_config(lora, base))
    scales = {one.scaling["default"] for one in model.modules() if isinstance(one, LoraLayer)}
    assert list(scales) == [pytest.approx(2)]


def test_a_misspelt_layer_is_told_though_another_is_right() -> None:
    lora = SftLora(r=4, target_modules=["q_proj", "self_attn.v_proj", "vproj", "embed_tokens"])
    with pytest.raises(ConfigError) as caught:
        lora_config(lora, tiny_model("llama"))
    text = str(caught.value)
    assert '"vproj", but the base has no such linear layer; did you mean "v_proj"?' in text
    assert '"embed_tokens"' in text
    assert '"q_proj", but' not in text
    assert '"self_attn.v_proj", but' not in text

"""The shape of a fresh adapter."""

from __future__ import annotations

from peft import LoraConfig

from train.config import LoraSettings, SftLora


def lora_config(lora: LoraSettings) -> LoraConfig:
    """Return PEFT's configuration of the settings."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=isinstance(lora, SftLora) and lora.use_dora,
        task_type="CAUSAL_LM",
    )

"""The shape of a fresh adapter."""

from __future__ import annotations

import math

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from data.errors import ConfigError
from data.settings import nearest
from train.config import LoraSettings, SftLora


def lora_config(lora: LoraSettings, model: nn.Module) -> LoraConfig:
    """Return PEFT's configuration of the settings, for a base.

    An adapter without an alpha of its own is scaled by 2, whatever its rank: `alpha` is `2 r`, or
    `2 sqrt(r)` with rsLoRA, whose scale is `alpha / sqrt(r)` (Kalajdzievski 2023).

    Raises:
        ConfigError: The base has no such linear layer as `target_modules` names.
    """
    if isinstance(lora.target_modules, list):
        _check_targets(lora.target_modules, model)
    by_rule = 2 * math.sqrt(lora.r) if lora.use_rslora else 2 * lora.r
    return LoraConfig(
        r=lora.r,
        lora_alpha=by_rule if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=isinstance(lora, SftLora) and lora.use_dora,
        task_type="CAUSAL_LM",
    )


def _check_targets(targets: list[str], model: nn.Module) -> None:
    """Refuse names of no linear layer: PEFT overlooks them where another name is right."""
    layers = [name for name, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D)]
    short = sorted({name.rpartition(".")[2] for name in layers})
    problems = []
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            guess = nearest(target, short)
            instead = f'; did you mean "{guess}"?' if guess else ""
            problems.append(
                f'lora.target_modules names "{target}", but the base has no such linear layer'
                f"{instead} It has {', '.join(short)}"
            )
    if not targets:
        problems.append("lora.target_modules is an empty list; name layers, or give all-linear")
    if problems:
        raise ConfigError(problems)

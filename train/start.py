"""Going on from an adapter: its shape and its weights, never merged into the base."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

from data.errors import AdapterRefused
from serve.engine.base_spec import find_spec
from train.base_model import Base
from train.config import SftConfig
from train.run import ORIGIN


def read_shape(
    folder: Path, base: Base, dropout: float, setting: str = "start_adapter"
) -> LoraConfig:
    """Return the configuration of an adapter to go on from, or of another that `setting` names.

    Raises:
        AdapterRefused: There is none in the folder, or it belongs to another base.
    """
    config = _read(folder, setting)
    origin = folder / ORIGIN
    made_for = json.loads(origin.read_text("utf-8")) if origin.exists() else base.origin
    if made_for.get("base_fingerprint") != base.fingerprint:
        raise AdapterRefused(
            f"{setting} {folder} was trained on {made_for.get('base_model')} "
            f"({made_for.get('base_fingerprint')}), but the base is {base.name} "
            f"({base.fingerprint}); give an adapter of this base",
            code="adapter_wrong_base",
        )
    config.base_model_name_or_path = None  # PEFT warns of a name that is not its path
    config.inference_mode = False
    config.lora_dropout = dropout
    return config


def check_compared(config: SftConfig, base: Base) -> None:
    """Refuse a `compare_with` that could not be compared with when all is trained.

    Raises:
        AdapterRefused: It is no adapter, or not of this base, where `compare_base` names no other.
        ModelUnavailable: There is no such `compare_base`.
    """
    if config.compare_with is None:
        return
    if config.compare_base is None:
        read_shape(config.compare_with, base, dropout=0.0, setting="compare_with")
    else:
        _read(config.compare_with, "compare_with")
        find_spec(config.compare_base)


def _read(folder: Path, setting: str) -> LoraConfig:
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterRefused(
            f"{setting} {folder} holds no LoRA adapter ({error})", code="adapter_incomplete"
        ) from error


def set_weights(model: PeftModel, folder: Path) -> None:
    """Give a fresh adapter the weights of the one in a folder.

    Raises:
        AdapterRefused: Their tensors are not the same ones.
    """
    weights = load_peft_weights(str(folder), device="cpu")
    outcome = set_peft_model_state_dict(model, weights)
    missing = [name for name in outcome.missing_keys if ".lora_" in name]
    if missing or outcome.unexpected_keys:
        names = ", ".join([*missing, *outcome.unexpected_keys][:5])
        raise AdapterRefused(
            f"start_adapter {folder} does not fit the base: {names}", code="adapter_wrong_shape"
        )

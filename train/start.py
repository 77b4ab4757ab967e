"""Going on from an adapter: its shape and its weights, never merged into the base."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

from data.errors import AdapterRefused
from data.reward_head import HEAD
from serve.engine import base_model
from train.base_model import Base
from train.config import SftConfig
from train.run import ORIGIN


def read_shape(
    folder: Path,
    base: Base,
    dropout: float,
    setting: str = "start_adapter",
    may_score: bool = False,
) -> LoraConfig:
    """Return the configuration of an adapter to go on from, or of another that `setting` names.

    Args:
        may_score: Whether a reward model will do; what writes text does not begin as one.

    Raises:
        AdapterRefused: There is none in the folder, it belongs to another base, or it scores.
    """
    config = _read(folder, setting)
    if (folder / HEAD).exists() and not may_score:
        raise AdapterRefused(
            f"{setting} {folder} is a reward model ({HEAD} lies beside it), which scores text and "
            "never learned to write it; give an adapter of train.sft, or leave it out",
            code="adapter_unsupported",
        )
    _check_base(folder, base.name, base.fingerprint, setting)
    config.base_model_name_or_path = None  # PEFT warns of a name that is not its path
    config.inference_mode = False
    config.lora_dropout = dropout
    return config


def _check_base(folder: Path, name: str, fingerprint: str, setting: str) -> None:
    origin = folder / ORIGIN
    if not origin.exists():
        return
    made_for = json.loads(origin.read_text("utf-8"))
    if made_for.get("base_fingerprint") != fingerprint:
        raise AdapterRefused(
            f"{setting} {folder} was trained on {made_for.get('base_model')} "
            f"({made_for.get('base_fingerprint')}), but the base is {name} ({fingerprint}); give "
            "an adapter of this base",
            code="adapter_wrong_base",
        )


def check_compared(config: SftConfig, base: Base) -> None:
    """Refuse a `compare_with` that could not be compared with when all is trained.

    Raises:
        AdapterRefused: It is no adapter, or not of this base or the one that `compare_base` names.
        ConfigError: There is no such `compare_base`.
        ModelUnavailable: That can be neither fetched nor read.
    """
    if config.compare_with is None:
        return
    if config.compare_base is None:
        read_shape(config.compare_with, base, dropout=0.0, setting="compare_with")
    else:
        _read(config.compare_with, "compare_with")
        spec = base_model.find_spec(config.compare_base)
        mark = base_model.fingerprint(base_model.fetch(spec, config.models_dir))
        _check_base(config.compare_with, spec.name, mark, "compare_with")


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

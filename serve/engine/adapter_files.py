"""Reading a LoRA adapter, and refusing one that would not do what its trainer meant.

Nothing of the model changes here: the result is plain tensors whose names, shapes and values have
been checked against the model's modules. Every refusal says which file, which tensor and why.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data.errors import AdapterRefused
from serve.engine.adapter_weights import LoadedAdapter, Trial, Weights, site_shape
from serve.engine.base import Adapter, AdapterRef, MemoryAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ORIGIN_FILE = "hone.json"
PROBE_FILE = "probe.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
PREFIX = "base_model.model."
TENSOR = re.compile(
    r"^(?P<site>.+)\.(?:lora_(?P<half>[AB])\.weight|lora_embedding_(?P<lookup>[AB])"
    r"|(?P<base>base_layer)\.weight)$"
)

# Fields of PEFT's LoraConfig that say nothing about what the adapter computes here, and those that
# are read below. Any other field that is set names a variant of LoRA which plain A and B miss.
IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
READ = {
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r"),
    *("rank_pattern", "target_modules", "use_rslora"),
}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # leave the base as it is


def memory_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], owner: str = ""
) -> MemoryAdapter:
    """Return an adapter to hand over to an engine without writing it.

    Args:
        config: `LoraConfig.to_dict()` of PEFT.
        tensors: `get_peft_model_state_dict(model)` of PEFT; copied, so training may go on.
    """
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    kept = {}
    for name, tensor in sorted(tensors.items()):
        kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
        digest.update(f"{name}{kept[name].dtype}{tuple(tensor.shape)}".encode())
        digest.update(kept[name].view(-1).view(torch.uint8).numpy().data)
    return MemoryAdapter(digest.hexdigest(), plain, kept, owner)


def read_adapter(
    ref: Adapter, sites: Mapping[str, nn.Module], base_fingerprint: str = ""
) -> LoadedAdapter:
    """Read an adapter and check it against the model's sites.

    Args:
        base_fingerprint: Refuse an adapter whose `hone.json` names another base; empty skips that,
            and so does an adapter without the file, as other trainers leave it.

    Raises:
        AdapterRefused: `code` names the check that failed.
    """
    folder = Path(ref.path)
    if isinstance(ref, AdapterRef):
        _check_origin(folder, base_fingerprint)
        config, tensors = _read_config(folder), _read_tensors(folder)
    else:
        config, tensors = dict(ref.config), dict(ref.tensors)
    _check_config(folder / CONFIG_FILE, config)
    halves = _match(folder, tensors, sites)
    path = folder / WEIGHTS_FILE
    weights = {
        site: _check_site(path, site, sites[site], pair, config) for site, pair in halves.items()
    }
    _check_complete(folder, config, sites, weights)
    trial = _read_trial(folder) if isinstance(ref, AdapterRef) else None
    return LoadedAdapter(ref.digest, weights, trial)


def _refuse(path: Path, reason: str, code: str) -> AdapterRefused:
    return AdapterRefused(f"{path}: {reason}", code=f"adapter_{code}")


def _check_origin(folder: Path, base_fingerprint: str) -> None:
    path = folder / ORIGIN_FILE
    if not base_fingerprint or not path.exists():
        return
    try:
        found = json.loads(path.read_text("utf-8"))["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _refuse(path, f"does not say which base is meant ({error})", "wrong_base") from error
    if found != base_fingerprint:
        reason = f"the adapter was trained on {found}; this base is {base_fingerprint}"
        raise _refuse(path, reason, "wrong_base")


def _read_trial(folder: Path) -> Trial | None:
    """Return what the trainer recorded for loads; None if it recorded nothing."""
    path = folder / PROBE_FILE
    if not path.exists():
        return None
    try:
        given = json.loads(path.read_text("utf-8")).get("trial")
        if given is None:
            return None
        ids, logprobs = given["token_ids"], given["logprobs"]
        trial = Trial(tuple(map(int, ids)), tuple(map(float, logprobs)), str(given["dtype"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(path, f"cannot be read ({error!r})", "invalid_probe") from error
    if len(trial.logprobs) != len(trial.token_ids) - 1 or min(trial.token_ids) < 0:
        reason = f"its trial has the tokens {ids} and {len(logprobs)} log-probabilities"
        raise _refuse(path, reason, "invalid_probe")
    return trial


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise _refuse(path, "is missing; publish the adapter again", "missing") from None
    except (OSError, ValueError) as error:
        raise _refuse(path, f"cannot be read ({error})", "invalid_config") from error
    if not isinstance(config, dict):
        raise _refuse(path, f"is not a JSON object but {config!r}", "invalid_config")
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what plain A and B do not say."""
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise _refuse(path, f'peft_type is {kind!r}; only "LORA" is served', "unsupported")
    for name, value in config.items():
        if name not in READ and name not in IGNORED and value:
            reason = f'"{name}" is {value!r}: this variant of LoRA is not served; train without it'
            raise _refuse(path, reason, "unsupported")
    if config.get("bias", "none") != "none":
        reason = f'"bias" is {config["bias"]!r}: trained biases are not served; set it to "none"'
        raise _refuse(path, reason, "unsupported")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        reason = (
            f'"init_lora_weights" is {config["init_lora_weights"]!r}, which changes the base '
            f"weights; save with `path_initial_model_for_weight_conversion` of PEFT"
        )
        raise _refuse(path, reason, "unsupported")
    _check_numbers(path, config)


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    whole = all(isinstance(rank, int) and rank > 0 for rank in ranks)
    if not whole or not all(isinstance(alpha, int | float) for alpha in alphas):
        reason = "r and rank_pattern must be whole positive numbers, lora_alpha and alpha_pattern"
        raise _refuse(path, f"{reason} numbers; got {ranks} and {alphas}", "invalid_config")


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            reason = (
                f"{pickles[0]} is a pickle, which runs code when read; save the adapter with "
                f"safetensors (`save_pretrained` does by default)"
            )
            raise _refuse(folder, reason, "pickle")
        raise _refuse(path, "is missing; publish the adapter again", "missing")
    try:
        return load_file(path, backend="pread")  # a mapping would change with its file
    except (SafetensorError, OSError, ValueError) as error:
        reason = f"is truncated or not safetensors ({error}); publish the adapter again"
        raise _refuse(path, reason, "truncated") from error


def _match(
    folder: Path, tensors: Mapping[str, torch.Tensor], sites: Mapping[str, nn.Module]
) -> dict[str, dict[str, torch.Tensor]]:
    """Sort tensors by site and half; every tensor must find its place."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    strangers = []
    for name, tensor in tensors.items():
        place = TENSOR.match(name.removeprefix(PREFIX))
        module = sites.get(place["site"]) if place else None
        if place is None or module is None or not _fits_kind(place, module):
            strangers.append(name)
        else:
            half = place["half"] or place["lookup"] or place["base"]
            found.setdefault(place["site"], {})[half] = tensor
    path = folder / WEIGHTS_FILE
    if not found:
        listed = f"none of its {len(tensors)} tensors names a module of the base model"
        reason = f"{listed} (the first: {', '.join(strangers[:3])}); it belongs to another base"
        raise _refuse(path, reason if tensors else "holds no tensors", "wrong_base")
    if strangers:
        reason = (
            f"{len(strangers)} of {len(tensors)} tensors fit no module of the base model: "
            f"{', '.join(sorted(strangers)[:10])}"
        )
        raise _refuse(path, reason, "unmatched_tensors")
    return found


def _fits_kind(place: re.Match[str], module: nn.Module) -> bool:
    lookup = isinstance(module, nn.Embedding)
    return place["base"] is not None or (place["lookup"] is not None) == lookup


def _check_site(
    path: Path,
    site: str,
    module: nn.Module,
    pair: dict[str, torch.Tensor],
    config: dict[str, Any],
) -> Weights:
    base = pair.pop("base_layer", None)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if base is not None and not _same(base, weight):
        reason = f"carries another {site}.weight than the base model's"
        raise _refuse(path, reason, "wrong_base")
    if pair.keys() != {"A", "B"}:
        missing = ", ".join(f"lora_{half}" for half in sorted({"A", "B"} - pair.keys()))
        raise _refuse(path, f"{site} lacks {missing}", "missing_tensors")
    rank = int(_by_pattern(config.get("rank_pattern"), site, config["r"]))
    inputs, outputs = site_shape(module)
    for half, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
        if tuple(pair[half].shape) != expected:
            reason = (
                f"{site}.lora_{half} has shape {list(pair[half].shape)}; expected {list(expected)}"
            )
            raise _refuse(path, reason, "wrong_shape")
        if not pair[half].is_floating_point():
            reason = f"{site}.lora_{half} holds {pair[half].dtype}, no floating-point numbers"
            raise _refuse(path, reason, "not_finite")
    alpha = _by_pattern(config.get("alpha_pattern"), site, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    scaled = torch.empty(rank, outputs)  # written once, and in its final order
    torch.mul(pair["B"].T.float(), scaling, out=scaled)
    weights = Weights(pair["A"].to(weight.dtype).contiguous(), scaled.to(weight.dtype))
    if not (_is_finite(weights.a) and _is_finite(weights.b)):
        for half, tensor in pair.items():
            if not _is_finite(tensor):
                raise _refuse(path, f"{site}.lora_{half} holds NaN or infinity", "not_finite")
        reason = f"{site} overflows {weight.dtype} when scaled by {scaling:g}"
        raise _refuse(path, reason, "not_finite")
    return weights


def _is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all numbers are finite, in one pass: NaN is its own minimum and maximum."""
    return all(math.isfinite(extreme) for extreme in torch.stack(tensor.aminmax()).tolist())


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return mine.shape == theirs.shape and torch.equal(mine.to(theirs), theirs)


def _by_pattern(patterns: Mapping[str, float] | None, site: str, default: float) -> float:
    """Return the value of the first pattern that is a suffix of the site's name, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default


def _check_complete(
    folder: Path,
    config: dict[str, Any],
    sites: Mapping[str, nn.Module],
    weights: Mapping[str, Weights],
) -> None:
    """Refuse an adapter that lost the tensors of modules which its config lists."""
    targets = config.get("target_modules")
    narrowed = any(config.get(name) for name in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or narrowed:
        return
    expected = {s for s in sites if any(s == t or s.endswith(f".{t}") for t in targets)}
    lost = sorted(expected - weights.keys())
    if lost:
        reason = f"lacks tensors of {len(lost)} targeted modules: {', '.join(lost[:10])}"
        raise _refuse(folder / WEIGHTS_FILE, reason, "missing_tensors")

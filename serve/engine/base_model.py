"""Base models: fetch once, load, and tell one from another.

`fetch` makes one folder a model under the models directory: safetensors, config, tokenizer, and
`hone_base.json` with the fingerprint. It is made beside its place and renamed into it, under a lock
that holds between processes, so no reader ever sees half of it. Packages are de-quantised into that
folder; hub snapshots and local folders are linked into it, not copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from data.errors import ModelUnavailable
from serve.engine import processor
from serve.engine.base_sources import place
from serve.engine.base_spec import DTYPES, ModelSpec, find_spec, read_spec

__all__ = [
    "ModelSpec",
    "cached",
    "fetch",
    "find_spec",
    "fingerprint",
    "load",
    "read_spec",
    "resolve_device",
    "resolve_dtype",
]

RECORD = "hone_base.json"
# The part of config.json that decides which function the weights compute.
ARCHITECTURE_FIELDS = (
    *("model_type", "hidden_act", "vocab_size", "tie_word_embeddings", "layer_types"),
    *("hidden_size", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "sliding_window"),
    *("rope_theta", "rope_parameters", "rope_scaling"),
)


def cached(spec: ModelSpec, models_dir: Path) -> Path | None:
    """Return the folder of a model that is already there, whole, or None."""
    folder = _folder(spec, models_dir)
    complete = (folder / RECORD).exists() and all(path.exists() for path in folder.iterdir())
    return folder if complete else None


def fetch(spec: ModelSpec, models_dir: Path) -> Path:
    """Return the model's folder, making it first if need be; progress goes to stderr.

    Raises:
        ModelUnavailable: No network, wrong hash, no room, not a usable model; says what to do.
    """
    folder = _folder(spec, models_dir)
    if cached(spec, models_dir) is None:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if cached(spec, models_dir) is None:
                _make(spec, folder)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a fetched folder.

    Raises:
        ModelUnavailable: The folder holds none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnavailable(
            f"{folder}: its tokenizer cannot be loaded ({error}). Delete the folder to fetch it "
            f"anew, or give another model.",
            code="model_unreadable",
        ) from error


def load(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    quantization: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load model (evaluation mode) and tokenizer from a fetched folder.

    Args:
        quantization: How transformers quantises the weights as it loads them; None: not at all.

    Raises:
        ModelUnavailable: The folder is not a causal language model in safetensors.
    """
    device = resolve_device(device)
    try:
        tokenizer = load_tokenizer(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=resolve_dtype(dtype, device),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": device},
        )
        if report["missing_keys"]:  # transformers would go on with random numbers
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:5])}")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelUnavailable(
            f"{folder}: cannot be loaded as a causal language model ({error}). Delete the folder "
            f"to fetch it anew, or give another model.",
            code="model_unreadable",
        ) from error
    return (model if quantization else model.to(device)).eval(), tokenizer


def fingerprint(folder: Path) -> str:
    """Return "base-" and 16 hex digits over the weights and the architecture.

    Computed once and kept in `hone_base.json` with the size and time of each weight file; computed
    again when those change.

    Raises:
        ModelUnavailable: The folder holds no model.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").exists():
        raise ModelUnavailable(
            f"{folder}: holds no config.json with *.safetensors; give a base model's folder.",
            code="model_unreadable",
        )
    states = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
    record = folder / RECORD
    if record.exists():
        kept = json.loads(record.read_text("utf-8"))
        if kept.get("weights") == states:
            return str(kept["fingerprint"])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    architecture = {key: config[key] for key in ARCHITECTURE_FIELDS if config.get(key) is not None}
    digest.update(json.dumps(architecture, sort_keys=True).encode())
    mark = f"base-{digest.hexdigest()[:16]}"
    if os.access(folder, os.W_OK):
        temporary = folder / f".{RECORD}.{os.getpid()}"
        temporary.write_text(json.dumps({"fingerprint": mark, "weights": states}, indent=1))
        temporary.replace(record)
    return mark


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Turn a dtype name into torch's; "auto" is bfloat16 where it is fast, else float32.

    bfloat16 without hardware for it is about four times slower than float32 on a CPU.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f'dtype is "{dtype}"; expected one of {", ".join(DTYPES)}')
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and processor.is_fast_in_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def resolve_device(device: torch.device | str) -> torch.device:
    """Turn a device name into torch's; "auto" is CUDA where there is one.

    Of several processes that train together, each has the GPU of its rank on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device)


def _folder(spec: ModelSpec, models_dir: Path) -> Path:
    """Name the folder after everything that decides its content."""
    identity = repr((spec.source, spec.eos_tokens, spec.chat_template))
    return models_dir / f"{spec.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for the process that fetches {folder.name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(spec: ModelSpec, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        place(spec, temporary)
        fingerprint(temporary)
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise ModelUnavailable(
            f"{folder}: could not be written ({error}). Free some disk space or set `home` to a "
            f"folder on another disk.",
            code="model_not_written",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

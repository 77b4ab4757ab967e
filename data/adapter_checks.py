"""What an adapter folder must be before anything loads it, checked from its bytes, without torch.

Only safetensors are read: pickles run code. The header must describe the file exactly, every number
must be finite, and the A and B factors must agree with each other and with the configuration.
Whether the tensors fit the base model's modules is the engine's check, which has the model.

Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import AdapterRefused

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ORIGIN = "hone.json"  # {"base_model", "base_fingerprint"}: which base the adapter was trained on
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
MAX_HEADER_BYTES = 100 << 20
CHUNK_VALUES = 1 << 22
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the registry keeps of a checked adapter; `bytes` is the size of all its files."""

    rank: int
    target_modules: tuple[str, ...]
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a safetensors header says of a tensor; offsets are from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_adapter(folder: Path, base_fingerprint: str | None) -> AdapterFacts:
    """Check a PEFT folder and return its facts.

    Args:
        base_fingerprint: The base that it must have been trained on; None skips that check.

    Raises:
        AdapterRefused: With a code for what is wrong: adapter_incomplete, adapter_pickle,
            adapter_unsupported, adapter_wrong_base, adapter_truncated, adapter_wrong_shape,
            adapter_not_finite.
    """
    config = _read_config(folder)
    _check_base(folder, base_fingerprint)
    weights = folder / WEIGHTS
    header, start = read_header(weights)
    _check_factors(weights, header, config)
    _check_finite(weights, header, start)
    size = sum(path.stat().st_size for path in files_of(folder))
    modules = {
        str(match["module"]).rpartition(".")[2] for match in map(FACTOR.fullmatch, header) if match
    }
    return AdapterFacts(int(config["r"]), tuple(sorted(modules)), digest_of(folder), size)


def digest_of(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of all files of a folder."""
    total = hashlib.sha256()
    for path in files_of(folder):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """Return every file below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_header(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that a safetensors file describes, and where their data start.

    Raises:
        AdapterRefused: The file is cut off, longer than described, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise _truncated(path, f"its header would be {length} bytes long, the file has {size}")
        text = stream.read(length)
    try:
        described = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(described, dict):
            raise ValueError("it is no JSON object")
        described.pop("__metadata__", None)
        tensors = {name: _read_entry(entry) for name, entry in described.items()}
    except (ValueError, RecursionError) as error:
        raise _truncated(path, f"its header cannot be read ({error})") from error
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.dtype not in ITEM_BYTES:
            raise AdapterRefused(
                f"{path}: the tensor {name} has the type {tensor.dtype}; an adapter holds "
                f"{', '.join(ITEM_BYTES)} only",
                code="adapter_unsupported",
            )
        num_bytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if tensor.begin != at or tensor.end - tensor.begin != num_bytes:
            place = f"bytes {tensor.begin} to {tensor.end}"
            raise _truncated(path, f"the tensor {name} of shape {tensor.shape} has {place}")
        at = tensor.end
    start = 8 + length
    if size != start + at:
        raise _truncated(path, f"its header describes {start + at} bytes, the file has {size}")
    return tensors, start


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return dict(pairs)


def _read_entry(entry: Any) -> Tensor:
    if not isinstance(entry, dict):
        raise ValueError("a tensor's entry is no JSON object")
    if not isinstance(entry.get("dtype"), str):
        raise ValueError("a tensor has no dtype")
    begin, end = _sizes(entry.get("data_offsets"))
    return Tensor(entry["dtype"], _sizes(entry.get("shape")), begin, end)


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, list) and all(type(size) is int and size >= 0 for size in value):
        return tuple(value)
    raise ValueError(f"{value!r} should be a list of sizes")


def _read_config(folder: Path) -> dict[str, Any]:
    pickles = [path.name for path in files_of(folder) if path.suffix in PICKLES]
    if pickles:
        raise AdapterRefused(
            f"{folder}: {', '.join(pickles)} is in pickle format, which can run code when it is "
            f"loaded; save the adapter as {WEIGHTS}",
            code="adapter_pickle",
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterRefused(
                f"{folder} has no {name}; a PEFT adapter folder holds {CONFIG} and {WEIGHTS}",
                code="adapter_incomplete",
            )
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(
            f"{folder / CONFIG} is not JSON ({error})", code="adapter_incomplete"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterRefused(
            f"{folder / CONFIG}: peft_type is {kind!r}; only LORA adapters are served",
            code="adapter_unsupported",
        )
    ranks = [config.get("r"), *_rank_pattern(config).values()]
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        raise AdapterRefused(
            f"{folder / CONFIG}: r and rank_pattern must be whole numbers above 0, got {ranks}",
            code="adapter_wrong_shape",
        )
    return dict(config)


def _rank_pattern(config: dict[str, Any]) -> dict[str, Any]:
    pattern = config.get("rank_pattern") or {}
    return pattern if isinstance(pattern, dict) else {"rank_pattern": pattern}


def _check_base(folder: Path, expected: str | None) -> None:
    if expected is None:
        return
    try:
        found = json.loads((folder / ORIGIN).read_text("utf-8"))["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterRefused(
            f"{folder} does not say which base it was trained on ({ORIGIN} is missing or damaged)",
            code="adapter_wrong_base",
        ) from error
    if found != expected:
        raise AdapterRefused(
            f"{folder} was trained on the base {found}, but this server's base is {expected}",
            code="adapter_wrong_base",
        )


def _check_factors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensor.shape
    if not sides:
        raise AdapterRefused(f"{path} holds no LoRA factors", code="adapter_wrong_shape")
    known = {config["r"], *_rank_pattern(config).values()}
    for module, shapes in sides.items():
        a, b = shapes.get("A"), shapes.get("B")
        if a is None or b is None:
            missing = "A" if a is None else "B"
            raise AdapterRefused(
                f"{path}: {module} has no lora_{missing}", code="adapter_wrong_shape"
            )
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] not in known:
            raise AdapterRefused(
                f"{path}: {module} has lora_A of {a} and lora_B of {b}; their rank must be one of "
                f"{sorted(known)} and agree",
                code="adapter_wrong_shape",
            )


def _check_finite(path: Path, tensors: dict[str, Tensor], start: int) -> None:
    for name, tensor in tensors.items():
        item_bytes = ITEM_BYTES[tensor.dtype]
        is_bf16 = tensor.dtype == "BF16"
        item = np.dtype("<u2") if is_bf16 else np.dtype(f"<f{item_bytes}")
        count = (tensor.end - tensor.begin) // item_bytes
        for at in range(0, count, CHUNK_VALUES):
            offset = start + tensor.begin + at * item_bytes
            part = np.fromfile(path, item, min(CHUNK_VALUES, count - at), offset=offset)
            # bfloat16 is the upper half of float32: all exponent bits set means infinite or NaN
            bad = (part & 0x7F80) == 0x7F80 if is_bf16 else ~np.isfinite(part)
            if bad.any():
                index = at + int(np.argmax(bad))
                raise AdapterRefused(
                    f"{path}: the tensor {name} has a value that is not finite, at {index}",
                    code="adapter_not_finite",
                )


def _truncated(path: Path, why: str) -> AdapterRefused:
    return AdapterRefused(
        f"{path} is damaged or cut off: {why}; copy or train it again", code="adapter_truncated"
    )

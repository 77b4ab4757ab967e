"""What a base model is and where it comes from: `configs/models/NAME.yaml` as a dataclass.

A source is a Python package that carries the weights as GGUF, a hub id, or a local folder. Specs
are found by name in `configs/models`, by the path of a YAML of one's own, by a model folder, or by
a hub id (`org/name`).
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from data.errors import ConfigError, ModelUnavailable

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A GGUF file inside a wheel of the package index; `sha256` is the wheel's."""

    package: str  # pinned: name==version
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the model hub."""

    hub: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class PathSource:
    """A folder of safetensors, config and tokenizer."""

    path: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A base model.

    Attributes:
        name: The model's id in the API.
        context_length: Longest prompt plus completion; None is the model's own limit.
        dtype: "auto" is bfloat16 where the hardware is fast in it, else float32.
        eos_tokens: Tokens that end a completion, where the model's own list is wrong.
        chat_template: Jinja text, where the tokenizer has none or a wrong one.
    """

    name: str
    source: PackageSource | HubSource | PathSource
    context_length: int | None = None
    dtype: str = "auto"
    eos_tokens: tuple[str, ...] = ()
    chat_template: str | None = None


def find_spec(name: str) -> ModelSpec:
    """Find a base model by configs/models name, YAML path, model folder or hub id.

    Raises:
        ModelUnavailable: Nothing of that name; the message lists the known ones.
        ConfigError: Its YAML is wrong.
    """
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name in known:
        return read_spec(CONFIGS / f"{name}.yaml")
    path = Path(name).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        return read_spec(path)
    if path.is_dir():
        return ModelSpec(path.resolve().name.lower(), PathSource(str(path.resolve())))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSpec(name.rpartition("/")[2].lower(), HubSource(name))
    guess = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{guess[0]}"?' if guess else f"known names: {', '.join(known)}."
    raise ModelUnavailable(
        f'There is no base model "{name}"; {hint} A path of a YAML like those in {CONFIGS}, a '
        f"folder with safetensors, or a hub id (org/name) works too.",
        param="model",
        code="unknown_base_model",
    )


def read_spec(path: Path) -> ModelSpec:
    """Read and check one YAML; raises ConfigError with every problem."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read as YAML ({error})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: must be a mapping with name and source"])
    problems = _wrong_keys(ModelSpec, values, "")
    kind = _source_kind(values.get("source"), problems)
    if kind is not None:
        problems += _wrong_keys(kind, values["source"], "source.")
    problems += _wrong_values(values)
    if problems or kind is None:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    values["source"] = kind(**values["source"])
    values["eos_tokens"] = tuple(values.get("eos_tokens", ()))
    if isinstance(values["source"], PathSource):  # relative to the YAML, wherever hone runs
        base = path.resolve().parent / Path(values["source"].path).expanduser()
        values["source"] = PathSource(str(base))
    return ModelSpec(**values)


def _source_kind(source: Any, problems: list[str]) -> type[Any] | None:
    kinds = {"package": PackageSource, "hub": HubSource, "path": PathSource}
    given = [key for key in kinds if isinstance(source, dict) and key in source]
    if len(given) == 1:
        return kinds[given[0]]
    problems.append(f'"source" must have exactly one of the keys {", ".join(kinds)}')
    return None


def _wrong_keys(kind: type[Any], values: dict[str, Any], prefix: str) -> list[str]:
    known = {field.name: field.default is MISSING for field in fields(kind)}
    problems = []
    for key in values:
        if key not in known:
            guess = difflib.get_close_matches(str(key), list(known), n=1)
            fix = f'did you mean "{guess[0]}"?' if guess else f"known keys: {', '.join(known)}"
            problems.append(f'unknown key "{prefix}{key}"; {fix}')
    missing = [key for key, required in known.items() if required and key not in values]
    return problems + [f'"{prefix}{key}" is required' for key in missing]


def _wrong_values(values: dict[str, Any]) -> list[str]:
    problems = []
    source = values.get("source")
    for key, value in (("name", values.get("name")), *(source or {}).items()) if source else ():
        if value is not None and not (isinstance(value, str) and value):
            problems.append(f'"{key}" is {value!r}; expected text')
    package = source.get("package") if isinstance(source, dict) else None
    if isinstance(package, str) and "==" not in package:
        problems.append(f'"source.package" is "{package}"; pin it: name==version')
    length = values.get("context_length")
    if length is not None and not (isinstance(length, int) and length >= 16):
        problems.append(f'"context_length" is {length!r}; expected a whole number, at least 16')
    if values.get("dtype", "auto") not in DTYPES:
        problems.append(f'"dtype" is {values["dtype"]!r}; expected one of {", ".join(DTYPES)}')
    tokens = values.get("eos_tokens", [])
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        problems.append(f'"eos_tokens" is {tokens!r}; expected a list of token texts')
    template = values.get("chat_template")
    if template is not None and not isinstance(template, str):
        problems.append('"chat_template" must be Jinja text')
    return problems

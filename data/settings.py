"""Deployment settings, and the one reader of configuration that everything shares.

`read_config` turns a YAML file plus `key=value` words into a validated pydantic model: unknown keys
are refused with the nearest name, and all problems come in one report with file and line.
Precedence: `key=value` over environment (deployment settings only) over YAML over defaults.
`Settings` holds what a deployment needs; it is built by a function and passed in, never global.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from data.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)
Location = tuple[str | int, ...]
ENV_PREFIX = "HONE_"
# Beside its own errors PyYAML raises these, for `2024-13-45`, `0x_` or an alias inside itself.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
# The file itself, what the CLI's client is told, and the password of `hone people`.
NOT_SETTINGS = {"HONE_CONFIG", "HONE_API_KEY", "HONE_BASE_URL", "HONE_PASSWORD"}


class StrictModel(BaseModel):
    """A frozen configuration section that refuses unknown keys, and truth values as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in types and {int, float} & set(types):
            raise ValueError("a number is expected; YAML reads yes, no, on, off as true or false")
        return value


class Prices(StrictModel):
    """What a million tokens cost, in USD."""

    prompt: float = Field(0.0, ge=0, description="Prompt tokens that were computed.")
    cached: float = Field(0.0, ge=0, description="Prompt tokens taken from the prefix cache.")
    completion: float = Field(0.0, ge=0, description="Sampled tokens.")
    training: float = Field(0.0, ge=0, description="Tokens trained on.")


class Limits(StrictModel):
    """What an account may do unless it has limits of its own; null is unlimited."""

    requests_per_minute: int | None = Field(None, ge=0)
    tokens_per_minute: int | None = Field(None, ge=0, description="Prompt plus completion.")
    requests_per_day: int | None = Field(None, ge=0)
    concurrent_jobs: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Jobs that wait or run."
    )
    stored_mb: int | None = Field(None, ge=0, description="Uploaded and produced files, MiB.")


class BiasLimits(StrictModel):
    """How far a fine-tune may be above its base and still be promoted; null is any distance."""

    stereotyped_rise: float | None = Field(
        None, ge=0, le=1, description="In the share of pairs in which it takes the stereotype."
    )
    harm_rise: float | None = Field(
        None, ge=0, le=1, description="In the mean score of harm of what it writes about groups."
    )
    gap_rise: float | None = Field(
        None, ge=0, description="In the largest gap between groups, nats."
    )


class Settings(StrictModel):
    """Everything that one installation of hone may be told. Paths are relative to where it runs."""

    home: Path = Field(Path(".hone"), description="Folder of database, files, adapters, models.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL; default: SQLite at HOME/hone.db."
    )
    blob_url: str | None = Field(
        None, description="fsspec URL for uploaded files; default: HOME/files."
    )
    model: str = Field(
        "smollm2-135m-instruct",
        description="Base model: a name in configs/models, a path to its YAML, or a local folder.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless told.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Serving precision; auto is bfloat16 where the hardware is fast in it."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    max_batch: int = Field(16, ge=1, description="Sequences that decode together.")
    max_context: int | None = Field(
        None, ge=16, description="Longest prompt plus completion, tokens; default: the model's."
    )
    kv_cache_mb: int = Field(1024, ge=1, description="Memory budget of the KV cache, MiB.")
    queue_size: int = Field(256, ge=1, description="Waiting requests before 503 is answered.")
    adapter_cache_mb: int = Field(
        1024, ge=1, description="Memory for adapters, MiB; the least recently used make room."
    )
    max_adapters_per_account: int | None = Field(
        None, ge=1, description="Adapters of one account in memory; default: any number."
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="Seconds after which a completion that waits or runs fails."
    )
    max_lora_rows: int = Field(
        256, ge=1, description="Ranks of all adapters of a step together; also the largest rank."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine.")
    shutdown_grace_s: int = Field(
        30, ge=0, description="Seconds that answers in flight may take when the server stops."
    )
    max_upload_mb: int = Field(512, ge=1, description="Largest uploaded file, MiB.")
    min_examples: int = Field(10, ge=1, description="Fewest training examples that a job accepts.")
    embedded_worker: bool = Field(True, description="Start a training worker with the server.")
    job_concurrency: int = Field(1, ge=1, description="Jobs that one worker trains at a time.")
    lease_s: float = Field(30.0, gt=0, description="A worker silent for this long loses its job.")
    heartbeat_s: float = Field(1.0, gt=0, description="Seconds between a worker's signs of life.")
    cancel_grace_s: float = Field(
        7.0, gt=0, description="Seconds a trainer has to stop at a pause or with its worker."
    )
    keep_checkpoints: int = Field(
        3, ge=1, description="Checkpoints of a job that stay usable as models; jobs may ask else."
    )
    webhooks_allow_private: bool = Field(
        False, description="Let webhooks call private addresses, and by plain http."
    )
    webhook_timeout_s: float = Field(10.0, gt=0, description="Seconds that a receiver may take.")
    webhook_retry_s: float = Field(
        5.0, gt=0, description="Seconds before a webhook's second attempt; tripled each time."
    )
    moderation_weights: Path | None = Field(
        None, description="Classifier of data.moderation.train; default: the one hone ships."
    )
    bias_reports: bool = Field(
        True, description="Measure each fine-tune's bias beside its base's, about 15 s a job."
    )
    bias_limits: BiasLimits = Field(
        BiasLimits(), description="A fine-tune that exceeds one is published but not promoted."
    )
    prices: Prices = Field(Prices(), description="USD per million tokens: ledger and limits.")
    limits: Limits = Field(Limits(), description="Limits of accounts that have none of their own.")
    wandb_project: str | None = Field(None, description="Log training runs to this wandb project.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text, or json: an object a line, with request id, account and route."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='Origins whose web pages may call the API; ["*"] is any.'
    )

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def adapters_dir(self) -> Path:
        return self.home / "adapters"

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def runs_dir(self) -> Path:
        return self.home / "runs"

    @property
    def workers_dir(self) -> Path:
        return self.home / "workers"

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{(self.home / 'hone.db').resolve()}"

    @property
    def effective_blob_url(self) -> str:
        return self.blob_url or f"file://{self.files_dir.resolve()}"


def load_settings(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Build the deployment settings from YAML, `HONE_*` variables and `key=value` words.

    Raises:
        ConfigError: With every problem found.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get(f"{ENV_PREFIX}CONFIG")
    words = [
        f"{name[len(ENV_PREFIX) :].lower()}={value}"
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX) and name not in NOT_SETTINGS
    ]
    return read_config(Settings, path, [*words, *overrides])


def read_config(
    model: type[ModelT], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> ModelT:
    """Read YAML, apply dotted `key=value` words (values are YAML), validate.

    Raises:
        ConfigError: With every problem found: unknown keys (nearest name given), wrong values,
            malformed words, each with its file and line or the word at fault.
    """
    values, places, problems = ({}, {}, []) if path is None else _read_yaml(Path(path))
    for word in overrides:
        _apply_word(values, places, problems, word)
    problems += _unknown_keys(model, values, places)
    try:
        parsed = model.model_validate(_known_only(model, values))
    except ValidationError as error:
        problems += [_describe(item, places) for item in error.errors()]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return parsed


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """Return the candidate closest to a misspelt name, if any is close."""
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return found[0] if found else None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror}); give an existing file"
        raise ConfigError([reason]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text ({error.reason})"]) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        places = dict(_key_places(node, path, ()))
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            [f"{where}: is not valid YAML ({getattr(error, 'problem', error)})"]
        ) from None
    if values is None:
        return {}, {}, []
    if not isinstance(values, dict):
        raise ConfigError([f"{path}:1: must be a mapping of keys to values"])
    return values, places, list(_repeated_keys(node, path))


def _key_places(node: yaml.Node | None, path: Path, at: Location) -> Iterator[tuple[Location, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            yield here, f"{path}:{key.start_mark.line + 1}"
            yield from _key_places(value, path, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*at, index), f"{path}:{value.start_mark.line + 1}"
            yield from _key_places(value, path, (*at, index))


def _repeated_keys(node: yaml.Node | None, path: Path) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield f'{path}:{key.start_mark.line + 1}: "{key.value}" is given twice; keep one'
            seen.add(key.value)
            yield from _repeated_keys(value, path)


def _apply_word(
    values: dict[str, Any], places: dict[Location, str], problems: list[str], word: str
) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key:
        problems.append(f'"{word}" is not key=value')
        return
    try:
        value = yaml.safe_load(text) if text else None
    except YAML_ERRORS:
        value = text
    parts = key.split(".")
    section = values
    for part in parts[:-1]:
        child = section.get(part)
        if child is None:
            child = section[part] = {}
        if not isinstance(child, dict):
            problems.append(f'"{word}": "{part}" is a value, not a section')
            return
        section = child
    section[parts[-1]] = value
    places[tuple(parts)] = f'"{word}"'


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {}
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found[name] = candidate
    return found


def _unknown_keys(
    model: type[BaseModel],
    values: Mapping[str, Any],
    places: Mapping[Location, str],
    at: Location = (),
) -> list[str]:
    problems = []
    sections = _sections(model)
    for key, value in values.items():
        here = (*at, str(key))
        if key not in model.model_fields:
            guess = nearest(str(key), list(model.model_fields))
            known = ", ".join(model.model_fields)
            fix = f'did you mean "{guess}"?' if guess else f"known keys: {known}"
            dotted = ".".join(map(str, here))
            problems.append(f'{_place(here, places)}unknown key "{dotted}"; {fix}')
        elif key in sections and isinstance(value, Mapping):
            problems += _unknown_keys(sections[key], value, places, here)
    return problems


def _known_only(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    sections = _sections(model)
    return {
        key: _known_only(sections[key], value)
        if key in sections and isinstance(value, Mapping)
        else value
        for key, value in values.items()
        if key in model.model_fields
    }


def _describe(item: Any, places: Mapping[Location, str]) -> str:
    location = tuple(item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if not location:
        return message
    dotted = ".".join(map(str, location))
    if item["type"] == "missing":
        return f'{_place(location, places)}"{dotted}" is required; give it a value'
    return f'{_place(location, places)}"{dotted}" is {item["input"]!r}: {message}'


def _place(location: Location, places: Mapping[Location, str]) -> str:
    for length in range(len(location), 0, -1):
        if location[:length] in places:
            return f"{places[location[:length]]}: "
    return ""

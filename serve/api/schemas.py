"""What a request may say: strict models of the completion calls, and the base of all the others.

Types are exact (no "1" for 1), unknown fields are refused by name, and an explicit null means the
default, because several clients send every field they know. A field that OpenAI has and hone does
not yet support is refused as such, never accepted and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from data.errors import InvalidInput
from data.stored_chats import check_metadata
from serve.engine.grammar import compile_schema

ANY_OBJECT = '{"type": "object"}'
EMPTY_NOTES: tuple[str, list[Any]] = ("annotations", [])
MAX_STOPS = 16
MAX_N = 128
MAX_BEST_OF = 20
MAX_LOGPROBS = 20
INT64 = 2**63
INT32_MAX = 2**31 - 1  # the most that an ordinary column of numbers holds
# Fields of texts that models read, where NUL is a character like others. Elsewhere it is refused.
TEXTS = frozenset(
    {"prompt", "prompts", "messages", "content", "input", "suffix", "stop", "tokens", "item"}
    | {"grader", "graders", "reference", "model_sample", "tasks", "correction", "text"}
    | {"logit_bias", "response_format", "json_schema", "schema"}
)

# Of a key, in seconds: a century at most, which the database can add to a date.
Lifetime = Annotated[int, Field(ge=1, le=100 * 366 * 86_400)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class RequestModel(BaseModel):
    """A JSON object of the API: strict, no unknown fields, null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    unsupported: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in values.items():
            if name in cls.unsupported and value is not None:
                raise PydanticCustomError("unsupported_parameter", "", {"name": name})
            if name not in known and name not in cls.unsupported:
                context = {"name": name, "known": sorted(known)}
                raise PydanticCustomError("unknown_parameter", "", context)
        path = _find_nul(values)
        if path is not None:
            raise PydanticCustomError("nul", "", {"path": path})
        return {name: value for name, value in values.items() if value is not None}


def _find_nul(value: Any) -> list[str | int] | None:
    """Return the path to the first name or value with the character NUL; None if there is none."""
    if isinstance(value, str):
        return [] if "\0" in value else None
    if isinstance(value, dict):
        steps: Iterable[tuple[str | int, Any]] = (i for i in value.items() if i[0] not in TEXTS)
    else:
        steps = enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        if isinstance(step, str) and "\0" in step:
            return [step.replace("\0", "\\0")]
        path = _find_nul(inner)
        if path is not None:
            return [step, *path]
    return None


class PlainQuery(BaseModel):
    """A query: text that reads as the right type, no unknown names."""

    model_config = ConfigDict(extra="forbid")


class QueryModel(PlainQuery):
    """The query of a list that comes in pages."""

    after: str | None = None


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidInput(
            "Invalid type for 'stop': expected a string or an array of strings.",
            code="invalid_type",
        )
    if len(stops) > MAX_STOPS:
        raise InvalidInput(
            f"Invalid 'stop': array too long. Expected an array with maximum length {MAX_STOPS}, "
            f"but got length {len(stops)} instead."
        )
    return tuple(stop for stop in stops if stop)


def _read_logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise InvalidInput(
            "Invalid type for 'logit_bias': expected an object.", code="invalid_type"
        )
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidInput(
                f"Invalid key in 'logit_bias': '{key}'. Keys are token ids, such as \"50256\"."
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidInput(
                f"Invalid 'logit_bias.{key}': expected a number from -100 to 100, but got {bias!r}."
            )
    return {int(key): float(bias) for key, bias in value.items()}


def _read_content(value: Any) -> Any:
    """Join text parts; anything else is left for the type check."""
    if not isinstance(value, list):
        return value
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidInput(
                f'Invalid content part {index}: expected {{"type": "text", "text": string}}; '
                "this server reads text only.",
                param=f"[{index}]",
            )
    return "".join(part["text"] for part in value)


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted; hone never pads its chunks


class SideModeration(RequestModel):
    """What to do about one side's texts."""

    mode: Literal["score", "block"]


class ModerationPolicy(RequestModel):
    """What to do about what goes in and what comes out."""

    input: SideModeration | None = None
    output: SideModeration | None = None


class Moderation(RequestModel):
    """Judge this request's texts; it can only be stricter than its account's policy."""

    model: str
    policy: ModerationPolicy | None = None


class ModeratedFields(RequestModel):
    """What content control reads of a request."""

    user: str | None = None
    safety_identifier: str | None = None
    moderation: Moderation | None = None


class SamplingFields(ModeratedFields):
    """What completions and chat completions have in common, hone's extensions last."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=0)
    stop: Annotated[
        tuple[str, ...], BeforeValidator(_read_stop, json_schema_input_type=str | list[str])
    ] = ()
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[
        dict[int, float], BeforeValidator(_read_logit_bias, json_schema_input_type=dict[str, float])
    ] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool = False
    stream_options: StreamOptions | None = None

    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, le=10, allow_inf_nan=False)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    return_token_ids: bool = False
    adapter: str | None = None
    adapter_id: str | None = None  # the same, as LoRAX calls it
    adapter_scale: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    best_of: int | None = Field(None, ge=0, le=MAX_BEST_OF)
    reward_model: str | None = None  # ranks the candidates of best_of

    @property
    def candidates(self) -> int:
        """Samples of each prompt, of which `n` are told."""
        return max(self.n, self.best_of or 0)

    @model_validator(mode="after")
    def _check_best_of(self) -> SamplingFields:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidInput(
                f"Invalid 'best_of': expected a value >= 'n' ({self.n}), but got {self.best_of} "
                "instead.",
                param="best_of",
            )
        if self.best_of is not None and self.best_of > 1 and self.stream:
            raise InvalidInput(
                "Invalid 'best_of': candidates are compared once all are complete, so it cannot "
                "be used with 'stream'.",
                param="best_of",
            )
        if self.reward_model is not None and self.candidates == self.n:
            raise InvalidInput(
                "Invalid 'reward_model': it ranks candidates, of which there are not more than "
                f"'n' ({self.n}). Set 'best_of' to more.",
                param="reward_model",
            )
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> SamplingFields:
        if self.adapter and self.adapter_id and self.adapter != self.adapter_id:
            raise InvalidInput(
                f"Invalid 'adapter_id': it is another name for 'adapter', which is "
                f"'{self.adapter}', but got '{self.adapter_id}' instead.",
                param="adapter_id",
            )
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )
        return self


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Any = None  # read by serve.api.prompts: text, texts, token ids, lists of them, or null
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True
    store: bool = False

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.store and (self.stream or self.echo or self.suffix):
            raise InvalidInput(
                "Invalid 'store': a completion that is streamed, echoes its prompt or has a suffix "
                "is not stored.",
                param="store",
            )
        if self.suffix and self.echo:
            raise InvalidInput(
                "Invalid 'echo': a completion between 'prompt' and 'suffix' cannot be echoed.",
                param="echo",
            )
        return self


class ChatMessage(RequestModel):
    """One turn of a conversation; text parts arrive joined."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {"tool_calls", "function_call", "audio", "annotations"}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(_read_content, json_schema_input_type=str | list[dict[str, str]])
    ]
    name: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_answer(cls, values: Any) -> Any:
        """Take an answer of ours back as it was given, or one that had no text."""
        if not isinstance(values, dict) or values.get("role") != "assistant":
            return values
        kept = {name: value for name, value in values.items() if (name, value) != EMPTY_NOTES}
        if "content" in kept and kept["content"] is None:
            kept["content"] = ""
        return kept


class JsonSchema(RequestModel):
    """A schema that the answer conforms to; `strict` or not, it is enforced."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False

    @property
    def text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema_)


class ResponseFormat(RequestModel):
    """Plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidInput(
                "Invalid 'json_schema': it is required with the type 'json_schema', and only "
                f"there; the type is '{self.type}'.",
                param="json_schema",
            )
        if self.json_schema is not None:
            try:
                compile_schema(self.json_schema.text)
            except InvalidInput as error:
                error.param = "json_schema.schema"
                raise
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema of the answer, as JSON; None for plain text."""
        if self.type == "text":
            return None
        return ANY_OBJECT if self.json_schema is None else self.json_schema.text


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "function_call",
            "functions",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_options",
            "prompt_cache_retention",
            "reasoning_effort",
            "tool_choice",
            "tools",
            "verbosity",
            "web_search_options",
        }
    )

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = False  # the template has what a conversation begins with
    store: bool = False
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.metadata is not None:
            check_metadata(self.metadata)
            if not self.store:
                raise InvalidInput(
                    "The 'metadata' parameter is only allowed when 'store' is enabled.",
                    param="metadata",
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput(
                "Invalid 'top_logprobs': it is only allowed when 'logprobs' is true.",
                param="top_logprobs",
            )
        return self

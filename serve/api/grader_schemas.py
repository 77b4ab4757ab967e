"""What a grader may say; names and shapes are OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from data.errors import InvalidInput
from data.formula import Formula
from data.grader_text import check_places
from data.similarity import METRICS
from serve.api.errors import describe
from serve.api.schemas import RequestModel

MAX_GRADERS = 20
TEXT_PARTS = ("text", "input_text", "output_text")


def _checked_text(text: Any) -> Any:
    if isinstance(text, str):
        check_places(text)
    return text


def _joined(value: Any) -> Any:
    """Join the text of content parts; anything else is left for the type check."""
    parts = [value] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return value
    texts = []
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise InvalidInput(
                "Invalid content part: expected text; this server reads nothing else.",
                param=f"[{index}]",
            )
        texts.append(text)
    return "".join(texts)


Template = Annotated[str, BeforeValidator(_checked_text)]


class StringCheck(RequestModel):
    """Compares two texts; `like` asks whether the input holds the reference."""

    type: Literal["string_check"]
    name: str
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(RequestModel):
    """Measures how alike two texts are."""

    type: Literal["text_similarity"]
    name: str
    input: Template
    reference: Template
    evaluation_metric: str

    @field_validator("evaluation_metric")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in METRICS:
            supported = ", ".join(map(repr, METRICS))
            raise InvalidInput(f"Invalid value: '{value}'. Supported values are: {supported}.")
        return value


class GraderMessage(RequestModel):
    """A message to the model that grades."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Template, BeforeValidator(_joined)]


class GraderSampling(RequestModel):
    """How the model that grades is sampled; by default it says what is likeliest."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"reasoning_effort"})

    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    max_completions_tokens: int = Field(64, ge=1)
    seed: int | None = None


class ScoreModel(RequestModel):
    """Asks a model for a number; a reward model needs no `input`, as it reads prompt and answer."""

    type: Literal["score_model"]
    name: str
    model: str
    input: list[GraderMessage] = Field(default_factory=list, min_length=1)
    range: list[float] = Field(default=[0.0, 1.0], min_length=2, max_length=2)
    sampling_params: GraderSampling = Field(default_factory=GraderSampling)

    @field_validator("range")
    @classmethod
    def _rises(cls, value: list[float]) -> list[float]:
        if not value[0] < value[1]:
            raise InvalidInput(f"Invalid range: expected two rising numbers, but got {value}.")
        return value


Single = StringCheck | TextSimilarity | ScoreModel
SINGLE: dict[str, type[Single]] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "score_model": ScoreModel,
}


def _read_single(value: Any) -> Any:
    return _read(value, dict(SINGLE))


class Multi(RequestModel):
    """Several graders and a formula over their scores."""

    type: Literal["multi"]
    name: str
    graders: dict[str, Annotated[Any, BeforeValidator(_read_single)]] = Field(
        min_length=1, max_length=MAX_GRADERS
    )
    calculate_output: str

    @model_validator(mode="after")
    def _has_formula(self) -> Self:
        try:
            self.formula()
        except InvalidInput as error:
            raise InvalidInput(error.message, param="calculate_output") from error
        return self

    def formula(self) -> Formula:
        """Return the formula over the names of `graders`."""
        return Formula(self.calculate_output, list(self.graders))


def _read_any(value: Any) -> Any:
    return _read(value, {**SINGLE, "multi": Multi})


Grader = Annotated[Any, BeforeValidator(_read_any)]


class ValidateRequest(RequestModel):
    """`POST /v1/fine_tuning/alpha/graders/validate`."""

    grader: Grader


class RunRequest(RequestModel):
    """`POST /v1/fine_tuning/alpha/graders/run`."""

    grader: Grader
    model_sample: str
    item: dict[str, Any] = Field(default_factory=dict)


def _read(value: Any, known: dict[str, type[Any]]) -> Any:
    if not isinstance(value, dict):
        raise InvalidInput("Invalid type: expected an object.", code="invalid_type")
    kind = value.get("type")
    if kind == "python":
        raise InvalidInput(
            "Unsupported value: 'python' graders run code, which this server does not. Supported "
            f"values are: {', '.join(map(repr, known))}.",
            param="type",
            code="unsupported_parameter",
        )
    if not isinstance(kind, str) or kind not in known:
        raise InvalidInput(
            f"Invalid value: {kind!r}. Supported values are: {', '.join(map(repr, known))}.",
            param="type",
        )
    try:
        return known[kind].model_validate(value)
    except ValidationError as error:
        raise describe([dict(problem) for problem in error.errors()]) from error

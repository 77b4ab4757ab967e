"""`/v1/organization/usage/completions` and `/v1/organization/costs`: the ledger, for operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data import usage
from data.errors import InvalidInput
from serve.api.deps import Operator, Running, json_response
from serve.api.description import query_of
from serve.api.errors import describe
from serve.runtime import Runtime

LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}  # default and most buckets

router = APIRouter(prefix="/v1/organization")


class _RangeQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    start_time: int = Field(ge=0, lt=1 << 40)
    end_time: int | None = Field(None, ge=0, lt=1 << 40)
    page: str | None = None
    project_ids: list[str] | None = None
    user_ids: list[str] | None = None
    api_key_ids: list[str] | None = None

    def filters(self) -> dict[str, Sequence[Any]]:
        """Return the values to keep of each column that is filtered."""
        asked = {
            "project_id": self.project_ids,
            "user_id": self.user_ids,
            "api_key_id": self.api_key_ids,
        }
        return {name: values for name, values in asked.items() if values is not None}


class CompletionsQuery(_RangeQuery):
    """`GET /organization/usage/completions`."""

    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    limit: int | None = Field(None, ge=1)
    group_by: list[
        Literal[
            "project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "api_source"
        ]
    ] = Field(default_factory=list)
    models: list[str] | None = None
    batch: bool | None = None


class InputsQuery(_RangeQuery):
    """`GET /organization/usage/embeddings` and `/moderations`."""

    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    limit: int | None = Field(None, ge=1)
    group_by: list[Literal["project_id", "user_id", "api_key_id", "model"]] = Field(
        default_factory=list
    )
    models: list[str] | None = None


class CostsQuery(_RangeQuery):
    """`GET /organization/costs`."""

    bucket_width: Literal["1d"] = "1d"
    limit: int = Field(7, ge=1, le=180)
    group_by: list[Literal["project_id", "user_id", "line_item", "api_key_id", "api_source"]] = (
        Field(default_factory=list)
    )
    line_items: list[str] | None = None


@router.get("/usage/completions", openapi_extra=query_of(CompletionsQuery))
async def completions_usage(request: Request, runtime: Running, _operator: Operator) -> Response:
    """Sum what completions and chats used, in buckets of time."""
    query = read_query(request, CompletionsQuery)
    wanted, filters = _range(query)
    if query.batch is not None:
        filters["batch"] = [query.batch]
    await run_in_threadpool(runtime.meter.flush)
    found = await run_in_threadpool(
        usage.completions, runtime.database, wanted, query.group_by, filters
    )
    return json_response(found)


@router.get("/usage/embeddings", openapi_extra=query_of(InputsQuery))
async def embeddings_usage(request: Request, runtime: Running, _operator: Operator) -> Response:
    """Sum what was embedded, in buckets of time."""
    return await _inputs(request, runtime, "embeddings")


@router.get("/usage/moderations", openapi_extra=query_of(InputsQuery))
async def moderations_usage(request: Request, runtime: Running, _operator: Operator) -> Response:
    """Sum what was judged, in buckets of time."""
    return await _inputs(request, runtime, "moderations")


async def _inputs(request: Request, runtime: Runtime, kind: str) -> Response:
    query = read_query(request, InputsQuery)
    wanted, filters = _range(query)
    await run_in_threadpool(runtime.meter.flush)
    found = await run_in_threadpool(
        usage.inputs, runtime.database, kind, wanted, query.group_by, filters
    )
    return json_response(found)


def _range(
    query: CompletionsQuery | InputsQuery,
) -> tuple[usage.Range, dict[str, Sequence[Any]]]:
    """Return the buckets and the filters that a query asks for.

    Raises:
        InvalidInput: More buckets than a page may have.
    """
    default, most = LIMITS[query.bucket_width]
    if query.limit is not None and query.limit > most:
        raise InvalidInput(
            f"Invalid 'limit': integer above maximum value. Expected a value <= {most} for "
            f"'bucket_width' {query.bucket_width}, but got {query.limit} instead.",
            param="limit",
        )
    wanted = usage.Range(
        query.start_time, query.end_time, query.bucket_width, query.limit or default, query.page
    )
    filters = query.filters()
    if query.models is not None:
        filters["model"] = query.models
    return wanted, filters


@router.get("/costs", openapi_extra=query_of(CostsQuery))
async def costs(request: Request, runtime: Running, _operator: Operator) -> Response:
    """Sum what everything cost, in buckets of a day."""
    query = read_query(request, CostsQuery)
    wanted = usage.Range(
        query.start_time, query.end_time, query.bucket_width, query.limit, query.page
    )
    await run_in_threadpool(runtime.meter.flush)
    found = await run_in_threadpool(
        usage.costs,
        runtime.database,
        wanted,
        query.group_by,
        query.filters(),
        query.line_items,
    )
    return json_response(found)


ModelT = TypeVar("ModelT", bound=BaseModel)


def read_query(request: Request, model: type[ModelT]) -> ModelT:
    """Read a query whose lists come as `name[]=a&name[]=b` or `name=a&name=b`.

    Raises:
        InvalidInput: A name is unknown, given twice though it is no list, or of a wrong type.
    """
    values: dict[str, Any] = {}
    for given, value in request.query_params.multi_items():
        name = given.removesuffix("[]")
        field = model.model_fields.get(name)
        if field is not None and _is_list(field.annotation):
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidInput(f"Invalid '{name}': it is given twice.", param=name)
        else:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems: list[Mapping[str, Any]] = [dict(problem) for problem in error.errors()]
        raise describe(problems) from None


def _is_list(annotation: Any) -> bool:
    return any(str(part).startswith("list[") for part in (annotation, *get_args(annotation)))

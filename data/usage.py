"""What was used and what it cost, summed from the ledger into buckets of time.

Buckets lie on whole minutes, hours or days of UTC; the first and the last are cut to the range that
was asked for, so that a range's buckets add up to exactly its rows. Empty buckets are listed too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, literal_column, select

from data.db import Database
from data.errors import InvalidInput
from data.tables import now
from data.tables_metering import UsageRecord

WIDTHS_S = {"1m": 60, "1h": 3600, "1d": 86400}
NANO = 1_000_000_000
PAGE = re.compile(r"page_([0-9]{1,12})")
COLUMNS: dict[str, Any] = {
    "project_id": UsageRecord.project_id,
    "user_id": UsageRecord.end_user,
    "api_key_id": UsageRecord.key_id,
    "model": UsageRecord.model,
    "batch": UsageRecord.batch,
}
# Grouping by what is the same for every request here.
CONSTANTS = {"service_tier": "default", "api_source": "unlabeled"}
COMPLETION_GROUPS = (*COLUMNS, *CONSTANTS)
INPUT_GROUPS = ("project_id", "user_id", "api_key_id", "model")
COST_GROUPS = ("project_id", "user_id", "line_item", "api_key_id", "api_source")


@dataclass(frozen=True, slots=True)
class Range:
    """Which buckets to return.

    Attributes:
        start: Unix seconds, inclusive.
        end: Unix seconds, exclusive; None is now.
        width: A key of `WIDTHS_S`.
        limit: The most buckets of one page.
        page: The `next_page` of the answer before.
    """

    start: int
    end: int | None
    width: str
    limit: int
    page: str | None = None

    def buckets(self) -> tuple[list[tuple[int, int]], str | None]:
        """Return start and end of each bucket, and the cursor of the next page if there is one.

        Raises:
            InvalidInput: The range is empty, or the cursor is not one of its own.
        """
        end = now() + 1 if self.end is None else self.end
        if self.end is not None and end <= self.start:
            raise InvalidInput(
                f"Invalid 'end_time': {end} is not after 'start_time' ({self.start}).",
                param="end_time",
            )
        first = self.start
        if self.page is not None:
            match = PAGE.fullmatch(self.page)
            if match is None or not self.start < int(match[1]) < max(end, self.start + 1):
                raise InvalidInput(
                    f"Invalid 'page': '{self.page}'. Give the 'next_page' of the answer before, "
                    "with the same range.",
                    param="page",
                )
            first = int(match[1])
        width = WIDTHS_S[self.width]
        found: list[tuple[int, int]] = []
        while first < end and len(found) < self.limit:
            after = min(first - first % width + width, end)
            found.append((first, after))
            first = after
        return found, f"page_{first}" if first < end else None


def completions(
    database: Database,
    wanted: Range,
    group_by: Sequence[str] = (),
    filters: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Return a page of buckets as `GET /organization/usage/completions` answers.

    Args:
        group_by: Of `COMPLETION_GROUPS`.
        filters: Of `COLUMNS`: the values to keep.
    """
    names = [name for name in group_by if name in COLUMNS]
    conditions = [UsageRecord.kind == "completions", *_conditions(filters or {})]
    sums = [
        func.sum(UsageRecord.prompt_tokens),
        func.sum(UsageRecord.cached_tokens),
        func.sum(UsageRecord.completion_tokens),
        func.sum(UsageRecord.requests),
    ]
    buckets, next_page = wanted.buckets()
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for start, keys, (prompt, cached, completion, requests) in _rows(
        database, buckets, WIDTHS_S[wanted.width], names, conditions, sums
    ):
        grouped = dict.fromkeys(COMPLETION_GROUPS) | keys
        grouped |= {name: CONSTANTS[name] for name in group_by if name in CONSTANTS}
        found[start].append(
            {
                "object": "organization.usage.completions.result",
                "input_tokens": prompt,
                "input_cached_tokens": cached,
                "input_uncached_tokens": prompt - cached,
                "output_tokens": completion,
                "input_audio_tokens": 0,
                "output_audio_tokens": 0,
                "num_model_requests": requests,
                **grouped,
            }
        )
    return _page(buckets, found, next_page)


def inputs(
    database: Database,
    kind: str,
    wanted: Range,
    group_by: Sequence[str] = (),
    filters: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Return a page of buckets as `GET /organization/usage/embeddings` and `/moderations` answer.

    Args:
        kind: embeddings or moderations.
        group_by: Of `INPUT_GROUPS`.
        filters: Of `COLUMNS`: the values to keep.
    """
    conditions = [UsageRecord.kind == kind, *_conditions(filters or {})]
    sums = [func.sum(UsageRecord.prompt_tokens), func.sum(UsageRecord.requests)]
    buckets, next_page = wanted.buckets()
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for start, keys, (tokens, requests) in _rows(
        database, buckets, WIDTHS_S[wanted.width], group_by, conditions, sums
    ):
        found[start].append(
            {
                "object": f"organization.usage.{kind}.result",
                "input_tokens": tokens,
                "num_model_requests": requests,
                **dict.fromkeys(INPUT_GROUPS),
                **keys,
            }
        )
    return _page(buckets, found, next_page)


def costs(
    database: Database,
    wanted: Range,
    group_by: Sequence[str] = (),
    filters: Mapping[str, Sequence[Any]] | None = None,
    line_items: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return a page of buckets as `GET /organization/costs` answers.

    Args:
        group_by: Of `COST_GROUPS`.
        filters: Of `COLUMNS`: the values to keep.
        line_items: As `MODEL, input_tokens`: those to keep.
    """
    names = ["project_id", "user_id", "api_key_id", "model"]
    sums = [
        func.sum(UsageRecord.prompt_tokens),
        func.sum(UsageRecord.cached_tokens),
        func.sum(UsageRecord.completion_tokens),
        func.sum(UsageRecord.prompt_cost),
        func.sum(UsageRecord.cached_cost),
        func.sum(UsageRecord.completion_cost),
    ]
    buckets, next_page = wanted.buckets()
    totals: dict[int, dict[tuple[Any, ...], list[int]]] = defaultdict(dict)
    for training in (False, True):
        kind = UsageRecord.kind == "training" if training else UsageRecord.kind != "training"
        conditions = [kind, *_conditions(filters or {})]
        for start, keys, row in _rows(
            database, buckets, WIDTHS_S[wanted.width], names, conditions, sums
        ):
            for item, quantity, cost in _line_items(keys["model"], training, row):
                if line_items is not None and item not in line_items:
                    continue
                fields = {**keys, "line_item": item, "api_source": "unlabeled"}
                group = tuple(fields[name] for name in group_by)
                total = totals[start].setdefault(group, [0, 0])
                total[0] += quantity
                total[1] += cost
    found = {
        start: [
            _cost(dict(zip(group_by, group, strict=True)), quantity, cost)
            for group, (quantity, cost) in sorted(groups.items(), key=lambda item: str(item[0]))
        ]
        for start, groups in totals.items()
    }
    return _page(buckets, found, next_page)


def _line_items(model: str, training: bool, row: Sequence[int]) -> list[tuple[str, int, int]]:
    prompt, cached, completion, prompt_cost, cached_cost, completion_cost = row
    if training:
        return [(f"{model}, training_tokens", prompt, prompt_cost)]
    items = [
        (f"{model}, input_tokens", prompt - cached, prompt_cost),
        (f"{model}, cached_input_tokens", cached, cached_cost),
        (f"{model}, output_tokens", completion, completion_cost),
    ]
    return [item for item in items if item[1]]


def _cost(group: dict[str, Any], quantity: int, cost: int) -> dict[str, Any]:
    itemized = "line_item" in group
    return {
        "object": "organization.costs.result",
        "amount": {"value": cost / NANO, "currency": "usd"},
        "quantity": quantity if itemized else None,
        "quantity_unit": "tokens" if itemized else None,
        **dict.fromkeys(COST_GROUPS),
        **group,
    }


def _conditions(filters: Mapping[str, Sequence[Any]]) -> list[ColumnElement[bool]]:
    return [COLUMNS[name].in_(values) for name, values in filters.items()]


def _rows(
    database: Database,
    buckets: Sequence[tuple[int, int]],
    width: int,
    names: Sequence[str],
    conditions: Sequence[ColumnElement[bool]],
    sums: Sequence[Any],
) -> list[tuple[int, dict[str, Any], list[int]]]:
    """Return start of the bucket, group and sums of each group of rows, in a stable order."""
    if not buckets:
        return []
    first, end = buckets[0][0], buckets[-1][1]
    at = UsageRecord.created_at
    # The width is part of the text: PostgreSQL does not see that two parameters are equal.
    bucket = (at - at % literal_column(str(width))).label("bucket")
    keys = [COLUMNS[name] for name in names]
    query = (
        select(bucket, *keys, *sums)
        .where(at >= first, at < end, *conditions)
        .group_by(bucket, *keys)
        .order_by(bucket, *keys)
    )
    with database.read() as session:
        rows = session.execute(query).all()
    return [
        (
            max(int(row[0]), first),
            dict(zip(names, row[1 : 1 + len(names)], strict=True)),
            [int(value) for value in row[1 + len(names) :]],
        )
        for row in rows
    ]


def _page(
    buckets: Sequence[tuple[int, int]],
    found: Mapping[int, list[dict[str, Any]]],
    next_page: str | None,
) -> dict[str, Any]:
    data = [
        {"object": "bucket", "start_time": start, "end_time": end, "results": found.get(start, [])}
        for start, end in buckets
    ]
    return {
        "object": "page",
        "data": data,
        "has_more": next_page is not None,
        "next_page": next_page,
    }

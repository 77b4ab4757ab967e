"""Token buckets: how much of something may be used per time, in the memory of one server.

A bucket holds at most what one period allows and fills evenly. What is taken in advance and not
used is put back; what was used beyond it becomes a debt that later requests wait for. A changed
limit counts from the next request on, and what was used stays used.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from data.errors import RateLimited

EPSILON = 1e-6  # of rounding, in requests or tokens
MINUTE_S = 60.0
DAY_S = 86400.0

Kind = Literal["requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit: `amount` requests or tokens of one account and model in `period_s` seconds."""

    account: str
    model: str
    kind: Kind
    amount: int
    period_s: float

    @property
    def words(self) -> str:
        """Return what is counted, for messages."""
        return f"{self.kind} per {'day' if self.period_s == DAY_S else 'minute'}"


@dataclass(slots=True)
class _Bucket:
    amount: int
    period_s: float
    level: float
    filled_at: float

    def fill(self, rate: Rate, moment: float) -> None:
        grown = (moment - self.filled_at) * self.amount / self.period_s
        self.level = min(float(self.amount), self.level + grown)
        self.level += rate.amount - self.amount  # a new limit: what was used stays used
        self.amount, self.filled_at = rate.amount, moment


class Reservation:
    """What a request took in advance."""

    def __init__(self, limiter: Limiter, taken: Sequence[tuple[Rate, int]]):
        self._limiter = limiter
        self._taken = taken

    def settle(self, used_tokens: int) -> None:
        """Put back the tokens that were not used; a request once made stays counted."""
        self._limiter.give([(rate, n - used_tokens) for rate, n in self._taken])
        self._taken = ()


class Limiter:
    """All buckets of a server. Safe to use from many threads.

    Args:
        clock: Returns seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str, Kind, float], _Bucket] = {}

    def take(self, rates: Sequence[Rate], prompt_tokens: int, tokens: int) -> Reservation:
        """Take one request and its tokens from every bucket, or nothing from any.

        Args:
            prompt_tokens: Used for certain; a limit below this can never let the request through.
            tokens: Used at most; where a limit is below this, the whole limit is taken.

        Raises:
            RateLimited: A bucket has too little left.
        """
        with self._lock:
            taken = []
            refused: list[tuple[float, Rate, int]] = []
            for rate in rates:
                bucket = self._filled(rate)
                wanted = 1 if rate.kind == "requests" else max(1, min(tokens, rate.amount))
                needed = 1 if rate.kind == "requests" else max(1, prompt_tokens)
                short = wanted - bucket.level
                if needed > rate.amount:
                    refused.append((math.inf, rate, needed))
                elif short > EPSILON:
                    refused.append((short * rate.period_s / rate.amount, rate, wanted))
                taken.append((rate, bucket, wanted))
            if refused:
                wait_s, rate, wanted = max(refused, key=lambda entry: entry[0])
                raise _refusal(rate, self._filled(rate), wanted, wait_s)
            for _, bucket, wanted in taken:
                bucket.level -= wanted
        return Reservation(self, [(r, n) for r, _, n in taken if r.kind == "tokens"])

    def extend(self, rates: Sequence[Rate]) -> Reservation:
        """Take nothing yet; what is used becomes a debt when the reservation is settled."""
        counted = [rate for rate in rates if rate.kind == "tokens"]
        with self._lock:
            for rate in counted:
                self._filled(rate)
        return Reservation(self, [(rate, 0) for rate in counted])

    def give(self, amounts: Sequence[tuple[Rate, int]]) -> None:
        """Put tokens back; a negative amount takes more, even below nothing."""
        with self._lock:
            for rate, amount in amounts:
                # Not filled with this rate: the limit may have changed since it was taken.
                bucket = self._buckets[rate.account, rate.model, rate.kind, rate.period_s]
                bucket.level = min(float(bucket.amount), bucket.level + amount)

    def headers(self, rates: Sequence[Rate]) -> dict[str, str]:
        """Return the x-ratelimit headers: of each kind, the bucket with the least left."""
        found: dict[str, str] = {}
        with self._lock:
            for kind in ("requests", "tokens"):
                standing = [(self._filled(rate), rate) for rate in rates if rate.kind == kind]
                if not standing:
                    continue
                bucket, rate = min(standing, key=lambda entry: entry[0].level)
                missing = max(0.0, rate.amount - bucket.level)
                reset_s = missing * rate.period_s / rate.amount if rate.amount else rate.period_s
                found[f"x-ratelimit-limit-{kind}"] = str(rate.amount)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level + EPSILON)))
                found[f"x-ratelimit-reset-{kind}"] = duration(reset_s)
        return found

    def _filled(self, rate: Rate) -> _Bucket:
        key = (rate.account, rate.model, rate.kind, rate.period_s)
        moment = self._clock()
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = _Bucket(rate.amount, rate.period_s, float(rate.amount), moment)
            self._buckets[key] = bucket
        bucket.fill(rate, moment)
        return bucket


def duration(seconds: float) -> str:
    """Write a duration as clients read it: 120ms, 1s, 6m0s, 1h0m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000 - EPSILON)}ms"
    whole = math.ceil(seconds - EPSILON)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _refusal(rate: Rate, bucket: _Bucket, wanted: int, wait_s: float) -> RateLimited:
    if math.isinf(wait_s):
        return RateLimited(
            f"Request too large for the model `{rate.model}`: the limit is {rate.amount} "
            f"{rate.words}, the request needs {wanted}. Send less, or ask the server's operator "
            "for a higher limit.",
            kind=rate.kind,
        )
    return RateLimited(
        f"Rate limit reached for the model `{rate.model}`: the limit is {rate.amount} "
        f"{rate.words}, {max(0, int(bucket.level + EPSILON))} are left, the request needs "
        f"{wanted}. Please try again in {duration(wait_s)}.",
        kind=rate.kind,
        retry_after_s=max(1, math.ceil(wait_s)),
    )

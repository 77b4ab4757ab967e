"""How often strangers may ask for access or sign in: counted by address and in all, in memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque

from data.errors import RateLimited

WINDOW_S = 3600.0
PER_ADDRESS = 5
IN_ALL = 200
MAX_ADDRESSES = 10_000


class Throttle:
    """Counts requests of the last hour, by address and in all."""

    def __init__(
        self,
        per_address: int = PER_ADDRESS,
        in_all: int = IN_ALL,
        what: str = "requests for access",
    ):
        self._what = what
        self._limits = (per_address, in_all)
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()

    def admit(self, address: str, moment: float | None = None) -> None:
        """Count a request; raises RateLimited when there were too many."""
        moment = time.monotonic() if moment is None else moment
        mine = self._seen.pop(address, deque())
        self._seen[address] = mine
        while len(self._seen) > MAX_ADDRESSES:
            self._seen.popitem(last=False)
        for times, limit in zip((mine, self._all), self._limits, strict=True):
            while times and times[0] <= moment - WINDOW_S:
                times.popleft()
            if len(times) >= limit:
                wait = max(1, math.ceil(times[0] + WINDOW_S - moment))
                raise RateLimited(
                    f"There were {limit} {self._what} within an hour; try again in {wait} seconds.",
                    kind="requests",
                    retry_after_s=wait,
                )
        mine.append(moment)
        self._all.append(moment)

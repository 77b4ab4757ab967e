"""95 % intervals: of a share, and of anything by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); (0, 1) where nothing was counted."""
    if not count:
        return 0.0, 1.0
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(
    count: int, measure: Callable[[np.ndarray], float | None], resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Return the 2.5 and 97.5 % quantiles of a measure over resampled units (Efron 1979).

    Args:
        count: Units.
        measure: Takes how often each unit was drawn, [count]; None where it is undefined.

    Returns:
        None where more than half of the resamples are undefined.
    """
    draw = np.random.default_rng(0)
    shares = np.full(count, 1 / count)
    found = [measure(draw.multinomial(count, shares)) for _ in range(resamples)]
    known = [value for value in found if value is not None]
    if len(known) < resamples / 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)

"""95 % intervals: of a share, and of anything by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
AT_ONCE = 1_000_000  # numbers drawn


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
    count: int,
    measure: Callable[[np.ndarray], np.ndarray],
    kinds: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Return the 2.5 and 97.5 % quantiles of a measure over resampled units (Efron 1979).

    Args:
        count: Units.
        measure: Takes how often each kind of unit was drawn, [R, kinds], and returns R values; NaN
            where it is undefined.
        kinds: How many units there are of each kind, which makes few numbers of many units alike;
            by default each is a kind of its own.

    Returns:
        None where more than half of the resamples are undefined.
    """
    draw = np.random.default_rng(0)
    shares = np.full(count, 1 / count) if kinds is None else np.asarray(kinds) / count
    step = max(1, AT_ONCE // len(shares))
    sizes = [min(step, resamples - at) for at in range(0, resamples, step)]
    found = np.concatenate([measure(draw.multinomial(count, shares, size)) for size in sizes])
    known = found[~np.isnan(found)]
    if len(known) < resamples / 2:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)

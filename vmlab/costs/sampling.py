"""Sampled costs: what the range of each figure does to a sum or a ratio.

Each figure is a two-piece lognormal: median = ``value``, 5th percentile = ``low``, 95th = ``high``. Costs are
positive and wrong by factors, hence lognormal; published ranges are lopsided, hence one width for each side.
The 1000 samples of a figure are the 1000 equal-probability quantiles in a random order (Latin hypercube):
each figure's own spread is exact, and only the pairing with other figures is left to chance. The order depends
on a constant seed and the figure's owner and key, so results are the same everywhere and adding a figure does
not disturb the others. Path lengths have one order for all profiles: they are the same VMM.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

from vmlab.costs.figures import Figure

SAMPLES = 1000
SEED = 1974  # Popek and Goldberg; any constant serves
#: 95th percentile of the standard normal distribution.
_Z95 = 1.6448536269514722


@lru_cache(maxsize=1)
def _quantiles() -> tuple[float, ...]:
    from statistics import NormalDist  # imported here: it is slow to import

    return tuple(NormalDist().inv_cdf((i + 0.5) / SAMPLES) / _Z95 for i in range(SAMPLES))


@lru_cache(maxsize=4096)
def _order(owner: str, key: str) -> tuple[int, ...]:
    # random() is the one method whose sequence Python promises to keep between versions.
    rng = random.Random(f"{SEED}/{owner}/{key}")
    draws = [rng.random() for _ in range(SAMPLES)]
    return tuple(sorted(range(SAMPLES), key=draws.__getitem__))


@lru_cache(maxsize=4096)
def _values(value: float, low: float, high: float) -> tuple[float, ...]:
    below, above = math.log(value / low), math.log(high / value)
    return tuple(value * math.exp(z * (below if z < 0 else above)) for z in _quantiles())


def samples(figure: Figure, owner: str) -> list[float]:
    """The figure's samples; ``owner`` is the profile's name, or ``""`` for what all profiles share."""
    if figure.low == figure.high:
        return [figure.value] * SAMPLES
    values = _values(figure.value, figure.low, figure.high)
    return [values[i] for i in _order(owner, figure.key)]


def percentiles(totals: list[float]) -> tuple[float, float]:
    """5th and 95th percentile (nearest rank)."""
    ordered = sorted(totals)
    return ordered[int(0.05 * len(ordered))], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]

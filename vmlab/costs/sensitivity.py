"""How certain is a comparison, and which one cost decides it?

A comparison is a *margin*, a :class:`Quantity` that is 0 or more where the comparison holds. Several margins together
hold when at least ``enough`` of them do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vmlab.costs.figures import Figure
from vmlab.costs.profile import Profile
from vmlab.costs.quantity import Quantity
from vmlab.costs.sampling import SAMPLES

#: A figure without a range is compared as if it had this one, so that it can be ranked at all.
_NARROW = 1.02


@dataclass(frozen=True)
class Decider:
    """The cost whose change flips a verdict first.

    ``flips_at`` is the value at which it does, all other costs at their nominal values; exact, since a margin is linear in
    any one cost. ``reach`` is how far that is, in units of the figure's own range on that side: at 1 it is the figure's
    5th or 95th percentile, so up to 1 the published range itself leaves the verdict open.
    """

    figure: Figure
    flips_at: float
    reach: float

    def as_dict(self) -> dict[str, object]:
        """As results.json holds it."""
        f = self.figure
        return {
            "cost": f.key, "value": f.value, "low": f.low, "high": f.high, "provenance": f.provenance,
            "flips_at": self.flips_at, "within_range": f.low <= self.flips_at <= f.high,
        }


def holds(margins: Sequence[Quantity], profile: Profile, enough: int | None = None) -> bool:
    """Whether at least ``enough`` of the margins (all, when not given) are 0 or more at nominal costs."""
    wanted = len(margins) if enough is None else enough
    return sum(margin.value(profile) >= 0 for margin in margins) >= wanted


def agreement(margins: Sequence[Quantity], profile: Profile, enough: int | None = None) -> float:
    """The share of the cost samples whose verdict is the nominal one."""
    wanted = len(margins) if enough is None else enough
    nominal = holds(margins, profile, enough)
    held = [0] * SAMPLES
    for margin in margins:
        held = [n + (value >= 0) for n, value in zip(held, margin.samples(profile), strict=True)]
    return sum((n >= wanted) == nominal for n in held) / SAMPLES


def decider(margins: Sequence[Quantity], profile: Profile, enough: int | None = None) -> Decider | None:
    """The cost that, changed alone, flips the verdict with the least stretch of its own range; None where none can."""
    nominal = holds(margins, profile, enough)
    keys = {key: figure for margin in margins for key, figure in margin.figures(profile).items()}
    best: Decider | None = None
    for key, figure in sorted(keys.items()):
        for value in _crossings(margins, profile, key):
            reach = _reach(figure, value)
            if (best is None or reach < best.reach) and _flips(margins, profile, enough, key, value, figure, nominal):
                best = Decider(figure, value, reach)
    return best


def _crossings(margins: Sequence[Quantity], profile: Profile, key: str) -> list[float]:
    """The positive values of one cost at which a margin is zero."""
    at_one, at_two = (profile.with_values({key: value}) for value in (1.0, 2.0))
    found = []
    for margin in margins:
        begin = margin.value(at_one)
        slope = margin.value(at_two) - begin
        # A slope this small against the totals is rounding: the cost has no part in the margin.
        if abs(slope) > 1e-9 * max(1.0, abs(begin)) and (value := 1.0 - begin / slope) > 0:
            found.append(value)
    return found


def _flips(
    margins: Sequence[Quantity], profile: Profile, enough: int | None, key: str, value: float, figure: Figure, nominal: bool,
) -> bool:
    beyond = value * (1.001 if value >= figure.value else 0.999)
    return holds(margins, profile.with_values({key: beyond}), enough) != nominal


def _reach(figure: Figure, value: float) -> float:
    width = figure.high / figure.value if value > figure.value else figure.value / figure.low
    return abs(math.log(value / figure.value)) / math.log(max(width, _NARROW))

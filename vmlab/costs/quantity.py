"""Cycles as a linear form: so many events, so many single costs, and a constant.

A price, a difference of two prices, "per operation" and "a threshold of 60 cycles" are all of this form. It has
a nominal value, a value under each sample of the costs, and a list of the figures that it depends on; so one
piece of code answers how certain a comparison is and which cost decides it (:mod:`vmlab.costs.sensitivity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vmlab.costs.figures import Figure
from vmlab.costs.model import CostModel
from vmlab.costs.profile import Profile
from vmlab.costs.rules import NOT_PRICED, RULES
from vmlab.costs.sampling import SAMPLES
from vmlab.errors import ConfigError

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Quantity:
    """Weighted events and costs, in cycles.

    :param events: event kind -> weight; negative where the events are taken away. Kinds that are not priced are left out.
    :param costs: cost key of a profile -> weight.
    :param constant: cycles.
    :raises ConfigError: an unknown event kind.
    """

    events: Weights = field(default_factory=dict)
    costs: Weights = field(default_factory=dict)
    constant: float = 0.0

    def __post_init__(self) -> None:
        for kind in self.events:
            if kind not in RULES and kind not in NOT_PRICED:
                raise ConfigError(f"event kind {kind!r} has no price rule; is it in the ledger's table?")
        object.__setattr__(self, "events", {k: n for k, n in self.events.items() if n and k in RULES})
        object.__setattr__(self, "costs", {k: n for k, n in self.costs.items() if n})

    def __add__(self, other: Quantity) -> Quantity:
        return Quantity(_sum(self.events, other.events), _sum(self.costs, other.costs), self.constant + other.constant)

    def __sub__(self, other: Quantity) -> Quantity:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Quantity:
        return Quantity(_times(self.events, factor), _times(self.costs, factor), self.constant * factor)

    def value(self, profile: Profile) -> float:
        """Nominal cycles. :raises NoFigure: the profile has no figure for something in it."""
        model = CostModel.of(profile)
        return (sum(n * model.unit(kind) for kind, n in self.events.items())
                + sum(n * model.cost(key) for key, n in self.costs.items()) + self.constant)

    def samples(self, profile: Profile) -> list[float]:
        """Cycles under each sample of the costs; the same samples for every quantity. Raises as :meth:`value`."""
        model = CostModel.of(profile)
        totals = [self.constant] * SAMPLES
        for vector, n in [
            *((model.vector(kind), n) for kind, n in self.events.items()),
            *((model.cost_vector(key), n) for key, n in self.costs.items()),
        ]:
            totals = [total + n * unit for total, unit in zip(totals, vector, strict=True)]
        return totals

    def figures(self, profile: Profile) -> dict[str, Figure]:
        """Every figure with a part in it, by resolved key. Raises as :meth:`value`."""
        model = CostModel.of(profile)
        found = [figure for kind in self.events for figure in model.all_figures(kind)]
        found += [model.cost_figure(key) for key in self.costs]
        return {figure.key: figure for figure in sorted(found, key=lambda figure: figure.key)}


def _sum(a: Weights, b: Weights) -> dict[str, float]:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in sorted({*a, *b})}


def _times(weights: Mapping[str, Any], factor: float) -> dict[str, float]:
    return {key: n * factor for key, n in weights.items()}

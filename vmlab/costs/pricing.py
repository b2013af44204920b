"""``cycles = price(events, profile)``: the one place where counts meet costs.

The nominal total uses each figure's value; ``low`` and ``high`` are the 5th and 95th percentile over 1000 samples
of all costs. A slowdown divides sample by sample, so that a cost which native and technique share cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vmlab.costs.figures import Figure
from vmlab.costs.model import CostModel, NoFigure
from vmlab.costs.profile import Profile, lacks
from vmlab.costs.rules import CAUSES, NOT_PRICED, RULES
from vmlab.costs.sampling import SAMPLES, percentiles
from vmlab.errors import ConfigError

Override = Mapping[str, float]


@dataclass(frozen=True)
class Price:
    """Cycles: nominal total, 5th and 95th percentile, and the nominal total by cause (sums to it)."""

    total: float
    low: float
    high: float
    breakdown: Mapping[str, float]

    def as_dict(self) -> dict[str, object]:
        """As results.json holds it."""
        return {"total": self.total, "low": self.low, "high": self.high, "breakdown": dict(self.breakdown)}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two prices: nominal value, 5th and 95th percentile."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """As results.json holds it."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Unsupported:
    """No price: this CPU could not have run it, or has no figure for what happened; says which."""

    reason: str

    def as_dict(self) -> dict[str, str]:
        """As results.json holds it."""
        return {"status": "unsupported", "reason": self.reason}


def price(
    events: Mapping[str, int], profile: Profile, platform: str, *, override: Override | None = None,
) -> Price | Unsupported:
    """What these events cost on this CPU, in cycles.

    :param events: counts by event kind (a cell's ``events``, or one phase's).
    :param platform: what the run needs of a CPU, a key of :data:`vmlab.costs.PLATFORMS`.
    :param override: cost key -> value held without a range, to ask what would change a verdict.
    :raises ConfigError: unknown platform or event kind, negative count, or an override of an unknown cost.
    """
    profile = profile.with_values(override) if override else profile
    counts = _priced(events)
    if (refused := _refusal(counts, profile, platform)) is not None:
        return refused
    breakdown = _breakdown(counts, CostModel.of(profile))
    total = sum(breakdown.values())
    low, high = percentiles(_totals(counts, CostModel.of(profile)))
    return Price(total, min(low, total), max(high, total), breakdown)


def nominal(
    events: Mapping[str, int], profile: Profile, platform: str, *, override: Override | None = None,
) -> float | Unsupported:
    """The nominal total alone: quick, for searching. Arguments and errors as for :func:`price`."""
    profile = profile.with_values(override) if override else profile
    counts = _priced(events)
    if (refused := _refusal(counts, profile, platform)) is not None:
        return refused
    return sum(_breakdown(counts, CostModel.of(profile)).values())


def slowdown(
    events: Mapping[str, int], native_events: Mapping[str, int], profile: Profile, platform: str, *,
    native_platform: str = "x86", override: Override | None = None,
) -> Ratio | Unsupported:
    """The price of ``events`` over that of ``native_events``, both under the same samples of the costs.

    Any two runs may be compared, not only with native. Errors as for :func:`price`. The range of a ratio says what
    the costs leave open on *one* CPU; it does not vary the counts, which are exact.
    """
    profile = profile.with_values(override) if override else profile
    counts, base = _priced(events), _priced(native_events)
    for side, side_platform in ((counts, platform), (base, native_platform)):
        if (refused := _refusal(side, profile, side_platform)) is not None:
            return refused
    if not base:
        return Unsupported("the run to compare with has no events that cost anything")
    model = CostModel.of(profile)
    value = sum(_breakdown(counts, model).values()) / sum(_breakdown(base, model).values())
    low, high = percentiles([a / b for a, b in zip(_totals(counts, model), _totals(base, model), strict=True)])
    return Ratio(value, min(low, value), max(high, value))


def unit_cost(kind: str, profile: Profile) -> float | Unsupported:
    """Nominal cycles of one event of ``kind`` (0 for kinds that are not priced).

    :raises ConfigError: no such event kind.
    """
    if not _priced({kind: 1}):
        return 0.0
    try:
        return CostModel.of(profile).unit(kind)
    except NoFigure as lacking:
        return Unsupported(f"{profile.name} has {lacking}")


def costs_used(events: Mapping[str, int], profile: Profile) -> dict[str, Figure]:
    """Every figure with a part in the price of ``events``, by its resolved key (a default where it stepped in).

    For citing, and for finding claims that a figure calibrates (:attr:`Figure.calibrates`).
    Kinds for which the profile has no figure are left out; :func:`price` refuses them.
    """
    model, used = CostModel.of(profile), {}
    for kind in _priced(events):
        try:
            used.update({figure.key: figure for figure in model.all_figures(kind)})
        except NoFigure:
            continue
    return dict(sorted(used.items()))


def breakeven(events: Mapping[str, int], other_events: Mapping[str, int], profile: Profile, key: str) -> float | None:
    """The value of cost ``key`` at which both runs cost the same on this profile; None where there is no such value.

    Exact, since a price is linear in any one cost. Compare with the figure's own range to see how decisive it is.
    Give the key that is used: overriding ``insn.default`` moves every instruction without a figure of its own.

    :raises ConfigError: unknown cost key or event kind.
    """
    counts, others = _priced(events), _priced(other_events)

    def difference(value: float) -> float:
        model = CostModel.of(profile.with_values({key: value}))
        return sum(_breakdown(counts, model).values()) - sum(_breakdown(others, model).values())

    try:
        at_one, at_two = difference(1.0), difference(2.0)
    except NoFigure:
        return None
    slope = at_two - at_one
    # A slope this small against the totals is rounding: the cost has no part in the difference.
    if abs(slope) <= 1e-9 * max(1.0, abs(at_one)):
        return None
    value = 1.0 - at_one / slope
    return value if value > 0 else None


def _priced(events: Mapping[str, int]) -> dict[str, int]:
    counts = {}
    for kind, count in events.items():
        if kind in RULES:
            if count < 0:
                raise ConfigError(f"event {kind!r} has the negative count {count}")
            if count:
                counts[kind] = count
        elif kind not in NOT_PRICED:
            raise ConfigError(f"event kind {kind!r} has no price rule; is it in the ledger's table?")
    return counts


def _refusal(counts: Mapping[str, int], profile: Profile, platform: str) -> Unsupported | None:
    if needs := lacks(profile, platform):
        return Unsupported(f"{profile.name} does not provide {needs}")
    model = CostModel.of(profile)
    for kind in counts:
        try:
            model.unit(kind)
        except NoFigure as lacking:
            return Unsupported(f"{profile.name} has {lacking}")
    return None


def _breakdown(counts: Mapping[str, int], model: CostModel) -> dict[str, float]:
    causes = dict.fromkeys(CAUSES, 0.0)
    calls = sum(count for kind, count in counts.items() if kind.startswith("hypercall."))
    gate = "trap.syscall" if "trap.syscall" in counts else "trap.int"
    for kind, count in counts.items():
        if kind == gate and calls:
            # A hypercall's transition is a software interrupt into the VMM, in 64 bits SYSCALL: show it with the hypercalls.
            through_gate = min(count, calls)
            causes["hypercalls"] += through_gate * model.unit(kind)
            count -= through_gate
        causes[RULES[kind].cause] += count * model.unit(kind)
    return {cause: cycles for cause, cycles in causes.items() if cycles}


def _totals(counts: Mapping[str, int], model: CostModel) -> list[float]:
    totals = [0.0] * SAMPLES
    for kind, count in counts.items():
        totals = [total + count * unit for total, unit in zip(totals, model.vector(kind), strict=True)]
    return totals

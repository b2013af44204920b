"""Predicates that need prices and more than a list of checks: of whole cells, or of single published costs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vmlab.claims.checks import in_scope, judged, per_operation, repetitions
from vmlab.claims.evidence import Cell, Evidence, Finding, Margins, Missing, Verdict, count, describe, steady
from vmlab.costs import Quantity

Arguments = Mapping[str, Any]
#: Share of the cost samples that must agree where a claim says "faster".
CERTAIN = 0.95


def instruction_is_slow(evidence: Evidence, arguments: Arguments) -> Finding:
    """Cited: the named costs together come to at least ``threshold`` cycles on the scope's profiles."""
    by_profile: dict[str, Verdict] = {}
    figures: dict[str, Any] = {"threshold": arguments["threshold"]}
    margins: dict[str, Margins] = {}
    for profile in evidence.profiles:
        costs = [evidence.figure(profile, key) for key in arguments["costs"]]
        value, low, high = (sum(part) for part in zip(*((c.value, c.low, c.high) for c in costs), strict=True))
        # A published figure decides by its value; where one is assumed, the samples must agree.
        certainty = CERTAIN if any(cost.provenance == "assumed" for cost in costs) else 0.0
        margin = Quantity(costs=dict.fromkeys(arguments["costs"], 1.0), constant=-arguments["threshold"])
        margins[profile] = Margins((margin,), certainty=certainty)
        by_profile[profile] = judged(margins[profile], evidence.profile(profile))
        figures[profile] = {"cycles": value, "low": low, "high": high, "provenance": [cost.provenance for cost in costs]}
    said = [f"{figures[name]['cycles']:.0f} cycles on {name}" for name in arguments["scope"]]
    return Finding(in_scope(by_profile, arguments["scope"]), "; ".join(said), by_profile, figures, margins)


def translated_is_faster(evidence: Evidence, arguments: Arguments) -> Finding:
    """The translated operation is cheaper than the native one; sampled costs decide whether that is certain."""
    cell = evidence.densest(arguments["technique"], arguments["workload"], **arguments["with"])
    native, names = evidence.native_of(cell), list(arguments["instructions"])
    # Same work, same samples: the whole run is shorter exactly when its operation is cheaper.
    margin = Margins((Quantity(steady(native)) - Quantity(steady(cell)),), certainty=CERTAIN)
    by_profile: dict[str, Verdict] = {}
    figures: dict[str, Any] = {}
    margins: dict[str, Margins] = {}
    for profile in evidence.profiles:
        try:
            whole = evidence.ratio(cell, native, profile)
            figures[profile] = {
                "native": round(evidence.value(per_operation(evidence, native, names), profile), 2),
                "translated": round(evidence.value(per_operation(evidence, cell, names), profile), 2),
                "slowdown": [whole.low, whole.high],
            }
            margins[profile] = margin
            by_profile[profile] = judged(margin, evidence.profile(profile))
        except Missing as missing:
            by_profile[profile], figures[profile] = "undecided", {"reason": str(missing)}
    stops = [name for name, verdict in by_profile.items() if verdict != "holds"]
    said = "; ".join(
        f"{name}: {figures[name]['translated']:.3g} against {figures[name]['native']:.3g} cycles"
        for name in arguments["scope"] if "native" in figures[name]
    )
    figures["stops"] = stops
    return Finding(in_scope(by_profile, arguments["scope"]), said or "not priced on the profiles it speaks of", by_profile, figures, margins)


def dearer_step_by_step(evidence: Evidence, arguments: Arguments) -> Finding:
    """Each ``step`` handles the same instruction more cheaply than the one before, by at least its ``factor``."""
    steps, names = list(arguments["steps"]), list(arguments["instructions"])
    cells = [evidence.densest(step["technique"], arguments["workload"], **step.get("with", {})) for step in steps]
    natives = [evidence.native_of(cell) for cell in cells]
    if any(native is not natives[0] for native in natives):
        raise Missing(f"the cells on {arguments['workload']} did not do the same work")
    for step, cell in zip(steps, cells, strict=True):
        _mechanism(step, cell, repetitions(natives[0], names))
    by_profile: dict[str, Verdict] = {}
    figures: dict[str, Any] = {"published": dict(arguments["published"])}
    margins: dict[str, Margins] = {}
    each = [per_operation(evidence, cell, names) for cell in cells]
    factors = [float(step["factor"]) for step in steps]
    by_factor = tuple(dear - cheap * factor for (dear, cheap), factor in zip(pairwise(each), factors, strict=False))
    for profile in evidence.profiles:
        try:
            cycles = [evidence.value(quantity, profile) for quantity in each]
            lowest = [evidence.ratio(dear, cheap, profile).low for dear, cheap in pairwise(cells)]
        except Missing as missing:
            by_profile[profile], figures[profile] = "undecided", {"reason": str(missing)}
            continue
        figures[profile] = {step["name"]: round(value, 1) for step, value in zip(steps, cycles, strict=True)}
        margins[profile] = Margins(by_factor)
        by_profile[profile] = judged(margins[profile], evidence.profile(profile))
        # The handlers' lengths are sampled one by one although the published totals pin their sums, so whether the
        # order survives sampling is told and does not decide.
        figures[profile]["survives_sampling"] = min(lowest) > 1
    first = next((name for name in arguments["scope"] if name in figures and "reason" not in figures[name]), None)
    reason = "not priced on the profiles that the claim speaks of"
    if first:
        sure = figures[first]["survives_sampling"]
        reason = f"{first}: " + ", ".join(f"{step['name']} {figures[first][step['name']]:.0f}" for step in steps) + " cycles" + (
            "" if sure else "; with every handler's length varied on its own, not always in this order")
    return Finding(in_scope(by_profile, arguments["scope"]), reason, by_profile, figures, margins)


def _mechanism(step: Mapping[str, Any], cell: Cell, times: int) -> None:
    """Refuse to compare labels: the cell must really have used the mechanism that the step is named after."""
    seen, kinds = count(steady(cell), step["by"]), ", ".join(step["by"])
    if step.get("never"):
        if seen > times / 100:
            raise Missing(f"{describe(cell)} is meant to stay in the cache but shows {seen} of {kinds} for {times} instructions")
    elif seen < times:
        raise Missing(f"{describe(cell)} shows {seen} of {kinds} for {times} instructions")


def round_trip_fell(evidence: Evidence, arguments: Arguments) -> Finding:
    """Cited: exit and entry together became ``at_least`` to ``at_most`` times cheaper between two profiles of one maker."""
    begin, end = (evidence.profile(arguments[name]) for name in ("first", "last"))
    trip = Quantity(costs=dict.fromkeys(arguments["costs"], 1.0))
    cycles: dict[str, float] = {}
    for name in sorted({*evidence.profiles, begin.name, end.name}, key=lambda name: (evidence.profile(name).year, name)):
        profile = evidence.profile(name)
        if profile.vendor == begin.vendor and all(profile.figure(key) for key in arguments["costs"]):
            cycles[name] = trip.value(profile)
    for name in (begin.name, end.name):
        if name not in cycles:
            raise Missing(f"profile {name} has no {' or '.join(arguments['costs'])}")
    factor = cycles[begin.name] / cycles[end.name]
    figures = {
        "cycles": cycles, "factor": round(factor, 2), "years": end.year - begin.year, "published": dict(arguments["published"]),
    }
    # Against the first CPU's nominal round trip, so that the last one's costs are what decides.
    margins = Margins((
        Quantity(constant=cycles[begin.name]) - trip * arguments["at_least"],
        trip * arguments["at_most"] - Quantity(constant=cycles[begin.name]),
    ))
    verdict = judged(margins, end)
    reason = (f"{cycles[begin.name]:.0f} cycles in {begin.year}, {cycles[end.name]:.0f} in {end.year}: "
              f"{factor:.1f} times fewer in {end.year - begin.year} years")
    return Finding(verdict, reason, {end.name: verdict}, figures, {end.name: margins})

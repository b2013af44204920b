"""Predicates that need prices: of whole cells, or single published costs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vmlab.claims.evidence import Cell, Evidence, Finding, Missing, Verdict, count, describe, steady

Arguments = Mapping[str, Any]


def in_scope(by_profile: Mapping[str, Verdict], scope: list[str]) -> Verdict:
    """The overall verdict: what the profiles that the sentence speaks of say together."""
    said = [by_profile.get(name, "undecided") for name in scope]
    if "fails" in said:
        return "fails"
    return "holds" if said and all(verdict == "holds" for verdict in said) else "undecided"


def at_least(low: float, high: float, limit: float) -> Verdict:
    """``holds`` when the whole range reaches the limit, ``fails`` when it is below, else ``undecided``."""
    if low >= limit:
        return "holds"
    return "fails" if high < limit else "undecided"


def instruction_is_slow(evidence: Evidence, arguments: Arguments) -> Finding:
    """Cited: the named costs together come to at least ``threshold`` cycles on the scope's profiles."""
    by_profile: dict[str, Verdict] = {}
    figures: dict[str, Any] = {"threshold": arguments["threshold"]}
    for profile in evidence.profiles:
        costs = [evidence.figure(profile, key) for key in arguments["costs"]]
        value, low, high = (sum(part) for part in zip(*((c.value, c.low, c.high) for c in costs), strict=True))
        # A published figure decides by its value; where one is assumed, the whole range must agree.
        if any(cost.provenance == "assumed" for cost in costs):
            by_profile[profile] = at_least(low, high, arguments["threshold"])
        else:
            by_profile[profile] = at_least(value, value, arguments["threshold"])
        figures[profile] = {"cycles": value, "low": low, "high": high, "provenance": [cost.provenance for cost in costs]}
    said = [f"{figures[name]['cycles']:.0f} cycles on {name} ({verdict})" for name, verdict in by_profile.items()]
    return Finding(in_scope(by_profile, arguments["scope"]), "; ".join(said), by_profile, figures)


def below(low: float, high: float, limit: float) -> Verdict:
    """``holds`` when the whole range is below the limit, ``fails`` when it reaches it, else ``undecided``."""
    if high < limit:
        return "holds"
    return "fails" if low >= limit else "undecided"


def repetitions(native: Cell, instructions: list[str]) -> int:
    """How often the bare machine executed the named instructions, taken together as one operation.

    :raises Missing: not once.
    """
    times = min(count(steady(native), [f"machine.{op}"]) for op in instructions)
    if not times:
        raise Missing(f"{describe(native)} executed no {' and '.join(op.upper() for op in instructions)}")
    return times


def per_operation(evidence: Evidence, cell: Cell, profile: str, instructions: list[str]) -> float:
    """Cycles that one operation (the named instructions once each) costs here, the guest's others subtracted.

    The others cost what they cost natively: the native total less the named instructions at their own price.
    Everything that the technique adds is charged to the operation.
    """
    native = evidence.native_of(cell)
    ran = steady(native)
    own = sum(count(ran, [f"machine.{op}"]) * evidence.figure(profile, f"insn.{op}").value for op in instructions)
    others = evidence.cycles(native, profile) - own
    return (evidence.cycles(cell, profile) - others) / repetitions(native, instructions)


def translated_is_faster(evidence: Evidence, arguments: Arguments) -> Finding:
    """The translated operation is cheaper than the native one; sampled costs decide whether that is certain."""
    cell = evidence.densest(arguments["technique"], arguments["workload"], **arguments["with"])
    native, names = evidence.native_of(cell), list(arguments["instructions"])
    by_profile: dict[str, Verdict] = {}
    figures: dict[str, Any] = {}
    for profile in evidence.profiles:
        try:
            # Same work, same samples: the whole is shorter exactly when the operation is cheaper.
            whole = evidence.ratio(cell, native, profile)
            figures[profile] = {
                "native": round(per_operation(evidence, native, profile, names), 2),
                "translated": round(per_operation(evidence, cell, profile, names), 2),
                "slowdown": [whole.low, whole.high],
            }
            by_profile[profile] = below(whole.low, whole.high, 1.0)
        except Missing as missing:
            by_profile[profile], figures[profile] = "undecided", {"reason": str(missing)}
    stops = [name for name, verdict in by_profile.items() if verdict != "holds"]
    said = "; ".join(
        f"{name}: {figures[name]['translated']:.3g} against {figures[name]['native']:.3g} cycles"
        for name in evidence.profiles if "native" in figures[name]
    )
    where = f"not certain or not so on {', '.join(stops)}" if stops else "so on every profile asked"
    figures["stops"] = stops
    return Finding(in_scope(by_profile, arguments["scope"]), f"{said}; {where}", by_profile, figures)


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
    for profile in evidence.profiles:
        try:
            each = [per_operation(evidence, cell, profile, names) for cell in cells]
            lowest = [evidence.ratio(dear, cheap, profile).low for dear, cheap in pairwise(cells)]
        except Missing as missing:
            by_profile[profile], figures[profile] = "undecided", {"reason": str(missing)}
            continue
        figures[profile] = {step["name"]: round(cycles, 1) for step, cycles in zip(steps, each, strict=True)}
        by_factor = all(dear >= step["factor"] * cheap for (dear, cheap), step in zip(pairwise(each), steps, strict=False))
        by_profile[profile] = "holds" if by_factor else "fails"
        # The handlers' lengths are sampled one by one although the published totals pin their sums, so whether the
        # order survives sampling is told and does not decide.
        figures[profile]["survives_sampling"] = min(lowest) > 1
    first = next((name for name in arguments["scope"] if name in figures and "reason" not in figures[name]), None)
    reason = "not priced on the profiles that the claim speaks of"
    if first:
        sure = figures[first]["survives_sampling"]
        reason = f"{first}: " + ", ".join(f"{step['name']} {figures[first][step['name']]:.0f}" for step in steps) + " cycles" + (
            "" if sure else "; with every handler's length varied on its own, not always in this order")
    return Finding(in_scope(by_profile, arguments["scope"]), reason, by_profile, figures)


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
    cycles: dict[str, float] = {}
    for name in sorted({*evidence.profiles, begin.name, end.name}, key=lambda name: (evidence.profile(name).year, name)):
        figures_of = [evidence.profile(name).figure(key) for key in arguments["costs"]]
        if evidence.profile(name).vendor == begin.vendor and all(figures_of):
            cycles[name] = sum(figure.value for figure in figures_of if figure)
    for name in (begin.name, end.name):
        if name not in cycles:
            raise Missing(f"profile {name} has no {' or '.join(arguments['costs'])}")
    factor = cycles[begin.name] / cycles[end.name]
    figures = {
        "cycles": cycles, "factor": round(factor, 2), "years": end.year - begin.year, "published": dict(arguments["published"]),
    }
    holds = arguments["at_least"] <= factor <= arguments["at_most"]
    reason = (f"{cycles[begin.name]:.0f} cycles in {begin.year}, {cycles[end.name]:.0f} in {end.year}: "
              f"{factor:.1f} times fewer in {end.year - begin.year} years")
    return Finding("holds" if holds else "fails", reason, figures=figures)

"""The general predicate: a list of checks on counts, outcomes and prices, written as data.

    checks:
      - {name: exits, count: {cell: nested, events: [exit.*], per: iteration}, at_most: 0.01}
      - {name: end, outcome: shadow, same_as: native}
      - {name: fork, price: {cell: hardware}, over: {cell: translated}, at_least: 1}

A check is one of three kinds, and bounds one value by ``at_least``, ``at_most`` or both:

``count``    events of a cell (patterns allowed), ``in`` the region (default) or a phase, ``per`` iteration, operation, instruction
             or 1000 instructions; ``over`` another count divides it.
``price``    cycles of a cell's steady state, of some ``events`` of it only, ``less`` another cell's (of the same events), ``per`` run
             (default), iteration or {instructions: […]}; or of ``costs`` alone, or a ``constant``; ``over`` another price divides it.
             Judged on every profile.
``outcome``  the outcome digest of one cell is that of another (``same_as``) or is not (``differs_from``).

With ``skip_missing: true`` a check whose cells are not all there (a guest's image that is not on this host) is left out and named with
the reason, as long as one check is judged.

All count and outcome checks must hold, and on each profile of the claim's ``scope`` ``enough`` (default: all) of the
price checks. ``certainty`` is the share of the cost samples that must agree, else the profile is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from vmlab import costs
from vmlab.claims.evidence import Cell, Evidence, Finding, Margins, Missing, Verdict, describe, phase, steady
from vmlab.costs import Quantity
from vmlab.errors import ConfigError
from vmlab.ledger import EVENTS

Arguments = Mapping[str, Any]
_KEYS = {"name", "count", "price", "outcome", "over", "at_least", "at_most", "same_as", "differs_from"}


def checks(evidence: Evidence, arguments: Arguments) -> Finding:
    """Every check of the claim; see the module's head."""
    rows: Sequence[Mapping[str, Any]] = arguments["checks"]
    for row in rows:
        if unknown := sorted(set(row) - _KEYS):
            raise ConfigError(f"check {row.get('name')!r}: unknown key {unknown[0]!r}")
    rows, skipped = _there(evidence, rows) if arguments.get("skip_missing") else (rows, [])
    figures: dict[str, Any] = {}
    broken, said = [], []
    for row in rows:
        if "price" in row:
            continue
        held, value, words = _outcome(evidence, row) if "outcome" in row else _count(evidence, row)
        figures[row["name"]] = value
        said.append(words)
        if not held:
            broken.append(words)
    priced = [row for row in rows if "price" in row]
    if broken:
        return Finding("fails", "; ".join(broken + skipped), figures=figures)
    if not priced:
        return Finding("holds", "; ".join(said + skipped), figures=figures)
    return _priced(evidence, arguments, priced, figures, said, skipped)


def _there(evidence: Evidence, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The checks whose cells are all there, and which are not judged, with the reason. Raises :class:`Missing` where that is all of them."""
    kept: list[Mapping[str, Any]] = []
    missing: dict[str, list[str]] = {}
    for row in rows:
        references = [row[side] for side in ("count", "price", "over") if side in row]
        names = [reference[key] for reference in references for key in ("cell", "less") if key in reference]
        try:
            for name in (*names, *(row[key] for key in ("outcome", "same_as", "differs_from") if key in row)):
                evidence.cell(name)
        except Missing as reason:
            missing.setdefault(str(reason), []).append(str(row["name"]))
        else:
            kept.append(row)
    if not kept:
        raise Missing("; ".join(missing))
    return kept, [f"not judged: {', '.join(names)}: {reason}" for reason, names in missing.items()]


# --- counts and outcomes -----------------------------------------------------------------------------------


def _count(evidence: Evidence, row: Mapping[str, Any]) -> tuple[bool, float, str]:
    value = counted(evidence, row["count"])
    if "over" in row:
        below = counted(evidence, row["over"])
        if not below:
            raise Missing(f"{row['name']}: {row['over']['cell']} counted none of {', '.join(row['over']['events'])}")
        value /= below
    held = row.get("at_least", value) <= value <= row.get("at_most", value)
    return held, round(value, 6), f"{row['name']}: {value:.4g}{_bounds(row)}"


def counted(evidence: Evidence, reference: Mapping[str, Any]) -> float:
    """A count as a check names it.

    :raises Missing: no such cell, phase or divisor.
    :raises ConfigError: a pattern that matches no kind of the ledger.
    """
    cell = evidence.cell(reference["cell"])
    events = part(cell, reference.get("in", "region"))
    total = sum(events.get(kind, 0) for kind in kinds(reference["events"]))
    return total / _divisor(cell, reference.get("per", "run"))


def kinds(patterns: Sequence[str]) -> list[str]:
    """The ledger's kinds that match one of the patterns; ``!pattern`` takes some away."""
    found: dict[str, None] = {}
    for pattern in patterns:
        taken = [kind for kind in EVENTS if fnmatchcase(kind, pattern.removeprefix("!"))]
        if not taken:
            raise ConfigError(f"no event kind of the ledger matches {pattern!r}")
        for kind in taken:
            if pattern.startswith("!"):
                found.pop(kind, None)
            else:
                found[kind] = None
    return list(found)


def part(cell: Cell, name: str) -> Mapping[str, int]:
    """The events of the region of interest, of its warm part (``steady``), or of a phase."""
    if name == "region":
        events: Mapping[str, int] = cell["events"]
        return events
    found = steady(cell) if name == "steady" else phase(cell, name)
    if not found:
        raise Missing(f"{describe(cell)} has no phase {name}")
    return found


def _divisor(cell: Cell, per: str) -> float:
    if per == "run":
        return 1.0
    if per in ("iteration", "operation"):
        number = (cell.get("work") or {}).get(f"{per}s", 0)
    elif per in ("instruction", "1000 instructions"):
        guest = cell["instructions"]["guest"]
        number = (guest["user"] + guest["kernel"]) / (1000 if per.startswith("1000") else 1)
    else:
        raise ConfigError(f"per: {per!r} is none of run, iteration, operation, instruction, 1000 instructions")
    if not number:
        raise Missing(f"{describe(cell)} counted no {per}")
    return float(number)


def _outcome(evidence: Evidence, row: Mapping[str, Any]) -> tuple[bool, str, str]:
    same = "same_as" in row
    here, there = evidence.cell(row["outcome"]), evidence.cell(row["same_as" if same else "differs_from"])
    digests = [cell.get("fidelity", {}).get("outcome") for cell in (here, there)]
    for cell, digest in zip((here, there), digests, strict=True):
        if not digest:
            raise Missing(f"{describe(cell)} left no outcome digest")
    equal = digests[0] == digests[1]
    words = f"{row['name']}: {describe(here)} ends {'as' if equal else 'otherwise than'} {describe(there)}"
    return equal == same, "same" if equal else "different", words


def _bounds(row: Mapping[str, Any]) -> str:
    limits = [f"{words} {row[key]:g}" for key, words in (("at_least", "at least"), ("at_most", "at most")) if key in row]
    return f" ({' and '.join(limits)})" if limits else ""


# --- prices ------------------------------------------------------------------------------------------------


def _priced(
    evidence: Evidence, arguments: Arguments, rows: Sequence[Mapping[str, Any]], figures: dict[str, Any], said: list[str],
    skipped: list[str],
) -> Finding:
    for reference in (row[side] for row in rows for side in ("price", "over") if side in row):
        if "cell" in reference:
            evidence.cell(reference["cell"])  # what is missing altogether is said once, not for every profile
    by_profile: dict[str, Verdict] = {}
    margins: dict[str, Margins] = {}
    enough, certainty = arguments.get("enough"), float(arguments.get("certainty", 0.0))
    for profile in evidence.profiles:
        try:
            found = {row["name"]: _price(evidence, row, profile) for row in rows}
        except Missing as missing:
            by_profile[profile], figures[profile] = "undecided", {"reason": str(missing)}
            continue
        figures[profile] = {name: value for name, (value, _) in found.items()}
        for name, (_, several) in found.items():
            if all(evidence.value(margin, profile) >= 0 for margin in several):
                figures.setdefault("so on", {}).setdefault(name, []).append(profile)
        margins[profile] = Margins(tuple(margin for _, several in found.values() for margin in several), enough, certainty)
        by_profile[profile] = judged(margins[profile], evidence.profile(profile))
        if by_profile[profile] == "undecided" and profile in arguments["scope"]:
            share = costs.agreement(margins[profile].of, evidence.profile(profile), enough)
            said.append(f"{profile}: {share:.0%} of the cost samples agree, {certainty:.0%} are asked for")
    scope = list(arguments["scope"])
    said = said + [f"{name}: {_say(figures[name])}" for name in scope if name in figures]
    return Finding(in_scope(by_profile, scope), "; ".join(said + skipped), by_profile, figures, margins)


def _say(values: Mapping[str, Any]) -> str:
    return str(values["reason"]) if "reason" in values else ", ".join(f"{name} {value:,.4g}" for name, value in values.items())


def _price(evidence: Evidence, row: Mapping[str, Any], profile: str) -> tuple[float, list[Quantity]]:
    """The value that the check bounds, and the margins of its bounds."""
    above = cycles(evidence, row["price"], profile)
    below = cycles(evidence, row["over"], profile) if "over" in row else Quantity(constant=1.0)
    margins = []
    if "at_least" in row:
        margins.append(above - below * float(row["at_least"]))
    if "at_most" in row:
        margins.append(below * float(row["at_most"]) - above)
    divisor = evidence.value(below, profile)
    if divisor <= 0:
        raise Missing(f"{row['name']}: what it is divided by costs {divisor:.3g} cycles on {profile}")
    return round(evidence.value(above, profile) / divisor, 3), margins


def cycles(evidence: Evidence, reference: Mapping[str, Any], profile: str) -> Quantity:
    """A price as a check names it. :raises Missing: no such cell, or that CPU could not have run it."""
    if "constant" in reference:
        return Quantity(constant=float(reference["constant"]))
    if "costs" in reference:
        for key in reference["costs"]:
            evidence.figure(profile, key)
        return Quantity(costs=dict.fromkeys(reference["costs"], 1.0))
    cell = evidence.cell(reference["cell"])
    evidence.runnable(cell, profile)
    per = reference.get("per", "run")
    if isinstance(per, Mapping):
        return per_operation(evidence, cell, list(per["instructions"]))
    if per == "iteration":
        return per_iteration(cell)
    if per != "run":
        raise ConfigError(f"per: {per!r} is none of run, iteration, {{instructions: […]}}")
    chosen = set(kinds(reference["events"])) if "events" in reference else None

    def of(cell: Cell) -> Quantity:
        return Quantity({kind: n for kind, n in steady(cell).items() if chosen is None or kind in chosen})

    return of(cell) - of(evidence.cell(reference["less"])) if "less" in reference else of(cell)


def per_iteration(cell: Cell) -> Quantity:
    """One iteration's price; where the guest also ran an empty loop of the same shape, less that."""
    return (Quantity(steady(cell)) - Quantity(phase(cell, "empty"))) * (1 / _divisor(cell, "iteration"))


def repetitions(native: Cell, instructions: Sequence[str]) -> int:
    """How often the bare machine executed the named instructions, taken together as one operation.

    :raises Missing: not once.
    """
    ran = steady(native)
    times = min(int(ran.get(f"machine.{op}", 0)) for op in instructions)
    if not times:
        raise Missing(f"{describe(native)} executed no {' and '.join(op.upper() for op in instructions)}")
    return times


def per_operation(evidence: Evidence, cell: Cell, instructions: Sequence[str]) -> Quantity:
    """What one operation (the named instructions once each) costs here, the guest's other instructions subtracted.

    The others cost what they cost natively: the native total less the named instructions at their own price.
    Everything that the technique adds is charged to the operation.
    """
    native = evidence.native_of(cell)
    ran = steady(native)
    own = Quantity({f"machine.{op}": ran.get(f"machine.{op}", 0) for op in instructions})
    return (Quantity(steady(cell)) - Quantity(ran) + own) * (1 / repetitions(native, instructions))


# --- verdicts ----------------------------------------------------------------------------------------------


def judged(margins: Margins, profile: costs.Profile) -> Verdict:
    """The nominal verdict; ``undecided`` where fewer of the cost samples agree with it than the claim asks for."""
    if margins.certainty and costs.agreement(margins.of, profile, margins.enough) < margins.certainty:
        return "undecided"
    return "holds" if costs.holds(margins.of, profile, margins.enough) else "fails"


def in_scope(by_profile: Mapping[str, Verdict], scope: Sequence[str]) -> Verdict:
    """The overall verdict: what the profiles that the sentence speaks of say together."""
    said = [by_profile.get(name, "undecided") for name in scope]
    if "fails" in said:
        return "fails"
    return "holds" if said and all(verdict == "holds" for verdict in said) else "undecided"

"""What a run found, in sentences computed from its numbers: titles of charts and the three-sentence summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from vmlab.report.style import look
from vmlab.report.view import Cell, Generation, Ratio, View, cycles, ratio, times

Variant = tuple[str, str]

NATIVE: Variant = ("native", "")


@dataclass(frozen=True)
class Crossing:
    """Two variants change places between two successive generations.

    ``position`` is where, as a fraction of the way from ``before`` to ``after``; ``value`` the slowdown there.
    ``first`` is the one that was faster before.
    """

    first: Variant
    second: Variant
    before: Generation
    after: Generation
    position: float
    value: float


def name(variant: Variant) -> str:
    """A variant in words: ``binary translation (callout)``."""
    technique, told = variant
    return look(technique).short + (f" ({told})" if told else "")


def short(generation: Generation) -> str:
    """A generation where space is short: ``Prescott 2005``."""
    stem = generation.name.removesuffix(f"-{generation.year}")
    return f"{stem.replace('-', ' ').capitalize() if len(stem) > 3 else stem.upper()} {generation.year or ''}".strip()


def slowdowns(view: View, workload: str, generation: Generation) -> dict[Variant, float]:
    """Nominal slowdown of every variant but native, in the workload's densest cells."""
    found = {}
    for variant in view.variants(workload):
        value = ratio(view.densest(workload, variant), generation.name)
        if value and variant[0] != "native":
            found[variant] = value.value
    return found


def crossings(view: View, workload: str) -> list[Crossing]:
    """Where two lines of the chart over generations cross, native being the line at 1.

    Only crossings with the two ranges apart on at least one side: else it is noise that crosses. Of several at
    one place (a technique that costs nothing runs on native's line) the first stands for all.
    """
    found: list[Crossing] = []
    for before, after in pairwise(view.intel):
        then, now = _ranges(view, workload, before), _ranges(view, workload, after)
        both = {variant: (then[variant], now[variant]) for variant in then if variant in now}
        for a, b in combinations(both, 2):
            d0, d1 = (math.log(both[a][i].value / both[b][i].value) for i in (0, 1))
            if d0 * d1 >= 0 or not any(_apart(both[a][i], both[b][i]) for i in (0, 1)):
                continue
            position = d0 / (d0 - d1)
            value = math.exp((1 - position) * math.log(both[a][0].value) + position * math.log(both[a][1].value))
            first, second = (a, b) if d0 < 0 else (b, a)
            near = [c for c in found if c.before == before and abs(c.position - position) < 0.1
                    and abs(math.log(c.value / value)) < 0.1 and {c.first, c.second} & {a, b}]
            if not near:
                found.append(Crossing(first, second, before, after, position, value))
    return found


def _ranges(view: View, workload: str, generation: Generation) -> dict[Variant, Ratio]:
    """As :func:`slowdowns`, with ranges, and with native first."""
    found: dict[Variant, Ratio] = {NATIVE: Ratio(1.0, 1.0, 1.0)}
    for variant in view.variants(workload):
        value = ratio(view.densest(workload, variant), generation.name)
        if value and variant[0] != "native":
            found[variant] = value
    return found


def _apart(a: Ratio, b: Ratio) -> bool:
    return a.high < b.low or b.high < a.low


def against_native(view: View, workload: str) -> str:
    """The technique whose standing against the bare machine changes with the CPUs, in a sentence; "" if none does."""
    best: tuple[int, str] = (0, "")
    for variant in view.variants(workload):
        standing: list[tuple[str, str]] = []
        for generation in view.intel:
            value = _ranges(view, workload, generation).get(variant)
            if value and variant[0] != "native":
                word = "beats native" if value.high < 1 else "loses to native" if value.low > 1 else "is about even"
                standing.append((word, short(generation)))
        words = list(dict.fromkeys(word for word, _ in standing))
        # Even throughout but for rounding is no finding; a win that is lost is the best one.
        weight = 2 * ("beats native" in words) + ("loses to native" in words)
        if len(words) > 1 and weight > best[0]:
            parts = [f"{word} on {' and '.join(g for w, g in standing if w == word)}" for word in words]
            best = (weight, f"{name(variant)} {', '.join(parts)}")
    return best[1]


def slowdown_title(view: View) -> str:
    """Best and worst technique on the headline workload, oldest generation."""
    if not view.generations:
        return "Nothing was priced"
    generation = view.generations[0]
    found = slowdowns(view, view.headline, generation)
    if not found:
        return f"No technique was priced on {short(generation)}"
    best, worst = min(found, key=lambda v: found[v]), max(found, key=lambda v: found[v])
    if best == worst:
        return f"{view.headline} on {short(generation)}: {name(best)} takes {times(found[best])} native's time"
    return (f"{view.headline} on {short(generation)}: {name(best)} takes {times(found[best])} native's time, "
            f"{name(worst)} {times(found[worst])}")


def largest_cause(cell: Cell, profile: str) -> tuple[str, float] | None:
    """The cause that costs most in a cell, and its share of the total."""
    price = cycles(cell, profile)
    if not price or not price["total"] or not price.get("breakdown"):
        return None
    breakdown: Mapping[str, float] = price["breakdown"]
    cause = max(breakdown, key=lambda c: breakdown[c])
    return cause, breakdown[cause] / float(price["total"])


def causes_title(view: View) -> str:
    """What the dearest technique spends its cycles on."""
    for generation in view.generations[:1]:
        found = slowdowns(view, view.headline, generation)
        if not found:
            break
        worst = max(found, key=lambda v: found[v])
        cause = largest_cause(view.densest(view.headline, worst), generation.name)
        if cause:
            words, share = cause
            verb = "take" if words.endswith("s") else "takes"
            begin = f"{words[0].upper()}{words[1:]} {verb} {100 * share:.0f} %"
            return f"{begin} of the cycles of {name(worst)} on {short(generation)}"
    return "No cell was priced by cause"


def density_title(view: View) -> str:
    """How far the techniques drift apart from the sparsest to the densest cell."""
    if not view.generations:
        return "Nothing was priced"
    generation, moves = view.generations[0], {}
    for variant in view.variants(view.headline):
        ends = [ratio(cell, generation.name) for cell in view.column(view.headline, variant)]
        if variant[0] != "native" and len(ends) > 1 and ends[0] and ends[-1]:
            moves[variant] = (ends[0].value, ends[-1].value)
    densities = view.densities(view.headline)
    if not moves:
        return "One density only: nothing to compare"
    up = max(moves, key=lambda v: moves[v][1] / moves[v][0])
    down = min(moves, key=lambda v: moves[v][1] / moves[v][0])
    text = (f"From {densities[0]:g} to {densities[-1]:g} per 1000, {name(up)} goes from {times(moves[up][0])} to "
            f"{times(moves[up][1])}")
    if down == up:
        return f"{text} on {short(generation)}"
    return f"{text}, {name(down)} from {times(moves[down][0])} to {times(moves[down][1])} on {short(generation)}"


def generations_title(view: View) -> str:
    """Which techniques change places as CPUs change, or that none does."""
    line = view.intel
    if len(line) < 2:
        return "One CPU generation only: nothing to compare"
    told = against_native(view, view.headline)
    if told:
        return f"{view.headline}: {told}"
    found = crossings(view, view.headline)
    if found:
        return f"{view.headline}: {_overtakes(found[0])}"
    newest = slowdowns(view, view.headline, line[-1])
    best = min(newest, key=lambda v: newest[v]) if newest else None
    return f"From {short(line[0])} to {short(line[-1])} no technique overtakes another" + (
        f"; {name(best)} is the fastest at the end" if best else "")


def _overtakes(crossing: Crossing) -> str:
    return f"{name(crossing.second)} overtakes {name(crossing.first)} by {short(crossing.after)}"


def summary(results: Mapping[str, Any]) -> list[str]:
    """Exactly three plain sentences: what it costs, what changed with the CPUs, what the claims say."""
    view = View(results)
    return [_cost(view), _change(view), _verdicts(view)]


def _cost(view: View) -> str:
    if not view.cells:
        failed = len(view.all)
        return f"No cell of this run finished ({failed} failed or unsupported), so there is nothing to compare."
    return f"{slowdown_title(view)}."


def _change(view: View) -> str:
    line = view.intel
    if len(line) < 2:
        return "The run was priced on fewer than two CPU generations of one maker, so it says nothing about progress."
    title = generations_title(view).removeprefix(f"{view.headline}: ")
    if title.startswith("From "):
        title = f"from {title.removeprefix('From ')}"
    old, new = slowdowns(view, view.headline, line[0]), slowdowns(view, view.headline, line[-1])
    hardware = next((v for v in old if v[0] == "hardware-assisted" and v in new), None)
    told = ""
    if hardware:
        then, now = times(old[hardware]), times(new[hardware])
        told = f"; {name(hardware)} " + (f"stayed at {now}" if then == now else f"went from {then} to {now}")
    return f"Across {len(line)} CPU generations, {title}{told}."


def _verdicts(view: View) -> str:
    claims = list(view.results.get("claims") or [])
    by: dict[str, list[str]] = {"holds": [], "fails": [], "undecided": []}
    for claim in claims:
        by.setdefault(str(claim["verdict"]), []).append(str(claim["id"]))
    wrong = [c for c in view.cells if c["technique"] != "native" and (c.get("fidelity") or {}).get("matches_native") is False]
    judged = [c for c in view.cells if c["technique"] != "native"]
    same = len(judged) - len(wrong)
    where = sorted({f"{name(view.variant(c))} on {view.work(c)}" for c in wrong})
    fidelity = f"{same} of {len(judged)} virtualized cells end exactly as the bare machine does"
    if "of" in view.results:
        fidelity += f" (of the {len(view.all)} that this looks at, from all over the sweep's {view.results['of']})"
    if where:
        fidelity += f" (not: {', '.join(where[:3])}{' and others' if len(where) > 3 else ''})"
    if not claims:
        return f"No claim was asked for; {fidelity}."
    said = [f"{len(by['holds'])} hold"]
    for verdict, word in (("fails", "fail"), ("undecided", "stay undecided")):
        if by[verdict]:
            said.append(f"{len(by[verdict])} {word} ({', '.join(by[verdict])})")
    return f"Of {len(claims)} claims {', '.join(said)}; {fidelity}."

"""Predicates that rest on counts and digests (and, for direct execution, on what it costs)."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from vmlab import costs
from vmlab.claims.checks import in_scope, judged
from vmlab.claims.evidence import Cell, Evidence, Finding, Margins, Missing, Verdict, describe, steady
from vmlab.costs import Quantity

Arguments = Mapping[str, Any]


def outcome_goes_wrong(evidence: Evidence, arguments: Arguments) -> Finding:
    """The ``wrong`` variant of a technique ends with another outcome than native, the ``right`` one does not."""
    technique, workload = arguments["technique"], arguments["workload"]
    wrong = evidence.densest(technique, workload, **arguments["wrong"])
    right = evidence.densest(technique, workload, **arguments["right"])
    digest = _outcome(evidence.native_of(wrong))
    figures = {
        "native": digest, "silent": _outcome(wrong), "trapping": _outcome(right),
        "first_difference": wrong["fidelity"].get("first_difference"),
    }
    differs = _outcome(wrong) != digest
    agrees = _outcome(right) == _outcome(evidence.native_of(right))
    if differs and agrees:
        reason = "the deprivileged guest ends otherwise than on the bare machine; once the instruction traps, it does not"
    elif not differs:
        reason = f"{describe(wrong)} ended exactly as on the bare machine"
    else:
        reason = f"{describe(right)} went wrong too, so the silent instruction is not what decides"
    return Finding("holds" if differs and agrees else "fails", reason, figures=figures)


def _outcome(cell: Cell) -> str:
    digest = cell.get("fidelity", {}).get("outcome")
    if not digest:
        raise Missing(f"{describe(cell)} left no outcome digest")
    return str(digest)


def faithful(evidence: Evidence, arguments: Arguments) -> Finding:
    """Every finished cell ends as native does, but for the declared exceptions, which are listed."""
    declared: list[Mapping[str, Any]] = list(arguments["exceptions"])
    kept, excused, broken = 0, [], []
    for cell in evidence.find():
        if cell["technique"] == "native":
            continue
        same = _outcome(cell) == _outcome(evidence.native_of(cell))
        if cell["fidelity"].get("declared") or any(_excuses(exception, cell) for exception in declared):
            excused.append({
                "cell": describe(cell), "matches_native": same,
                "declared": cell["fidelity"].get("declared"), "first_difference": cell["fidelity"].get("first_difference"),
            })
        elif same:
            kept += 1
        else:
            broken.append({"cell": describe(cell), "first_difference": cell["fidelity"].get("first_difference")})
    unfinished = [describe(cell) for cell in evidence.cells if cell.get("status") == "failed"]
    figures = {"agreeing": kept, "declared": excused, "broken": broken, "failed": unfinished}
    if broken:
        return Finding("fails", f"{broken[0]['cell']} did not end as the bare machine does", figures=figures)
    if unfinished:
        return Finding("undecided", f"{unfinished[0]} did not finish", figures=figures)
    if not kept:
        raise Missing("no finished cell of a technique that claims to be faithful")
    apart = f"; {len(excused)} declared unfaithful and listed" if excused else ""
    return Finding("holds", f"{kept} cells end exactly as the bare machine does{apart}", figures=figures)


def _excuses(exception: Mapping[str, Any], cell: Cell) -> bool:
    if cell["technique"] != exception["technique"] or cell["parameters"].get("workload") not in exception["workloads"]:
        return False
    return all(cell["parameters"].get(name) == value for name, value in exception["with"].items())


def runs_directly(evidence: Evidence, arguments: Arguments) -> Finding:
    """On plain computing at most ``emulated`` of the guest's instructions are emulated, most run unmodified, and the whole costs at
    most ``slowdown`` times what it costs natively."""
    shares: dict[str, Any] = {}
    worst: list[str] = []
    cells: list[Cell] = []
    for cell in evidence.find(workload=arguments["workload"]):
        if cell["technique"] == "native":
            continue
        cells.append(cell)
        share = cell["efficiency"]
        shares[describe(cell)] = dict(share)
        unmodified = float(share["retired"]) + float(share["translated"])
        if float(share["emulated"]) > arguments["emulated"] or unmodified < arguments["unmodified"]:
            worst.append(f"{describe(cell)}: {100 * float(share['emulated']):.2g} % emulated")
    if not shares:
        raise Missing(f"no finished cell on {arguments['workload']}")
    if worst:
        return Finding("fails", worst[0], figures=shares)
    most = max(float(share["emulated"]) for share in shares.values())
    said = (f"at least {_percent_left(most)} % of the guest's instructions ran on the CPU, the rest emulated" if most
            else "all of the guest's instructions ran on the CPU")
    by_profile: dict[str, Verdict] = {}
    margins: dict[str, Margins] = {}
    for profile in evidence.profiles:
        able = [cell for cell in cells if costs.supports(evidence.profile(profile), cell["platform"])]
        margins[profile] = Margins(tuple(
            Quantity(steady(evidence.native_of(cell))) * arguments["slowdown"] - Quantity(steady(cell)) for cell in able))
        by_profile[profile] = judged(margins[profile], evidence.profile(profile))
        dearest = max(evidence.cycles(cell, profile) / evidence.cycles(evidence.native_of(cell), profile) for cell in able)
        shares.setdefault("dearest over native", {})[profile] = round(dearest, 4)
    said += "; dearest of them " + ", ".join(f"{shares['dearest over native'][name]:.3f} times native on {name}" for name in arguments["scope"])
    return Finding(in_scope(by_profile, arguments["scope"]), said, by_profile, shares, margins)


def _percent_left(share: float) -> str:
    """What a share above 0 leaves of the whole, in percent, rounded down, with as many places (two or more) as tell it from the whole."""
    taken = 100 * Decimal(repr(share))
    return f"{(100 - taken).quantize(Decimal(1).scaleb(-max(2, -taken.adjusted())), rounding=ROUND_FLOOR):f}"


def trapping_would_not_do(evidence: Evidence, arguments: Arguments) -> Finding:
    """Probe: some sensitive instructions neither trap at CPL 1 nor at CPL 3; compared with the published lists."""
    rows = _probe_rows(evidence)
    violators = sorted(name for name, row in rows.items() if row["verdict"] != "traps")
    published: dict[str, dict[str, Any]] = {}
    for label, names in arguments["published"].items():
        probed = [name for name in names if name in rows]
        published[label] = {
            "count": len(names), "probed": len(probed),
            "confirmed": sorted(name for name in probed if name in violators),
            "trapped": sorted(name for name in probed if name not in violators),
        }
    figures = {"probed": len(rows), "violators": violators, "count": len(violators), "published": published}
    if not violators:
        return Finding("fails", f"all {len(rows)} probed instructions trapped outside CPL 0", figures=figures)
    counts = ", ".join(f"{len(p['confirmed'])} of the {p['count']} of {label}" for label, p in published.items())
    return Finding("holds", f"{len(violators)} of {len(rows)} sensitive instructions do not trap: {counts}", figures=figures)


def shows_the_ring(evidence: Evidence, arguments: Arguments) -> Finding:
    """Probe: every one of the named instructions answers a deprivileged guest instead of trapping."""
    rows = _probe_rows(evidence)
    absent = [name for name in arguments["instructions"] if name not in rows]
    if absent:
        raise Missing(f"the probe did not run {', '.join(absent)}")
    figures = {name: dict(rows[name]) for name in arguments["instructions"]}
    hidden = [name for name in arguments["instructions"] if rows[name]["verdict"] == "traps"]
    if hidden:
        return Finding("fails", f"{', '.join(hidden)} trapped, so a monitor could hide the truth", figures=figures)
    return Finding("holds", "each of them ran outside CPL 0 without a trap and told of the machine's state", figures=figures)


def rings_collapse(evidence: Evidence, _: Arguments) -> Finding:
    """Probe: in 64-bit mode ring 1 reads and writes supervisor pages as ring 0 does, and ring 3 does not."""
    rows = (evidence.probe or {}).get("rings")
    if not rows:
        raise Missing("no probe: run `vmlab probe` and judge its result")
    figures = {str(row["access"]): {cpl: row[cpl] for cpl in ("cpl0", "cpl1", "cpl3")} for row in rows}
    kept_out = [access for access, row in figures.items() if row["cpl1"] != "runs"]
    user = [access for access, row in figures.items() if row["cpl3"] == "runs"]
    if kept_out:
        return Finding("fails", f"ring 1 was kept out: {', '.join(kept_out)}", figures=figures)
    if user:
        return Finding("fails", f"ring 3 was let in, so paging is not what was tested: {', '.join(user)}", figures=figures)
    return Finding("holds", "at CPL 1 each access runs as at CPL 0, at CPL 3 it raises a page fault", figures=figures)


def _probe_rows(evidence: Evidence) -> dict[str, Mapping[str, Any]]:
    if not evidence.probe or not evidence.probe.get("rows"):
        raise Missing("no probe: run `vmlab probe` and judge its result")
    # "op", where the probe gives it, is the ledger's name; "instruction" is what people read.
    return {str(row.get("op") or row["instruction"]).lower(): row for row in evidence.probe["rows"]}


def model_gives(evidence: Evidence, arguments: Arguments) -> Finding:
    """A model that the lab may have reports cycles of recovery per exit in its cells; without it the claim is undecided."""
    model = str(arguments["model"])
    given = [cell["models"][model]["cycles_per_exit"] for cell in evidence.find() if model in (cell.get("models") or {})]
    if not given:
        raise Missing(f"no {model} model fed by both the guest's and the monitor's memory accesses: the monitor's handlers are Python "
                      "and touch none of the machine's memory, so what an exit evicts cannot be counted here")
    holds = min(given) > 0
    reason = f"recovery after an exit takes {min(given):g} cycles or more by the {model} model"
    return Finding("holds" if holds else "fails", reason, figures={"cycles per exit": given})
